from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from geosurge.bundle.manifest import PointEstimator
from geosurge_training.building.estimators import Estimates, choose_estimator

PLAIN = np.random.default_rng(0).lognormal(3.5, 1.0, 1200)
FITTING, TESTING = slice(0, 800), slice(800, 1200)


def estimates(errors_km: NDArray[np.float64]) -> Estimates:
    return Estimates(errors_km, np.zeros_like(errors_km), np.ones_like(errors_km))


def chosen(posterior_mean: float, kernel_fitted: float | None = None, kernel_tested: float = 1.0) -> PointEstimator:
    """The choice where the errors of refinements are those of the leaf times so much, and some noise."""
    rng = np.random.default_rng(1)

    def refined(factor: float, rows: slice) -> Estimates:
        return estimates(factor * PLAIN[rows] * rng.lognormal(0.0, 0.3, len(PLAIN[rows])))

    fitted: dict[PointEstimator, Estimates] = {"leaf": estimates(PLAIN[FITTING])}
    tested: dict[PointEstimator, Estimates] = {"leaf": estimates(PLAIN[TESTING])}
    fitted["posterior_mean"], tested["posterior_mean"] = (refined(posterior_mean, rows) for rows in (FITTING, TESTING))
    if kernel_fitted is not None:
        fitted["kernel_density"] = refined(kernel_fitted, FITTING)
        tested["kernel_density"] = refined(kernel_tested, TESTING)
    return choose_estimator(fitted, tested)


@pytest.mark.parametrize(("factor", "expected"), [(0.7, "posterior_mean"), (0.99, "leaf"), (1.3, "leaf")])
def test_the_posterior_mean_has_to_help(factor: float, expected: PointEstimator) -> None:
    assert chosen(factor) == expected


@pytest.mark.parametrize(
    ("kernel_fitted", "kernel_tested", "expected"),
    [
        (0.4, 0.4, "kernel_density"),
        # Better on what it was fitted to alone.
        (0.4, 1.0, "posterior_mean"),
        # Better than the leaf, but not than what refines without a gallery.
        (0.75, 0.75, "posterior_mean"),
        # Better by what chance alone would give.
        (0.69, 0.69, "posterior_mean"),
    ],
)
def test_a_gallery_has_to_help_on_images_that_its_kernel_was_not_fitted_to(
    kernel_fitted: float, kernel_tested: float, expected: PointEstimator
) -> None:
    assert chosen(0.7, kernel_fitted, kernel_tested) == expected
