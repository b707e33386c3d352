"""What makes the point of an answer, measured on held-out images, and the choice among what can."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from geosurge.bundle.manifest import PointEstimator
from geosurge.gallery import SEARCHED_LEAVES, Gallery
from geosurge.geodesy import great_circle_km
from geosurge.posterior import LeafShapes, Posteriors, infer
from geosurge_training.building.kernels import Located
from geosurge_training.building.queries import Queries
from geosurge_training.evaluation.bootstrap import DEFAULT_BOOTSTRAP

_BLOCK_SIZE: Final = 64
"""Images whose posteriors are computed together."""
_SURE: Final = 0.95


@dataclass(frozen=True)
class Estimates:
    """What one point estimator answers to n queries.

    Attributes:
        error_km: (n,) distances of the points from the truth.
        mass: (n,) posterior masses that are nearer to the points than the truth is.
        confidence: (n,) probabilities of the likeliest leaves.
    """

    error_km: npt.NDArray[np.float64]
    mass: npt.NDArray[np.float64]
    confidence: npt.NDArray[np.float64]

    @property
    def median_km(self) -> float:
        """Median error."""
        return float(np.median(self.error_km))


@dataclass(frozen=True)
class Estimation:
    """How scores become posteriors and points.

    Attributes:
        leaves: The leaves of the index.
        temperature: Divides the scores.
        gallery: The bundle's references, if it has any.
    """

    leaves: LeafShapes
    temperature: float
    gallery: Gallery | None

    def estimate(self, queries: Queries, point: PointEstimator) -> Estimates:
        """What a point estimator answers."""
        parts = []
        for block, inferred in self._posteriors(queries):
            posteriors = inferred
            if point == "posterior_mean":
                posteriors = infer(block.ordinals, block.scores, self.leaves, self.temperature, point)
            elif point == "kernel_density" and self.gallery is not None:
                points = self.gallery.points(block.embeddings, inferred, self.leaves)
                posteriors = inferred.around(points, self.leaves)
            answers = posteriors.latitude_deg, posteriors.longitude_deg
            error_km = great_circle_km(*answers, block.latitude_deg, block.longitude_deg)
            parts.append((error_km, posteriors.mass_within(error_km), posteriors.probabilities[:, 0]))
        return Estimates(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def densities(self, queries: Queries, gallery: Gallery) -> list[Located]:
        """What the densities of queries are made of, some queries at a time, to fit a kernel to."""
        return [
            Located(
                gallery.components(block.embeddings, posteriors, self.leaves), block.latitude_deg, block.longitude_deg
            )
            for block, posteriors in self._posteriors(queries)
        ]

    def _posteriors(self, queries: Queries) -> Iterator[tuple[Queries, Posteriors]]:
        """The queries, some at a time, with their posteriors around the likeliest leaves."""
        # As many leaves as the locator asks a gallery about, so that the points are those that it will answer.
        shown = 1 if self.gallery is None else SEARCHED_LEAVES
        for start in range(0, len(queries), _BLOCK_SIZE):
            block = queries.cut(start, start + _BLOCK_SIZE)
            yield block, infer(block.ordinals, block.scores, self.leaves, self.temperature, "leaf", shown=shown)


def choose_estimator(
    fitted: Mapping[PointEstimator, Estimates], tested: Mapping[PointEstimator, Estimates]
) -> PointEstimator:
    """The point estimator of a bundle: the likeliest leaf, unless refinement helps.

    `posterior_mean` has nothing of its own that is fitted, and is compared on the larger part. The kernel of
    `kernel_density` was fitted to that part and would win on it for that alone; it is compared on the other, with what
    was better of the two.

    OURS: to help is to have the smaller median error in 95 % of the bootstrap resamples of the images, the same for
    both. Chance alone would turn on every second refinement that does nothing.

    Args:
        fitted: What each estimator answers to the images that the kernel was fitted to.
        tested: And to others.

    Returns:
        One of the estimators given.
    """
    best: PointEstimator = "leaf"
    if _helps(fitted["posterior_mean"], fitted["leaf"]):
        best = "posterior_mean"
    if "kernel_density" in tested and _helps(tested["kernel_density"], tested[best]):
        best = "kernel_density"
    return best


def _helps(refined: Estimates, plain: Estimates) -> bool:
    medians = [DEFAULT_BOOTSTRAP.medians(estimates.error_km) for estimates in (refined, plain)]
    return bool(np.mean(medians[0] < medians[1]) >= _SURE)
