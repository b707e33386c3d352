"""What makes a posterior hold on data that nothing was trained on; fitted to held-out queries.

**Temperature.** It divides the scores, so that the true leaves get the largest likelihood that one number can
give them (`fit_temperature`; Guo et al. 2017).

**Recalibration.** u = M(distance to the truth) is uniform where the posterior is right. Its quantiles on held-out data
map a nominal confidence to the mass that has to be enclosed for the circle to hold the truth that often
(`fit_recalibration`; Kuleshov et al. 2018). This mends what one temperature cannot: discs that are no discs, leaves
that the search misses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geosurge.geodesy import Float64Array

_RECALIBRATION_LEVELS: Final = (*(step / 20 for step in range(20)), 0.975, 0.99, 0.995, 0.999, 1.0)


@dataclass(frozen=True)
class Calibration:
    """How scores become probabilities that hold on data never trained on.

    Attributes:
        temperature: Divides the scores.
        confidence_levels: Nominal confidences, from 0 to 1, ascending; empty for no recalibration.
        posterior_masses: Mass that a circle must enclose to hold the truth with that confidence, never decreasing.
    """

    temperature: float = 1.0
    confidence_levels: tuple[float, ...] = ()
    posterior_masses: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature is {self.temperature}; it must be positive and finite")
        levels, masses = np.asarray(self.confidence_levels), np.asarray(self.posterior_masses)
        if levels.shape != masses.shape:
            raise ValueError(f"{levels.size} confidence_levels but {masses.size} posterior_masses; give one for each")
        if not levels.size:
            return
        if not (levels[0] == 0.0 and levels[-1] == 1.0 and (np.diff(levels) > 0).all()):
            raise ValueError("confidence_levels must ascend from 0 to 1")
        if not (masses[0] >= 0.0 and masses[-1] <= 1.0 and (np.diff(masses) >= 0).all()):
            raise ValueError("posterior_masses must lie in [0, 1] and never decrease")

    def mass_for_confidence(self, confidence_level: ArrayLike) -> Float64Array:
        """Posterior masses that circles must enclose to hold the truth with confidences; linear between levels."""
        confidence = np.asarray(confidence_level, dtype=np.float64)
        if not self.confidence_levels:
            return confidence
        return np.asarray(np.interp(confidence, self.confidence_levels, self.posterior_masses))


def fit_temperature(queries: Sequence[tuple[NDArray[np.floating], int]]) -> float:
    """Temperature that minimises the negative log likelihood of the true leaves of held-out queries.

    The likelihood is convex in 1 / T, so the minimum is the only one. Queries whose true leaf is not among theirs
    have no likelihood under any temperature and are left out; `fit_recalibration` is what accounts for them.

    Args:
        queries: For each query, (m,) scores of its leaves and the position of the true leaf among them, or -1.

    Returns:
        Temperature between 0.001 and 1000.

    Raises:
        ValueError: No query has its true leaf among its leaves.
    """
    # Fitting is rare, and scipy takes long to import for commands that only read a manifest.
    from scipy.optimize import minimize_scalar  # noqa: PLC0415

    shifted = []
    truths = []
    for scores, truth in queries:
        if truth >= 0:
            row = np.asarray(scores, dtype=np.float64)
            row = row - row.max()
            shifted.append(row)
            truths.append(row[truth])
    if not shifted:
        raise ValueError("no query has its true leaf among its leaves: there is nothing to fit a temperature to")
    flat = np.concatenate(shifted)
    starts = np.concatenate([[0], np.cumsum([len(row) for row in shifted])[:-1]])
    mean_truth = float(np.mean(truths))

    def negative_log_likelihood(log_temperature: float) -> float:
        inverse = math.exp(-log_temperature)
        sums = np.add.reduceat(np.exp(flat * inverse), starts)
        return float(np.log(sums).mean()) - mean_truth * inverse

    bounds = (math.log(1e-3), math.log(1e3))
    result = minimize_scalar(negative_log_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-5})
    return math.exp(float(result.x))


def fit_recalibration(masses_at_truth: ArrayLike) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Map from nominal confidence to the posterior mass that has to be enclosed for it.

    Args:
        masses_at_truth: (n,) of held-out queries: ``posterior.mass_within(distance of the estimate to the truth)``.

    Returns:
        Confidence levels and posterior masses as `Calibration` takes them: the quantiles of the masses at 0, 0.05,
        ... 0.95, 0.975, 0.99, 0.995, 0.999 and 1.

    Raises:
        ValueError: There are no masses, or one is outside [0, 1].
    """
    masses = np.asarray(masses_at_truth, dtype=np.float64)
    if not (masses.size and ((masses >= 0.0) & (masses <= 1.0)).all()):
        raise ValueError(f"recalibration needs masses in [0, 1], at least one; got {masses.size}")
    quantiles = np.quantile(masses, _RECALIBRATION_LEVELS)
    quantiles[0], quantiles[-1] = 0.0, 1.0
    return _RECALIBRATION_LEVELS, tuple(float(value) for value in quantiles)


def expected_calibration_error(confidences: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equally wide bins of confidence (Guo et al. 2017, equation 3).

    Args:
        confidences: (n,) probabilities of the answers given, in [0, 1].
        correct: (n,) whether each answer was right.
        bins: Number of bins.

    Returns:
        Error in [0, 1].
    """
    confidence = np.asarray(confidences, dtype=np.float64)
    right = np.asarray(correct, dtype=np.float64)
    if confidence.size == 0 or confidence.shape != right.shape:
        raise ValueError(f"{confidence.size} confidences and {right.size} outcomes; give one for each, at least one")
    rows = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(rows, weights=confidence - right, minlength=bins)
    return float(np.abs(gaps).sum() / confidence.size)
