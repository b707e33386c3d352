"""Fits what turns scores into probabilities, on held-out images: temperature, radius map and point estimator."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from geosurge.bundle import Bundle, open_bundle
from geosurge.bundle.manifest import (
    ENCODER_DIRECTORY,
    MANIFEST_FILE,
    CalibrationInfo,
    GalleryInfo,
    PointEstimator,
    render_manifest,
)
from geosurge.bundle.verifying import verify_bundle
from geosurge.calibration import expected_calibration_error, fit_recalibration, fit_temperature
from geosurge.cells import CellTree
from geosurge.durable_files import replace_file
from geosurge.encoder import ImageEncoder
from geosurge.errors import ConfigurationError
from geosurge.gallery import Gallery
from geosurge.posterior import leaf_shapes
from geosurge.search import HierarchicalIndex
from geosurge_training.building.embedded import EmbeddedBatch, embed
from geosurge_training.building.estimators import Estimation, choose_estimator
from geosurge_training.building.kernels import fit_kernel
from geosurge_training.building.queries import Queries, search_held_out
from geosurge_training.data.open_source import open_source
from geosurge_training.data.spots import cut_between_spots
from geosurge_training.partitions.leaf_finder import require_leaf_finder
from geosurge_training.progress import track
from geosurge_training.recipe import Recipe
from geosurge_training.run_directory import bundle_path, claim_images, claim_run

_LOGGER = logging.getLogger(__name__)
_BATCH_SIZE: Final = 256


def calibrate(recipe: Recipe, run: Path) -> CalibrationInfo:
    """Calibrates the bundle that `build` left in a run, and writes the result into its manifest.

    Two thirds of the held-out images fit: the temperature by likelihood of the true leaf, then the kernel of a gallery
    by median error, then the map from nominal to actual posterior mass (`fit_recalibration`). The last third
    measures what goes into the manifest: the expected calibration error, and the median error of each point estimator.
    Which of these makes the point is told in `estimators.choose_estimator`.

    Args:
        recipe: The run's recipe.
        run: Directory of the run.

    Returns:
        The calibration, as written.

    Raises:
        ConfigurationError: There are too few held-out images, or the run is another recipe's.
        BundleError: The bundle is missing or damaged.
    """
    path = bundle_path(recipe, run)
    open_bundle(path)
    claim_run(recipe, run)
    return calibrate_on_source(path, recipe, run)


def calibrate_on_source(path: Path, recipe: Recipe, run: Path) -> CalibrationInfo:
    """Calibrates a bundle on the held-out images of a recipe's source, as its calibration section says.

    Args:
        path: The bundle.
        recipe: The recipe that its encoder was trained with.
        run: Directory of the run, where an index of shards is kept.

    Returns:
        The calibration, as written.

    Raises:
        ConfigurationError: As in `calibrate_bundle`.
        BundleError: The bundle is missing or damaged.
    """
    section = recipe.calibration
    return calibrate_bundle(
        path,
        _held_out(path, recipe, run),
        f"{recipe.data.source}, seed {section.seed}",
        point_estimator=section.point_estimator,
    )


def calibrate_bundle(
    path: Path, held_out: Iterable[EmbeddedBatch], source: str, *, point_estimator: PointEstimator | None = None
) -> CalibrationInfo:
    """Calibrates a bundle on embedded images, as `calibrate` says, and writes the result into its manifest.

    Args:
        path: The bundle.
        held_out: Images that nothing in the bundle was fitted on, in a random order: the first two thirds fit. No spot
            is divided whose images follow each other.
        source: What they are, in words.
        point_estimator: What makes the point; by default what is best.

    Returns:
        The calibration, as written.

    Raises:
        ConfigurationError: There are too few images, the search reaches the true leaf of none, nobody knows which
            coordinates the leaves hold, or the point estimator needs a gallery and the bundle has none.
        BundleError: The bundle is missing or damaged.
    """
    for problem in verify_bundle(path).problems:
        raise problem.error
    bundle = open_bundle(path)
    if point_estimator == "kernel_density" and bundle.manifest.gallery is None:
        raise ConfigurationError(
            "calibration.point_estimator is kernel_density, but the bundle has no gallery: set bundle.gallery_size and "
            "build it again"
        )
    fit = _fit(bundle, held_out, source, point_estimator)
    _LOGGER.info("median error in km: %s; %s", fit.calibration.median_error_km, fit.point_estimator)
    # Only the manifest changes: hashing the other files anew would pass off damage as what was built.
    _, data = render_manifest(
        bundle.manifest.model_copy(
            update={"calibration": fit.calibration, "point_estimator": fit.point_estimator, "gallery": fit.gallery}
        )
    )
    replace_file(bundle.path / MANIFEST_FILE, data)
    return fit.calibration


@dataclass(frozen=True)
class _Fit:
    """What the manifest gets."""

    calibration: CalibrationInfo
    point_estimator: PointEstimator
    gallery: GalleryInfo | None


def _fit(bundle: Bundle, held_out: Iterable[EmbeddedBatch], source: str, asked: PointEstimator | None) -> _Fit:
    with contextlib.ExitStack() as stack:
        tree = stack.enter_context(CellTree.open(bundle.tree_path))
        index = stack.enter_context(HierarchicalIndex.open(bundle.level_paths))
        gallery = None
        if bundle.manifest.gallery is not None:
            gallery = stack.enter_context(contextlib.closing(Gallery.open(bundle)))
        queries = search_held_out(held_out, index, bundle.manifest.default_beam_width, require_leaf_finder(tree))
        split = cut_between_spots(queries.latitude_deg, queries.longitude_deg, len(queries) * 2 // 3)
        fitting, testing = queries.cut(0, split), queries.cut(split, len(queries))
        cells = tree.leaves
        leaves = leaf_shapes(cells.latitude_deg, cells.longitude_deg, cells.spread_km, cells.area_km2)
        estimation = Estimation(leaves, _fit_temperature(fitting), gallery)
        estimators: list[PointEstimator] = ["leaf", "posterior_mean"]
        if gallery is not None:
            gallery.info = gallery.info.with_kernel(fit_kernel(estimation.densities(fitting, gallery)))
            estimators.append("kernel_density")
        fitted = {name: estimation.estimate(fitting, name) for name in estimators}
        tested = {name: estimation.estimate(testing, name) for name in estimators}
    point = asked or choose_estimator(fitted, tested)
    confidence_levels, posterior_masses = fit_recalibration(fitted[point].mass)
    calibration = CalibrationInfo(
        temperature=estimation.temperature,
        confidence_levels=confidence_levels,
        posterior_masses=posterior_masses,
        expected_calibration_error=expected_calibration_error(tested[point].confidence, testing.true_positions == 0),
        sample_count=len(fitting),
        source=f"{len(queries)} held-out images of {source}",
        median_error_km={name: estimates.median_km for name, estimates in tested.items()},
    )
    return _Fit(calibration, point, None if gallery is None else gallery.info)


def _fit_temperature(queries: Queries) -> float:
    rows = zip(queries.scores, queries.true_positions.tolist(), strict=True)
    return fit_temperature([(scores[np.isfinite(scores)], truth) for scores, truth in rows])


def _held_out(path: Path, recipe: Recipe, run: Path) -> Iterator[EmbeddedBatch]:
    # A generator: the encoder is not read before the bundle is known to be whole.
    encoder, section = ImageEncoder.load(path / ENCODER_DIRECTORY, recipe.training.device), recipe.calibration
    source = open_source(recipe, encoder, run)
    claim_images(source, run)
    images = source.held_out(section.count, section.seed, _BATCH_SIZE)
    with track("calibrate", -(-section.count // _BATCH_SIZE)) as progress:
        for batch in embed(images, encoder):
            yield batch
            progress.advance()
