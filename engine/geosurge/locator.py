"""Images or embeddings in, `Location`s out: the one place where an encoder and an index meet.

A `Locator` is one index bundle, opened. It answers in batches; within a batch, the queries that are searched alike
(same beam width, or exactly, or within the same region) share one call of the index, and each then gets its own
posterior. A query that cannot be answered yields its error in its place and costs no other.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import operator
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeAlias

import h3
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from geosurge.bundle import Bundle, open_bundle
from geosurge.bundle.manifest import Manifest, PointEstimator
from geosurge.bundle.verifying import check_encoder, check_index, check_listed_files
from geosurge.calibration import Calibration
from geosurge.cells import CellTree
from geosurge.crops import average_predictions
from geosurge.encoder.model import ImageEncoder
from geosurge.errors import (
    CellUnknownError,
    EmbeddingInvalidError,
    EncoderMissingError,
    InputError,
    OptionOutOfRangeError,
    RegionCellUnknownError,
    RegionEmptyError,
    UsageError,
)
from geosurge.gallery import SEARCHED_LEAVES, Gallery
from geosurge.geodesy import Float64Array
from geosurge.hexagons import MAX_H3_RESOLUTION
from geosurge.images import DEFAULT_LIMITS, ImageLimits, normalise_image, read_image_bytes
from geosurge.location import (
    MAX_BEAM_WIDTH,
    MAX_TOP_K,
    Alternative,
    CredibleRegion,
    LocateOptions,
    Location,
    PathCell,
    Timings,
)
from geosurge.posterior import LeafShapes, PointEstimate, Posteriors, infer, leaf_shapes, path_masses
from geosurge.preprocessing import CropCount, Preprocessing
from geosurge.search import HierarchicalIndex, LeafHits, merge_ranges
from geosurge.store import resolve_bundle

ImageInput: TypeAlias = bytes | Image.Image | str | Path
"""An encoded image, a decoded one, or the path of a file."""

MAX_REGION_TOKENS: Final = 1000

REACHED_LEAVES: Final = 1024
"""Leaves that a beam search returns at most, as the support of the posterior: never only the few that will be shown."""

_MAX_SCORES: Final = 1 << 24
"""A large batch is cut so that no call of the index returns more scores; exact search returns every leaf's."""

_POSTERIOR_BLOCK: Final = 1 << 16
"""Leaves whose posteriors are computed together: arrays of so many stay in the cache of a core."""

_CACHED_REGIONS: Final = 64
"""A region is checked when its request arrives, and needed again when its batch is searched."""

_Ranges: TypeAlias = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _SearchPlan:
    """Queries with equal plans share one call of the index.

    Attributes:
        width: Beam width; ``None`` searches exactly.
        leaf_ranges: Leaves that the answer must lie in; ``None`` is all leaves.
    """

    width: int | None
    leaf_ranges: _Ranges | None


class Locator:
    """One index bundle, opened; made by `open`.

    `preprocess`, `validate_options` and `normalise_embedding` may be called from any thread. `encode` belongs to one
    thread at a time, and so do, together, `search` and `locate_embeddings`: one batch may be searched while another is
    encoded. `locate` does both.

    Attributes:
        index_version: Name of the bundle; every answer carries it.
        manifest: The bundle's manifest.
        tree: Its cells.
        index: Its embedding indexes.
        limits: What is accepted as an image.
        calibration: How its scores become probabilities.
        gallery: Its references, where they make the point estimate.
    """

    def __init__(
        self,
        manifest: Manifest,
        tree: CellTree,
        index: HierarchicalIndex,
        encoder: ImageEncoder | None,
        *,
        calibration: Calibration,
        gallery: Gallery | None = None,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        self.index_version = manifest.name
        self.manifest = manifest
        self.tree = tree
        self.index = index
        self.limits = limits
        self.calibration = calibration
        self.gallery = gallery
        self._encoder = encoder
        leaves = tree.leaves
        self._leaves: LeafShapes = leaf_shapes(
            leaves.latitude_deg, leaves.longitude_deg, leaves.spread_km, leaves.area_km2
        )
        leaf_cells = None if tree.grid is None else tree.grid.id_range(tree.cell_ids(tree.level_count))
        find_ranges = functools.partial(_find_leaf_ranges, tree, leaf_cells, manifest.name)
        self._leaf_ranges = functools.lru_cache(maxsize=_CACHED_REGIONS)(find_ranges)

    @classmethod
    def open(
        cls,
        path: str | Path,
        device: str = "cpu",
        *,
        limits: ImageLimits = DEFAULT_LIMITS,
        check_hashes: bool = True,
        point_estimator: PointEstimator | None = None,
    ) -> Locator:
        """Opens a bundle after checking that its parts are whole and belong together.

        The indexes must agree with the tree and with the manifest, the encoder must be the one that the indexes were
        built for, and the golden queries and images must get their recorded answers.

        Args:
            path: Directory of a bundle, or a store, whose active bundle is opened.
            device: Where encoder and indexes live: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
            limits: What is accepted as an image.
            check_hashes: Also compare every byte with the manifest. LMDB and FAISS load a file with flipped bits
                without noticing, so leave this out only where something else vouches for the files.
            point_estimator: How the point is estimated, to compare; by default as the bundle says. The bundle was
                calibrated with its own: around the points of another, radii are as good as the posterior alone.

        Raises:
            BundleError: The bundle is missing, partial, corrupt, of another schema, or its parts do not fit.
            StoreError: The store's pointer is damaged.
            EncoderError: The encoder cannot be loaded.
            UsageError: The device is unknown or cannot be used, or the bundle has no gallery for the point estimator.
        """
        bundle = open_bundle(resolve_bundle(Path(path)))
        if point_estimator is not None:
            bundle = _with_point_estimator(bundle, point_estimator)
        if check_hashes:
            check_listed_files(bundle)
        encoder = None if bundle.encoder_path is None else ImageEncoder.load(bundle.encoder_path, device)
        with contextlib.ExitStack() as stack:
            locator = stack.enter_context(cls.assemble(bundle, encoder, device, limits=limits))
            check_index(bundle, locator.tree, locator.index)
            if encoder is not None:
                check_encoder(bundle, encoder)
            stack.pop_all()
        return locator

    @classmethod
    def assemble(
        cls, bundle: Bundle, encoder: ImageEncoder | None, device: str = "cpu", *, limits: ImageLimits = DEFAULT_LIMITS
    ) -> Locator:
        """Opens the tree and the indexes of a bundle and joins them with an encoder, without any of `open`'s checks.

        Args:
            bundle: Its files may be removed when this has returned.
            encoder: The encoder that the indexes were built with; ``None`` answers embeddings only.
            device: Where the indexes live.
            limits: What is accepted as an image.

        Raises:
            BundleError: A file is missing, or is not what it should be.
            UsageError: The device is unknown or cannot be used.
        """
        info = bundle.manifest.calibration
        calibration = Calibration() if info is None else info.to_calibration()
        with contextlib.ExitStack() as stack:
            tree = stack.enter_context(CellTree.open(bundle.tree_path))
            index = stack.enter_context(HierarchicalIndex.open(bundle.level_paths, device))
            gallery = None
            if bundle.manifest.point_estimator == "kernel_density":
                gallery = stack.enter_context(contextlib.closing(Gallery.open(bundle)))
            locator = cls(
                bundle.manifest, tree, index, encoder, calibration=calibration, gallery=gallery, limits=limits
            )
            stack.pop_all()
        return locator

    def close(self) -> None:
        """Gives memory and files back; calling it again does nothing."""
        self.index.close()
        self.tree.close()
        if self.gallery is not None:
            self.gallery.close()
        self._encoder = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def encoder(self) -> ImageEncoder:
        """The bundle's encoder.

        Raises:
            EncoderMissingError: The bundle has none, or the locator is closed.
        """
        if self._encoder is None:
            raise EncoderMissingError(
                f"index version {self.index_version!r} has no encoder and cannot read images; send an embedding of "
                f"{self.manifest.dimension} values, or ask an index version with an encoder"
            )
        return self._encoder

    def preprocess(self, data: bytes) -> NDArray[np.uint8]:
        """Decodes an image to what the encoder reads.

        Args:
            data: An encoded image.

        Returns:
            (3, image_size, image_size) uint8.

        Raises:
            ImageError: The image cannot be used.
            EncoderMissingError: The index version answers embeddings only.
        """
        return self.encoder.preprocessing.decode(data, self.limits)

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeds preprocessed images.

        Args:
            pixels: (n, 3, image_size, image_size) uint8, stacked results of `preprocess`.

        Returns:
            (n, d) float32, unit rows.

        Raises:
            EncoderMissingError: The index version answers embeddings only.
        """
        return self.encoder.encode(pixels)

    def normalise_embedding(self, values: ArrayLike) -> NDArray[np.float32]:
        """Checks one embedding and scales it to unit length.

        Args:
            values: (d,) numbers.

        Returns:
            (d,) float32.

        Raises:
            EmbeddingInvalidError: It has another length than the index's vectors, is not finite, or is zero.
        """
        dimension = self.manifest.dimension
        try:
            row = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise EmbeddingInvalidError(f"the embedding is not a sequence of {dimension} numbers: {error}") from error
        if row.shape != (dimension,):
            raise EmbeddingInvalidError(
                f"the embedding has the shape {row.shape}, index version {self.index_version!r} needs ({dimension},): "
                "use the encoder that the bundle was built with"
            )
        units, usable = _unit_rows(row[np.newaxis])
        if usable[0]:
            return np.asarray(units[0])
        if not row.any():
            raise EmbeddingInvalidError("the embedding is zero, so it has no direction to search in")
        position = int(np.flatnonzero(~np.isfinite(row))[0])
        raise EmbeddingInvalidError(f"value {position} of the embedding is {row[position]}; all must be finite")

    def validate_options(self, options: LocateOptions) -> None:
        """Checks the options of one query, its region's cells included.

        Raises:
            OptionOutOfRangeError: An option is outside its range.
            RegionCellUnknownError: The region names a cell that the index does not have.
            RegionEmptyError: The region holds no leaf.
        """
        self._plan(options)

    def search(self, embeddings: NDArray[np.float32], options: LocateOptions | None = None) -> LeafHits:
        """Finds the leaves that the answers to a batch of embeddings are made of.

        Args:
            embeddings: (n, d) float32 unit rows; or (n, c, d) of c crops of each image, whose predictions are averaged.
            options: Where and how all are searched; by default `LocateOptions`' own.

        Returns:
            The support of each posterior: at most `REACHED_LEAVES` leaves of a beam search, or all that may answer of
            an exact one. With several crops, those that any of them reached.

        Raises:
            OptionOutOfRangeError: An option is outside its range.
            RegionCellUnknownError: The region names a cell that the index does not have.
            RegionEmptyError: The region holds no leaf.
            EmbeddingInvalidError: The embeddings have another number of components than the index.
        """
        crops = embeddings if embeddings.ndim == 3 else embeddings[:, np.newaxis]
        return self._search_alike(crops, self._plan(options or LocateOptions()))

    def locate_embeddings(
        self, embeddings: NDArray[np.float32], options: Sequence[LocateOptions]
    ) -> list[Location | InputError]:
        """Locates a batch of embeddings.

        Args:
            embeddings: (n, d) visual embeddings; or (n, c, d) of c crops of each image, whose predictions are averaged.
                Rows are scaled to unit length.
            options: How each row is located, n of them.

        Returns:
            For each row its location, or the error that says why it has none. A location's timings are those of the
            call of the index and of the posteriors that the row shared with others.

        Raises:
            ValueError: There are not as many options as rows.
        """
        if len(embeddings) != len(options):
            raise ValueError(f"{len(embeddings)} embeddings but {len(options)} options; give one for each")
        results: dict[int, Location | InputError] = {}
        groups: defaultdict[_SearchPlan, list[int]] = defaultdict(list)
        queries = np.asarray(embeddings)
        if queries.ndim != 3:
            queries = queries[:, np.newaxis]
        if queries.shape[2:] == (self.manifest.dimension,):
            rows_of_crops, are_usable = _unit_rows(queries.reshape(-1, self.manifest.dimension))
            units, usable = rows_of_crops.reshape(queries.shape), are_usable.reshape(queries.shape[:2])
        else:
            units, usable = queries, np.zeros((len(queries), 1), dtype=bool)
        for row, wanted in enumerate(options):
            try:
                plan = self._plan(wanted)
                if not usable[row].all():
                    for crop in queries[row]:
                        self.normalise_embedding(crop)
            except InputError as error:
                results[row] = error
            else:
                groups[plan].append(row)
        for plan, members in groups.items():
            scores = self.tree.cell_counts[-1] if plan.width is None else max(plan.width, REACHED_LEAVES)
            size = max(1, _MAX_SCORES // (scores * queries.shape[1]))
            for start in range(0, len(members), size):
                rows = members[start : start + size]
                located = self._locate_alike(units[rows], plan, [options[row] for row in rows])
                results.update(zip(rows, located, strict=True))
        return [results[row] for row in range(len(options))]

    def locate(
        self,
        images: Sequence[ImageInput],
        options: LocateOptions | Sequence[LocateOptions] | None = None,
        *,
        batch_size: int = 32,
        crops: CropCount = 1,
    ) -> list[Location | InputError]:
        """Locates images.

        Args:
            images: Encoded images, Pillow images or paths, n of them.
            options: How all are located, or each; by default `LocateOptions`' own.
            batch_size: Images encoded together.
            crops: Squares of each image whose predictions are averaged; see `Preprocessing.crops`. Whether several help
                depends on the images, and probabilities and radii were calibrated with one.

        Returns:
            For each image its location, or the error that says why it has none. A location's `encode_ms` is the time of
            the batch that the image was encoded in.

        Raises:
            EncoderMissingError: The index version answers embeddings only.
            ValueError: There are not as many options as images.
        """
        if options is None or isinstance(options, LocateOptions):
            options = [options or LocateOptions()] * len(images)
        if len(options) != len(images):
            raise ValueError(f"{len(images)} images but {len(options)} options; give one for each, or one for all")
        results: list[Location | InputError] = []
        for start in range(0, len(images), batch_size):
            end = start + batch_size
            results += self._locate_batch(images[start:end], options[start:end], crops)
        return results

    def _locate_batch(
        self, images: Sequence[ImageInput], options: Sequence[LocateOptions], crops: CropCount
    ) -> list[Location | InputError]:
        encoder = self.encoder
        results: dict[int, Location | InputError] = {}
        decoded: list[tuple[int, NDArray[np.uint8], float]] = []
        for row, (image, wanted) in enumerate(zip(images, options, strict=True)):
            begun = time.perf_counter()
            try:
                self.validate_options(wanted)
                pixels = self._pixels(encoder.preprocessing, image, crops)
            except InputError as error:
                results[row] = error
            else:
                decoded.append((row, pixels, _milliseconds_since(begun)))
        if decoded:
            begun = time.perf_counter()
            embeddings = encoder.encode(np.concatenate([pixels for _, pixels, _ in decoded]))
            encode_ms = _milliseconds_since(begun)
            by_image = embeddings.reshape(len(decoded), crops, -1)
            located = self.locate_embeddings(by_image, [options[row] for row, _, _ in decoded])
            for (row, _, decode_ms), result in zip(decoded, located, strict=True):
                results[row] = _with_image_timings(result, decode_ms, encode_ms)
        return [results[row] for row in range(len(images))]

    def _pixels(self, preprocessing: Preprocessing, image: ImageInput, crops: CropCount) -> NDArray[np.uint8]:
        if isinstance(image, Image.Image):
            return preprocessing.crops(normalise_image(image, self.limits), crops)
        data = image if isinstance(image, bytes) else read_image_bytes(image, self.limits)
        return preprocessing.decode_crops(data, crops, self.limits)

    def _plan(self, options: LocateOptions) -> _SearchPlan:
        _check_integer("top_k", options.top_k, 1, MAX_TOP_K)
        if options.beam_width is not None:
            _check_integer("beam_width", options.beam_width, 1, MAX_BEAM_WIDTH)
        if options.h3_resolution is not None:
            _check_integer("h3_resolution", options.h3_resolution, 0, MAX_H3_RESOLUTION)
        if not 0.0 < options.confidence_level < 1.0:
            raise OptionOutOfRangeError(
                f"confidence_level is {options.confidence_level}; it must be greater than 0 and less than 1"
            )
        if options.region_tokens:
            if len(options.region_tokens) > MAX_REGION_TOKENS:
                raise OptionOutOfRangeError(
                    f"the region has {len(options.region_tokens)} cells, at most {MAX_REGION_TOKENS} are allowed; "
                    "use larger cells"
                )
            return _SearchPlan(None, self._leaf_ranges(tuple(options.region_tokens)))
        if options.exact:
            return _SearchPlan(None, None)
        # The leaves that a beam misses are missing from the normaliser too: narrower than what the calibration was
        # fitted with, it would report certainty that nobody has. Of a beam of one, often one leaf is all.
        return _SearchPlan(max(self.manifest.default_beam_width, options.beam_width or 0), None)

    def _search_alike(self, embeddings: NDArray[np.float32], plan: _SearchPlan) -> LeafHits:
        """The leaves of (n, c, d) embeddings of c crops of each image."""
        crops = embeddings.shape[1]
        queries = embeddings.reshape(-1, embeddings.shape[2])
        if plan.width is not None:
            hits = self.index.search(queries, width=plan.width, k=REACHED_LEAVES)
        else:
            hits = self.index.exact(queries, k=self.tree.cell_counts[-1], leaf_ranges=plan.leaf_ranges)
        return hits if crops == 1 else average_predictions(hits, crops, self.calibration.temperature)

    def _locate_alike(
        self, embeddings: NDArray[np.float32], plan: _SearchPlan, options: Sequence[LocateOptions]
    ) -> list[Location]:
        begun = time.perf_counter()
        hits = self._search_alike(embeddings, plan)
        queries = embeddings[:, 0] if embeddings.shape[1] == 1 else _unit_rows(embeddings.mean(axis=1))[0]
        search_ms = _milliseconds_since(begun)
        size = max(1, _POSTERIOR_BLOCK // hits.ordinals.shape[1])
        located: list[Location] = []
        for start in range(0, len(options), size):
            rows = slice(start, start + size)
            located += self._answer(queries[rows], hits.ordinals[rows], hits.scores[rows], options[rows], search_ms)
        return located

    def _answer(
        self,
        embeddings: NDArray[np.float32],
        ordinals: NDArray[np.int64],
        scores: NDArray[np.float32],
        options: Sequence[LocateOptions],
        search_ms: float,
    ) -> list[Location]:
        begun = time.perf_counter()
        shown = [wanted.top_k for wanted in options]
        point: PointEstimate = "posterior_mean" if self.manifest.point_estimator == "posterior_mean" else "leaf"
        # As many as the gallery searches, so that a point depends neither on the other queries nor on what is shown.
        kept = max(shown) if self.gallery is None else max(*shown, SEARCHED_LEAVES)
        posteriors = infer(ordinals, scores, self._leaves, self.calibration.temperature, point, shown=kept)
        if self.gallery is not None:
            points = self.gallery.points(embeddings, posteriors, self._leaves)
            posteriors = posteriors.around(points, self._leaves)
        confidence = np.array([wanted.confidence_level for wanted in options])
        parts = list(
            zip(
                options,
                posteriors.latitude_deg.tolist(),
                posteriors.longitude_deg.tolist(),
                posteriors.radius_km(self.calibration.mass_for_confidence(confidence)).tolist(),
                self._paths(posteriors),
                self._alternatives(posteriors, np.array(shown)),
                self._credible_regions(posteriors, confidence),
                strict=True,
            )
        )
        timings = Timings(search_ms=search_ms, posterior_ms=_milliseconds_since(begun))
        return [
            Location(
                latitude_deg=latitude_deg,
                longitude_deg=longitude_deg,
                radius_km=radius_km,
                confidence_level=wanted.confidence_level,
                probability=alternatives[0].probability,
                path=path,
                alternatives=alternatives,
                credible_region=region,
                index_version=self.index_version,
                place=alternatives[0].place,
                h3_cell=_h3_cell(latitude_deg, longitude_deg, wanted.h3_resolution),
                timings=timings,
            )
            for wanted, latitude_deg, longitude_deg, radius_km, path, alternatives, region in parts
        ]

    def _paths(self, posteriors: Posteriors) -> list[tuple[PathCell, ...]]:
        paths = self.tree.ancestors(posteriors.ordinals[:, 0])
        masses = path_masses(posteriors.probabilities, posteriors.ordinals, self.tree.leaf_ranges(paths))
        levels = range(1, self.tree.level_count + 1)
        cells = zip(self.tree.path_tokens(paths), masses.tolist(), strict=True)
        return [tuple(map(PathCell, levels, *columns)) for columns in cells]

    def _alternatives(self, posteriors: Posteriors, shown: NDArray[np.int64]) -> list[tuple[Alternative, ...]]:
        counts = np.minimum(shown, (posteriors.ordinals >= 0).sum(axis=1))
        is_shown = np.arange(posteriors.ordinals.shape[1]) < counts[:, np.newaxis]
        ordinals = posteriors.ordinals[is_shown]
        level, leaves = self.tree.level_count, self.tree.leaves
        alternatives = map(
            Alternative,
            self.tree.tokens(level, ordinals),
            posteriors.probabilities[is_shown].tolist(),
            leaves.latitude_deg[ordinals].tolist(),
            leaves.longitude_deg[ordinals].tolist(),
            self.tree.places(level, ordinals.tolist()),
        )
        return [tuple(itertools.islice(alternatives, count)) for count in counts.tolist()]

    def _credible_regions(self, posteriors: Posteriors, confidence: Float64Array) -> list[CredibleRegion]:
        # The recalibration was fitted to circles around the estimate, so it has nothing to say about sets of leaves.
        chosen = posteriors.credible_leaves(confidence)
        is_chosen = np.arange(chosen.positions.shape[1]) < chosen.counts[:, np.newaxis]
        rows, _ = np.nonzero(is_chosen)
        ordinals = posteriors.ordinals[rows, chosen.positions[is_chosen]]
        tokens = iter(self.tree.tokens(self.tree.level_count, ordinals))
        return [
            CredibleRegion(tuple(itertools.islice(tokens, count)), area_km2, mass)
            for count, area_km2, mass in zip(
                chosen.counts.tolist(), chosen.area_km2.tolist(), chosen.masses.tolist(), strict=True
            )
        ]


def _with_point_estimator(bundle: Bundle, point_estimator: PointEstimator) -> Bundle:
    manifest = bundle.manifest
    if point_estimator == "kernel_density" and manifest.gallery is None:
        raise UsageError(
            f"index version {manifest.name!r} has no gallery, which kernel_density needs; use leaf or posterior_mean"
        )
    if point_estimator == manifest.point_estimator:
        return bundle
    # The map of masses tells how often the bundle's own circles hold the truth, which says nothing of other ones.
    calibration = manifest.calibration and manifest.calibration.model_copy(
        update={"confidence_levels": (), "posterior_masses": ()}
    )
    return replace(
        bundle,
        manifest=manifest.model_copy(update={"point_estimator": point_estimator, "calibration": calibration}),
    )


def _h3_cell(latitude_deg: float, longitude_deg: float, resolution: int | None) -> str | None:
    return None if resolution is None else h3.latlng_to_cell(latitude_deg, longitude_deg, resolution)


def _unit_rows(embeddings: NDArray[np.floating]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Rows (n, d) scaled to unit length, and (n,) which of them can be: the others are zero or not finite."""
    rows = np.array(embeddings, dtype=np.float64)
    largest = np.abs(rows).max(axis=1)
    usable = (largest > 0.0) & (largest < math.inf)
    if not usable.all():
        rows[~usable] = largest[~usable] = 1.0
    # Squares of very large or small values would leave the range of float64.
    rows /= largest[:, np.newaxis]
    lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    return (rows / lengths[:, np.newaxis]).astype(np.float32), usable


def _with_image_timings(result: Location | InputError, decode_ms: float, encode_ms: float) -> Location | InputError:
    if isinstance(result, InputError):
        return result
    return replace(result, timings=replace(result.timings, decode_ms=decode_ms, encode_ms=encode_ms))


def _find_leaf_ranges(
    tree: CellTree,
    leaf_cells: tuple[NDArray[np.uint64], NDArray[np.uint64]] | None,
    index_version: str,
    tokens: tuple[str, ...],
) -> _Ranges:
    """Merged half-open ranges of the leaves inside any of the cells.

    Args:
        tree: The cells.
        leaf_cells: Where these are cells of a grid, the first and last id of the finest resolution inside each leaf: a
            region may then name any cell of the grid, and one that is smaller than the leaf around it stands for it.
        index_version: To name in errors.
        tokens: The cells of the region.
    """
    if tree.grid is None or leaf_cells is None:
        found = [_leaf_range(tree, token, index_version) for token in tokens]
    else:
        try:
            smallest, largest = tree.grid.id_range(tree.grid.token_to_id(tokens))
        except ValueError as error:
            raise RegionCellUnknownError(
                f"the region names a cell that index version {index_version!r} does not have: {error}; tokens of its "
                "cells come with every answer's path"
            ) from error
        # Leaves stand in the order of the grid, along which everything inside a cell is one range of ids.
        starts = np.searchsorted(leaf_cells[1], smallest, side="left").tolist()
        found = list(zip(starts, np.searchsorted(leaf_cells[0], largest, side="right").tolist(), strict=True))
    merged = merge_ranges(found, tree.cell_counts[-1])
    if not merged:
        named = ", ".join(tokens[:5]) + (", ..." if len(tokens) > 5 else "")
        raise RegionEmptyError(
            f"the region ({named}) holds no leaf of index version {index_version!r}: there is no training data in its "
            "cells; use other or larger cells"
        )
    return tuple(merged)


def _leaf_range(tree: CellTree, token: str, index_version: str) -> tuple[int, int]:
    try:
        cell = tree.find(token)
    except CellUnknownError as error:
        raise RegionCellUnknownError(
            f"the region names the cell {token!r}, which index version {index_version!r} does not have; tokens of its "
            "cells come with every answer's path"
        ) from error
    return tree.leaf_range(cell.level, cell.ordinal)


def _check_integer(name: str, value: int, smallest: int, largest: int) -> None:
    try:
        inside = smallest <= operator.index(value) <= largest
    except TypeError:
        inside = False
    if not inside:
        raise OptionOutOfRangeError(f"{name} is {value!r}; it must be a whole number from {smallest} to {largest}")


def _milliseconds_since(begun: float) -> float:
    return 1000.0 * (time.perf_counter() - begun)
