"""Measures a bundle on images whose coordinates are known, through the same locator that serves it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from geosurge.cells import CellTree
from geosurge.errors import ConfigurationError, InputError
from geosurge.geodesy import cell_id_range, great_circle_km, latlng_to_cell_id
from geosurge.images import read_image_bytes
from geosurge.location import LocateOptions, Location
from geosurge.locator import REACHED_LEAVES, Locator
from geosurge.search import LeafHits
from geosurge_training.blue_marble import BlueMarble
from geosurge_training.bootstrap import DEFAULT_BOOTSTRAP, Bootstrap
from geosurge_training.datasets import Benchmark, Dataset
from geosurge_training.metrics import Figures, LeafOutcomes, Outcomes, same_places, search_area_km2, summarise
from geosurge_training.places import nearest_places
from geosurge_training.progress import track
from geosurge_training.published import published_results

_LOGGER = logging.getLogger(__name__)
BLUE_MARBLE = "blue_marble"
"""How the training of a bundle is described when its data was the Blue Marble world."""
_BATCH_SIZE = 64
_LeafFinder: TypeAlias = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.int64]]


@dataclass(frozen=True)
class Evaluation:
    """Figures of one bundle on one set of images.

    Attributes:
        index_version: Name of the bundle.
        material: What it was measured on.
        benchmark: The published benchmark that this is, if any.
        exact: Every leaf was scored instead of a beam's.
        figures: The figures, over the images that could be located.
        outcomes: What they were computed from.
        bootstrap: How the intervals were resampled.
        failures: How many images could not be located, by the reason of the error.
    """

    index_version: str
    material: str
    benchmark: Benchmark | None
    exact: bool
    figures: Figures
    outcomes: Outcomes
    bootstrap: Bootstrap
    failures: dict[str, int]

    @property
    def failed(self) -> int:
        """Images that could not be located; they are in none of the figures."""
        return sum(self.failures.values())

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON-ready values: each with its `interval` beside it."""
        published = [] if self.benchmark is None else published_results(self.benchmark.name)
        return {
            "index_version": self.index_version,
            "material": self.material,
            "benchmark": None if self.benchmark is None else self.benchmark.name,
            "exact": self.exact,
            **asdict(self.figures),
            "failed": self.failed,
            "failures": self.failures,
            "bootstrap": asdict(self.bootstrap),
            "published": [asdict(result) for result in published],
        }


def evaluate_views(
    bundle: Path,
    *,
    views: int,
    seed: int,
    exact: bool = False,
    device: str = "cpu",
    bootstrap: Bootstrap = DEFAULT_BOOTSTRAP,
) -> Evaluation:
    """Locates held-out views of the Blue Marble world.

    Args:
        bundle: Bundle or store; it must have been trained on that world.
        views: Number of views.
        seed: Seed of the views.
        exact: Search every leaf instead of the bundle's default beam.
        device: Torch device of the encoder.
        bootstrap: How intervals are resampled.

    Returns:
        The figures.

    Raises:
        BundleError: The bundle cannot be used.
        ConfigurationError: The bundle was trained on something else, or the maps or the places are not installed.
    """
    with Locator.open(bundle, device) as locator:
        if not locator.manifest.domain.training.startswith(BLUE_MARBLE):
            raise ConfigurationError(
                f"index version {locator.index_version!r} was not trained on the Blue Marble world but on "
                f"{locator.manifest.domain.training!r}; evaluate it on pictures with --dataset"
            )
        tally = _Tally(locator, exact=exact)
        world = BlueMarble(locator.encoder.image_size)
        with track("evaluate", -(-views // _BATCH_SIZE)) as progress:
            for batch in world.held_out(views, seed, _BATCH_SIZE):
                tally.add(list(batch.pixels.numpy()), batch.latitude_deg, batch.longitude_deg)
                progress.advance()
        return tally.evaluation(f"held-out views of the Blue Marble world, seed {seed}", None, bootstrap)


def evaluate_images(
    bundle: Path,
    dataset: Dataset,
    *,
    exact: bool = False,
    device: str = "cpu",
    bootstrap: Bootstrap = DEFAULT_BOOTSTRAP,
) -> Evaluation:
    """Locates pictures on disk whose coordinates are known.

    They should be none that the bundle was trained or calibrated on.

    Args:
        bundle: Bundle or store.
        dataset: The pictures.
        exact: Search every leaf instead of the bundle's default beam.
        device: Torch device of the encoder.
        bootstrap: How intervals are resampled.

    Returns:
        The figures over the pictures that could be located; the others are logged, and counted in `failures`.

    Raises:
        BundleError: The bundle cannot be used.
        EncoderMissingError: It has no encoder.
        ConfigurationError: No picture could be located, or the places are not installed.
    """
    with Locator.open(bundle, device) as locator, ThreadPoolExecutor(max_workers=4) as pool:
        tally = _Tally(locator, exact=exact)
        with track("evaluate", -(-len(dataset.images) // _BATCH_SIZE)) as progress:
            for start in range(0, len(dataset.images), _BATCH_SIZE):
                rows = slice(start, start + _BATCH_SIZE)
                pixels = list(pool.map(lambda path: _pixels(locator, path), dataset.images[rows]))
                tally.add(pixels, dataset.latitude_deg[rows], dataset.longitude_deg[rows])
                progress.advance()
        return tally.evaluation(dataset.title, dataset.benchmark, bootstrap)


def _pixels(locator: Locator, path: Path) -> NDArray[np.uint8] | InputError:
    try:
        return locator.preprocess(read_image_bytes(path, locator.limits))
    except InputError as error:
        _LOGGER.warning("%s is not located: %s", path, error)
        return error


class _Tally:
    """Answers and truths, collected batch by batch."""

    def __init__(self, locator: Locator, *, exact: bool) -> None:
        # A bundle without an encoder must not look like one on which every image fails.
        self._encoder = locator.encoder
        self._locator = locator
        self._options = LocateOptions(top_k=1, exact=exact)
        self._find_leaf = _leaf_finder(locator.tree)
        self._answers: list[Location] = []
        self._truths: list[tuple[float, float]] = []
        self._leaves: list[LeafOutcomes] = []
        self._failures: Counter[str] = Counter()

    def add(
        self,
        pixels: Sequence[NDArray[np.uint8] | InputError],
        latitude_deg: NDArray[np.float64],
        longitude_deg: NDArray[np.float64],
    ) -> None:
        """Locates images, or counts the errors that stand in their places."""
        decoded = [item for item in pixels if not isinstance(item, InputError)]
        self._failures.update(item.reason for item in pixels if isinstance(item, InputError))
        if not decoded:
            return
        rows = [row for row, item in enumerate(pixels) if not isinstance(item, InputError)]
        embeddings = self._encoder.encode(np.stack(decoded))
        located: list[int] = []
        for position, answer in enumerate(self._locator.locate_embeddings(embeddings, [self._options] * len(rows))):
            if isinstance(answer, InputError):
                _LOGGER.warning("an image is not located: %s", answer)
                self._failures[answer.reason] += 1
                continue
            located.append(position)
            self._answers.append(answer)
            self._truths.append((float(latitude_deg[rows[position]]), float(longitude_deg[rows[position]])))
        if located and self._find_leaf is not None:
            truths = np.array(self._truths[-len(located) :])
            true_leaves = self._find_leaf(truths[:, 0], truths[:, 1])
            probabilities = np.array([answer.probability for answer in self._answers[-len(located) :]])
            self._leaves.append(self._leaf_outcomes(embeddings[located], true_leaves, probabilities))

    def evaluation(self, material: str, benchmark: Benchmark | None, bootstrap: Bootstrap) -> Evaluation:
        """The figures of all images added."""
        if not self._answers:
            raise ConfigurationError(
                f"none of {self._failures.total()} pictures could be located; the log says why of each"
            )
        outcomes = self._outcomes()
        return Evaluation(
            index_version=self._locator.index_version,
            material=material,
            benchmark=benchmark,
            exact=self._options.exact,
            figures=summarise(outcomes, bootstrap),
            outcomes=outcomes,
            bootstrap=bootstrap,
            failures=dict(self._failures),
        )

    def _outcomes(self) -> Outcomes:
        estimates = np.array([(answer.latitude_deg, answer.longitude_deg) for answer in self._answers])
        truths = np.array(self._truths)
        try:
            same_place = same_places(nearest_places(*estimates.T), nearest_places(*truths.T))
        except ImportError as error:
            raise ConfigurationError(str(error)) from error
        return Outcomes(
            error_km=great_circle_km(*estimates.T, *truths.T),
            radius_km=np.array([answer.radius_km for answer in self._answers]),
            radius_confidence=self._options.confidence_level,
            same_place=same_place,
            leaves=_join(self._leaves) if self._leaves else None,
        )

    def _leaf_outcomes(
        self, embeddings: NDArray[np.float32], true_leaves: NDArray[np.int64], probabilities: NDArray[np.float64]
    ) -> LeafOutcomes:
        hits = self._hits(embeddings)
        area_km2 = self._locator.tree.leaves.area_km2.take(hits.ordinals)
        log_density = hits.scores.astype(np.float64) / self._locator.calibration.temperature - np.log(area_km2)
        is_true = (hits.ordinals == true_leaves[:, np.newaxis]) & (true_leaves >= 0)[:, np.newaxis]
        positions = np.where(is_true.any(axis=1), is_true.argmax(axis=1), -1)
        return LeafOutcomes(probabilities, is_true[:, 0], search_area_km2(log_density, area_km2, positions))

    def _hits(self, embeddings: NDArray[np.float32]) -> LeafHits:
        """The leaves that the answers are made of, as the locator finds them."""
        index = self._locator.index
        if self._options.exact:
            return index.exact(embeddings, k=self._locator.tree.cell_counts[-1])
        return index.search(embeddings, width=self._locator.manifest.default_beam_width, k=REACHED_LEAVES)


def _leaf_finder(tree: CellTree) -> _LeafFinder | None:
    """A function from (n,) coordinates to (n,) ordinals of the leaves that hold them, -1 where none does.

    None for cells other than S2's: a bundle does not say which coordinates these hold.
    """
    if not tree.has_s2_cells:
        return None
    first, last = cell_id_range(tree.cell_ids(tree.level_count))

    def find(latitude_deg: NDArray[np.float64], longitude_deg: NDArray[np.float64]) -> NDArray[np.int64]:
        points = latlng_to_cell_id(latitude_deg, longitude_deg)
        # Leaves stand in the order of the Hilbert curve and do not overlap.
        rows = np.minimum(np.searchsorted(last, points), len(last) - 1)
        return np.where((first[rows] <= points) & (points <= last[rows]), rows, -1)

    return find


def _join(parts: Sequence[LeafOutcomes]) -> LeafOutcomes:
    return LeafOutcomes(
        np.concatenate([part.probability for part in parts]),
        np.concatenate([part.correct for part in parts]),
        np.concatenate([part.search_area_km2 for part in parts]),
    )
