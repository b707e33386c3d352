"""Fits what turns scores into probabilities, on held-out images: temperature, radius map and point estimator."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from geosurge.bundle import open_bundle, replace_file, verify_bundle
from geosurge.cells import CellTree
from geosurge.encoder import ImageEncoder
from geosurge.errors import ConfigurationError
from geosurge.geodesy import great_circle_km
from geosurge.locator import REACHED_LEAVES
from geosurge.manifest import ENCODER_DIRECTORY, MANIFEST_FILE, CalibrationInfo, render_manifest
from geosurge.posterior import (
    LeafShapes,
    Posteriors,
    expected_calibration_error,
    fit_recalibration,
    fit_temperature,
    infer,
    leaf_shapes,
)
from geosurge.search import HierarchicalIndex
from geosurge_training.build import bundle_path
from geosurge_training.fit import PARTITION_FILE, claim_run
from geosurge_training.partition import Partition
from geosurge_training.progress import track
from geosurge_training.recipe import Recipe
from geosurge_training.sources import open_source

_LOGGER = logging.getLogger(__name__)
_BATCH_SIZE = 256
PointEstimator = Literal["leaf", "posterior_mean"]


@dataclass(frozen=True)
class _Query:
    """One held-out image: the leaves that the beam reached, and the truth.

    Attributes:
        ordinals: (m,) leaves, best first.
        scores: (m,) their composite scores.
        latitude_deg: True latitude.
        longitude_deg: True longitude.
        true_leaf: Ordinal of the leaf that holds the truth; -1 where none does.
    """

    ordinals: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    latitude_deg: float
    longitude_deg: float
    true_leaf: int

    @property
    def true_position(self) -> int:
        """Position of the true leaf among those reached; -1 where it was not."""
        found = np.flatnonzero(self.ordinals == self.true_leaf)
        return int(found[0]) if self.true_leaf >= 0 and len(found) else -1


def calibrate(recipe: Recipe, run: Path) -> CalibrationInfo:
    """Calibrates the bundle that `build` left in a run, and writes the result into its manifest.

    Two thirds of the held-out images fit: the temperature by likelihood of the true leaf, then the point estimator by
    median error, then the map from nominal to actual posterior mass (`posterior.fit_recalibration`). The last third
    measures the expected calibration error that goes into the manifest.

    Args:
        recipe: The run's recipe.
        run: Directory of the run.

    Returns:
        The calibration, as written.

    Raises:
        ConfigurationError: There are too few held-out images, or the run is another recipe's.
        BundleError: The bundle is missing or damaged.
    """
    bundle = open_bundle(bundle_path(recipe, run))
    claim_run(recipe, run)
    for problem in verify_bundle(bundle.path).problems:
        raise problem.error
    encoder = ImageEncoder.load(bundle.path / ENCODER_DIRECTORY, recipe.training.device)
    partition = Partition.load(run / PARTITION_FILE)
    with CellTree.open(bundle.tree_path) as tree, HierarchicalIndex.open(bundle.level_paths) as index:
        columns = tree.leaves
        leaves = leaf_shapes(columns.latitude_deg, columns.longitude_deg, columns.spread_km, columns.area_km2)
        queries = _queries(recipe, encoder, index, partition)
        if len(queries) < 30:
            raise ConfigurationError(f"{len(queries)} held-out images are too few to calibrate on; 30 is the least")
        fitting, testing = queries[: len(queries) * 2 // 3], queries[len(queries) * 2 // 3 :]
        temperature = fit_temperature([(query.scores, query.true_position) for query in fitting])
        errors = {point: _median_error(fitting, leaves, temperature, point) for point in get_args(PointEstimator)}
        point = min(errors, key=lambda name: errors[name])
        _LOGGER.info("temperature %.4g; median error in km by point estimator: %s", temperature, errors)
        masses = [_mass_at_truth(query, leaves, temperature, point) for query in fitting]
        confidence_levels, posterior_masses = fit_recalibration(masses)
        calibration = CalibrationInfo(
            temperature=temperature,
            confidence_levels=confidence_levels,
            posterior_masses=posterior_masses,
            expected_calibration_error=_calibration_error(testing, leaves, temperature),
            sample_count=len(fitting),
            source=f"{len(queries)} held-out images of {recipe.data.source}, seed {recipe.calibration.seed}",
        )
    manifest = bundle.manifest.model_copy(update={"calibration": calibration, "point_estimator": point})
    # Only the manifest changes: hashing the other files anew would pass off damage as what was built.
    _, data = render_manifest(manifest)
    replace_file(bundle.path / MANIFEST_FILE, data)
    return calibration


def _queries(recipe: Recipe, encoder: ImageEncoder, index: HierarchicalIndex, partition: Partition) -> list[_Query]:
    section = recipe.calibration
    width = recipe.bundle.default_beam_width
    queries: list[_Query] = []
    with track("calibrate", -(-section.count // _BATCH_SIZE)) as progress:
        for batch in open_source(recipe, encoder).held_out(section.count, section.seed, _BATCH_SIZE):
            hits = index.search(encoder.encode(batch.pixels.numpy()), width=width, k=REACHED_LEAVES)
            true_leaves = partition.assign(batch.latitude_deg, batch.longitude_deg)[:, -1]
            for row, true_leaf in enumerate(true_leaves.tolist()):
                reached = hits.ordinals[row] >= 0
                place = float(batch.latitude_deg[row]), float(batch.longitude_deg[row])
                queries.append(_Query(hits.ordinals[row][reached], hits.scores[row][reached], *place, true_leaf))
            progress.advance()
    return queries


def _infer(query: _Query, leaves: LeafShapes, temperature: float, point: PointEstimator) -> Posteriors:
    return infer(query.ordinals[np.newaxis], query.scores[np.newaxis], leaves, temperature, point=point)


def _error_km(query: _Query, posterior: Posteriors) -> float:
    latitude_deg, longitude_deg = posterior.latitude_deg[0], posterior.longitude_deg[0]
    return float(great_circle_km(latitude_deg, longitude_deg, query.latitude_deg, query.longitude_deg))


def _median_error(queries: list[_Query], leaves: LeafShapes, temperature: float, point: PointEstimator) -> float:
    return float(np.median([_error_km(query, _infer(query, leaves, temperature, point)) for query in queries]))


def _mass_at_truth(query: _Query, leaves: LeafShapes, temperature: float, point: PointEstimator) -> float:
    posterior = _infer(query, leaves, temperature, point)
    return float(posterior.mass_within(_error_km(query, posterior))[0])


def _calibration_error(queries: list[_Query], leaves: LeafShapes, temperature: float) -> float:
    """Expected calibration error of the best leaf's probability."""
    best = [float(_infer(query, leaves, temperature, "leaf").probabilities.max()) for query in queries]
    return expected_calibration_error(best, [query.true_position == 0 for query in queries])
