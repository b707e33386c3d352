"""From leaf scores to an answer with its uncertainty: one query at a time, plain numpy.

The posterior of a query is a mixture over the m leaves that the search returned.

**Weights.** A leaf's score s_i is the logarithm of its product of probabilities up to one constant a query, so

    p_i = exp(s_i / T) / sum_j exp(s_j / T)

with the temperature T fitted on held-out data (`fit_temperature`; Guo et al. 2017). The mass of a cell of any level
is the sum over the leaves under it, so a parent's mass is the sum of its children's.

**Shape.** Within its leaf, the truth is spread uniformly over a disc around the leaf's mean. A uniform disc of radius
R has a root-mean-square radius of R / sqrt(2), so the leaf's spread sets R = sqrt(2) * spread, and
`MIN_DISC_RADIUS_KM` at least.

**Point.** Starting at the most likely leaf, x moves to the posterior-weighted mean of the leaves within w of it until
they stay the same. No step increases the expectation of min(|x - leaf|², w²) (chords of the unit sphere), so x is a
local minimum of the expected squared error capped at w: leaves next to each other share the answer, a distant second
mode does not pull it into the sea between. w is `WINDOW_SPREADS` times the spread of the most likely leaf.

**Radius.** The mass within r of x is

    M(r) = sum_i p_i * area(disc_i ∩ circle(x, r)) / area(disc_i)

with great-circle distances between x and the discs, and the lens of two circles in the plane: discs are small against
the Earth. M is monotone; its inverse is rounded up to the next radius of a geometric series (0.05 % apart), so that a
radius never decreases with the mass asked for and always holds it.

**Recalibration.** u = M(distance to the truth) is uniform where the posterior is right. Its quantiles on held-out data
map a nominal confidence to the mass that has to be enclosed for the circle to hold the truth that often
(`fit_recalibration`; Kuleshov et al. 2018). This mends what one temperature cannot: discs that are no discs, leaves
that the search misses.

**Cost.** Linear in m apart from three sorts; nothing is stored but `LeafShapes`, 48 bytes a leaf. Leaves that
together hold less than `NEGLIGIBLE_MASS` count as outside of every circle and region.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geosurge.geodesy import EARTH_RADIUS_KM, latlng_to_unit_vector, unit_vector_to_latlng

Float64Array: TypeAlias = NDArray[np.float64]
Int64Array: TypeAlias = NDArray[np.int64]

PointEstimate: TypeAlias = Literal["posterior_mean", "leaf"]
"""`posterior_mean`: see the module; `leaf`: the mean coordinate of the most likely leaf."""

WINDOW_SPREADS: Final = 6.0
"""Window of the point estimate, in spreads. A square cell of evenly spread samples has the spread 0.41 sides, so six
reach the cells around it also where those are an S2 level coarser."""

MIN_DISC_RADIUS_KM: Final = 1e-3
"""A leaf whose samples all lie on one spot is a disc of one metre."""

NEGLIGIBLE_MASS: Final = 1e-6

HALF_CIRCUMFERENCE_KM: Final = math.pi * EARTH_RADIUS_KM

_RADIUS_STEP: Final = math.log1p(5e-4)
_MIN_RADIUS_KM: Final = 1e-4
_MAX_MEAN_STEPS: Final = 50
_RECALIBRATION_LEVELS: Final = (*(step / 20 for step in range(20)), 0.975, 0.99, 0.995, 0.999, 1.0)


@dataclass(frozen=True)
class LeafShapes:
    """All leaves of an index as discs.

    Attributes:
        unit_vectors: (n, 3) directions of the leaves' means.
        spread_km: (n,) root-mean-square distances of the samples to the mean.
        area_km2: (n,) areas of the cells.
    """

    unit_vectors: Float64Array
    spread_km: Float64Array
    area_km2: Float64Array


@dataclass(frozen=True)
class Posterior:
    """What is known of one query's location. Arrays are in the order of the leaves given, most likely first.

    Attributes:
        ordinals: (m,) leaf ordinals.
        probabilities: (m,) probabilities that sum to one.
        latitude_deg: Latitude of the point estimate.
        longitude_deg: Longitude of the point estimate.
        unit_vector: (3,) direction of the point estimate.
        distance_km: (m,) great-circle distances of the leaves' means to the point estimate.
        disc_radius_km: (m,) radii of the leaves' discs.
        area_km2: (m,) areas of the leaves.
    """

    ordinals: Int64Array
    probabilities: Float64Array
    latitude_deg: float
    longitude_deg: float
    unit_vector: Float64Array
    distance_km: Float64Array
    disc_radius_km: Float64Array
    area_km2: Float64Array

    def mass_within(self, radius_km: float) -> float:
        """Posterior mass within a great-circle distance of the point estimate; see `mass_within`."""
        return mass_within(radius_km, self.probabilities, self.distance_km, self.disc_radius_km)

    def radius_km(self, mass: float) -> float:
        """Radius around the point estimate that holds a mass; see `radius_for_mass`."""
        return radius_for_mass(mass, self.probabilities, self.distance_km, self.disc_radius_km)

    def credible_leaves(self, mass: float) -> Int64Array:
        """(k,) positions, in this posterior, of the leaves that hold a mass on least area; see `credible_leaves`."""
        return credible_leaves(mass, self.probabilities, self.area_km2)


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

    def mass_for_confidence(self, confidence_level: float) -> float:
        """Posterior mass that a circle must enclose to hold the truth with a confidence; linear between levels."""
        if not self.confidence_levels:
            return confidence_level
        return float(np.interp(confidence_level, self.confidence_levels, self.posterior_masses))


def leaf_shapes(
    latitude_deg: ArrayLike, longitude_deg: ArrayLike, spread_km: ArrayLike, area_km2: ArrayLike
) -> LeafShapes:
    """Prepares the leaves of an index, once, for `infer`.

    Args:
        latitude_deg: (n,) latitudes of the means.
        longitude_deg: (n,) longitudes of the means.
        spread_km: (n,) root-mean-square distances of the samples to the mean.
        area_km2: (n,) areas of the cells.
    """
    return LeafShapes(
        latlng_to_unit_vector(latitude_deg, longitude_deg),
        np.asarray(spread_km, dtype=np.float64),
        np.asarray(area_km2, dtype=np.float64),
    )


def infer(
    ordinals: Int64Array,
    scores: NDArray[np.floating],
    leaves: LeafShapes,
    temperature: float = 1.0,
    point: PointEstimate = "posterior_mean",
) -> Posterior:
    """Turns the leaves that a search returned into a posterior.

    Args:
        ordinals: (m,) ordinals of the leaves, best first, m at least 1, no padding.
        scores: (m,) composite inner products, descending.
        leaves: The leaves of the index.
        temperature: Divides the scores.
        point: How the point estimate is made.

    Returns:
        The posterior over these leaves alone: see `leaf_posterior` for what that means after a beam search.
    """
    probabilities = leaf_posterior(scores, temperature)
    vectors = leaves.unit_vectors[ordinals]
    spread_km = leaves.spread_km[ordinals]
    estimate = vectors[0]
    if point == "posterior_mean":
        estimate = posterior_mean(probabilities, vectors, WINDOW_SPREADS * float(spread_km[0]))
    latitude_deg, longitude_deg = unit_vector_to_latlng(estimate)
    return Posterior(
        ordinals=ordinals,
        probabilities=probabilities,
        latitude_deg=float(latitude_deg),
        longitude_deg=float(longitude_deg),
        unit_vector=estimate,
        distance_km=_distances_km(vectors, estimate),
        disc_radius_km=disc_radius_km(spread_km),
        area_km2=leaves.area_km2[ordinals],
    )


def leaf_posterior(scores: NDArray[np.floating], temperature: float = 1.0) -> Float64Array:
    """Probabilities of leaves: the softmax of their scores over a temperature.

    The normaliser runs over the leaves given. With all leaves (exact search) the result is the posterior. With those
    that a beam reached it is an upper bound leaf by leaf, p_beam >= p_exact, because the leaves left out are missing
    from the sum; the two agree as far as the beam holds the mass. Never pass only the few leaves that will be shown.

    Args:
        scores: (m,) composite inner products; -inf has probability zero.
        temperature: Positive.

    Returns:
        (m,) float64, sum one.
    """
    row = np.asarray(scores, dtype=np.float64)
    # A score divided by a temperature of almost nothing would leave the range of float64.
    weights = np.exp((row - row.max()) / temperature)
    return np.asarray(weights / weights.sum())


def path_masses(probabilities: Float64Array, ordinals: Int64Array, leaf_ranges: ArrayLike) -> Float64Array:
    """Posterior mass under cells.

    Args:
        probabilities: (m,) probabilities.
        ordinals: (m,) their leaf ordinals.
        leaf_ranges: (c, 2) half-open ranges of leaf ordinals, one for each cell (the descendants of a cell are
            contiguous).

    Returns:
        (c,) masses.
    """
    ranges = np.asarray(leaf_ranges, dtype=np.int64)
    inside = (ordinals >= ranges[:, :1]) & (ordinals < ranges[:, 1:])
    # A mass of one must not read 1.0000000000000002.
    return np.minimum(inside @ probabilities, 1.0)


def posterior_mean(probabilities: Float64Array, unit_vectors: Float64Array, window_km: float) -> Float64Array:
    """Mean of the leaves around the most likely one: a local minimum of the expected squared error capped at a window.

    Args:
        probabilities: (m,) probabilities, the largest first.
        unit_vectors: (m, 3) directions of the leaves' means.
        window_km: Leaves farther than this from the current point do not move it. `MIN_DISC_RADIUS_KM` at least: a leaf
            whose samples all lie on one spot has no spread, and rounding would put it outside of a window of nothing.

    Returns:
        (3,) unit vector.
    """
    window_km = max(window_km, MIN_DISC_RADIUS_KM)
    window_chord = 2.0 * math.sin(min(window_km / EARTH_RADIUS_KM, math.pi / 2) / 2.0)
    point = unit_vectors[0]
    members = np.zeros(len(probabilities), dtype=bool)
    for _ in range(_MAX_MEAN_STEPS):
        offsets = unit_vectors - point
        near = np.einsum("ij,ij->i", offsets, offsets) <= window_chord**2
        if np.array_equal(near, members):
            break
        members = near
        mean = probabilities[near] @ unit_vectors[near]
        point = mean / math.sqrt(float(mean @ mean))
    return np.asarray(point)


def disc_radius_km(spread_km: ArrayLike) -> Float64Array:
    """Radius of the uniform disc whose root-mean-square radius is a leaf's spread."""
    return np.maximum(math.sqrt(2.0) * np.asarray(spread_km, dtype=np.float64), MIN_DISC_RADIUS_KM)


def disc_fraction_within(radius_km: ArrayLike, distance_km: ArrayLike, disc_radius_km: ArrayLike) -> Float64Array:
    """Share of a disc's area that lies within a circle, in the plane.

    The lens of circles of radius r and R at distance d is two circular segments, R²(a - sin a cos a) + r²(b - sin b
    cos b), with the half angles a and b under which the centres see the common chord.

    Args:
        radius_km: Radii r of the circle.
        distance_km: Distances d of the centres.
        disc_radius_km: Radii R of the discs, positive.

    Returns:
        Shares in [0, 1] of the broadcast shape.
    """
    r, d, disc = np.broadcast_arrays(
        np.asarray(radius_km, np.float64), np.asarray(distance_km, np.float64), np.asarray(disc_radius_km, np.float64)
    )
    share = np.where(r >= d + disc, 1.0, 0.0)
    share = np.where((r < disc) & (d <= disc - r), (r / disc) ** 2, share)
    crossing = (d > np.abs(r - disc)) & (d < r + disc)
    if crossing.any():
        r, d, disc = r[crossing], d[crossing], disc[crossing]
        along = ((d - r) * (d + r) + disc * disc) / (2.0 * d)
        disc_angle = np.arccos(np.clip(along / disc, -1.0, 1.0))
        circle_angle = np.arctan2(disc * np.sin(disc_angle), d - along)
        lens = _segment(disc_angle) + (r / disc) ** 2 * _segment(circle_angle)
        share[crossing] = np.clip(lens / math.pi, 0.0, 1.0)
    return share


def mass_within(
    radius_km: float, probabilities: Float64Array, distance_km: Float64Array, disc_radius_km: Float64Array
) -> float:
    """Posterior mass within a radius of the point that distances were measured from.

    Args:
        radius_km: Great-circle radius; from half the Earth's circumference on, everything is inside.
        probabilities: (m,) probabilities.
        distance_km: (m,) distances of the leaves' means to the point.
        disc_radius_km: (m,) radii of the leaves' discs.

    Returns:
        Mass in [0, 1].
    """
    if radius_km >= HALF_CIRCUMFERENCE_KM:
        return 1.0
    return min(float(probabilities @ disc_fraction_within(radius_km, distance_km, disc_radius_km)), 1.0)


def radius_for_mass(
    mass: float, probabilities: Float64Array, distance_km: Float64Array, disc_radius_km: Float64Array
) -> float:
    """Smallest radius, rounded up by at most 0.05 %, within which a posterior mass lies.

    Args:
        mass: Mass to enclose, at most one; from ``1 - NEGLIGIBLE_MASS`` on, the least likely leaves are left out.
        probabilities: (m,) probabilities, descending.
        distance_km: (m,) distances of the leaves' means to the point.
        disc_radius_km: (m,) radii of the leaves' discs.

    Returns:
        Kilometres, at most half the Earth's circumference; never decreasing in ``mass``.
    """
    kept = _significant_count(probabilities)
    p, distance, disc = probabilities[:kept], distance_km[:kept], disc_radius_km[:kept]
    target = min(mass, 1.0 - NEGLIGIBLE_MASS)
    near, far = distance - disc, distance + disc
    # No disc that starts beyond the answer counts, every disc that ends before it does: this brackets the radius.
    lower, upper = _weighted_quantile(near, p, target), _weighted_quantile(far, p, target)
    certain = far <= lower
    base = float(p[certain].sum())
    open_discs = ~certain & (near < upper)
    p, distance, disc = p[open_discs], distance[open_discs], disc[open_discs]
    low, high = _radius_step(lower) - 1, _radius_step(upper)
    while high - low > 1:
        middle = (low + high) // 2
        if base + float(p @ disc_fraction_within(_radius_at(middle), distance, disc)) >= target:
            high = middle
        else:
            low = middle
    return min(_radius_at(high), HALF_CIRCUMFERENCE_KM)


def credible_leaves(mass: float, probabilities: Float64Array, area_km2: Float64Array) -> Int64Array:
    """Leaves in order of probability density, probability per area, until they hold a mass.

    No other set of leaves that holds as much has less area.

    Args:
        mass: Mass to hold, at most one; from ``1 - NEGLIGIBLE_MASS`` on, the least likely leaves are left out.
        probabilities: (m,) probabilities.
        area_km2: (m,) areas, positive.

    Returns:
        (k,) positions in ``probabilities``, densest first, k at least 1.
    """
    density = probabilities / area_km2
    order = np.argsort(-density, kind="stable")
    count = int(np.searchsorted(np.cumsum(probabilities[order]), min(mass, 1.0 - NEGLIGIBLE_MASS))) + 1
    return order[:count]


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


def _distances_km(unit_vectors: Float64Array, point: Float64Array) -> Float64Array:
    offsets = unit_vectors - point
    half_chords = np.sqrt(np.einsum("ij,ij->i", offsets, offsets)) / 2.0
    return np.asarray(2.0 * EARTH_RADIUS_KM * np.arcsin(np.minimum(half_chords, 1.0)))


def _segment(half_angle: Float64Array) -> Float64Array:
    """Area of the unit circle's segment under a half angle, a - sin a cos a, without cancelling for small ones."""
    angle = 2.0 * half_angle
    cube = angle**3
    series = cube / 6.0 * (1.0 - angle**2 / 20.0 * (1.0 - angle**2 / 42.0))
    return np.where(angle < 0.05, series, angle - np.sin(angle)) / 2.0


def _significant_count(probabilities: Float64Array) -> int:
    """Leading leaves that hold all but `NEGLIGIBLE_MASS`."""
    return min(int(np.searchsorted(np.cumsum(probabilities), 1.0 - NEGLIGIBLE_MASS / 2)) + 1, len(probabilities))


def _weighted_quantile(values: Float64Array, weights: Float64Array, mass: float) -> float:
    """Smallest value at or below which the weights reach a mass."""
    order = np.argsort(values, kind="stable")
    position = int(np.searchsorted(np.cumsum(weights[order]), mass))
    return float(values[order[min(position, len(values) - 1)]])


def _radius_at(step: int) -> float:
    return _MIN_RADIUS_KM * math.exp(step * _RADIUS_STEP)


def _radius_step(radius_km: float) -> int:
    """First step of the series of radii that is not below a radius."""
    return max(0, math.ceil(math.log(max(radius_km, _MIN_RADIUS_KM) / _MIN_RADIUS_KM) / _RADIUS_STEP))
