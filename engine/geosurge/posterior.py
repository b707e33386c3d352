"""From leaf scores to answers with their uncertainty: a batch of queries at a time, plain numpy.

The posterior of a query is a mixture over the m leaves that the search returned.

**Weights.** A leaf's score s_i is the logarithm of its product of probabilities up to one constant a query, so

    p_i = exp(s_i / T) / sum_j exp(s_j / T)

with the temperature T fitted on held-out data (`geosurge.calibration`). The mass of a cell of any level
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

with great-circle distances d between x and the discs' centres, and the lens of two circles in the plane: discs are
small against the Earth. With H = 4 * area of the triangle of sides r, R and d (0 where there is none), and the half
angles a and b under which the centres of disc and circle see the common chord,

    a = atan2(H, d² + R² - r²),    b = atan2(H, d² + r² - R²),
    area(lens) / area(disc) = (a + (r / R)² b - H / (2 R²)) / pi

which also holds where one circle lies inside or outside of the other. The slope is that of the arcs inside the discs,
2 r b each: M'(r) = sum_i p_i * 2 r b_i / (pi R_i²). M is monotone; its inverse, found by Newton's steps, is rounded up
to the next radius of a geometric series (0.05 % apart), so that a radius never decreases with the mass asked for and
always holds it.

**Cost.** A batch is arrays of shape (n, m), so that its queries share numpy's cost of a call. Leaves that together hold
less than `LOST_MASS` are dropped before anything else, which leaves some hundreds of the 16,000 of an exact search; the
cost is linear in what remains, apart from three sorts. Nothing is stored but `LeafShapes`, 40 bytes a leaf. Leaves that
together hold less than `NEGLIGIBLE_MASS` count as outside of every circle and region.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geosurge.geodesy import EARTH_RADIUS_KM, Float64Array, Int64Array, latlng_to_unit_vector, unit_vector_to_latlng

PointEstimate: TypeAlias = Literal["posterior_mean", "leaf"]
"""`posterior_mean`: see the module; `leaf`: the mean coordinate of the most likely leaf."""

WINDOW_SPREADS: Final = 6.0
"""Window of the point estimate, in spreads. A square cell of evenly spread samples has the spread 0.41 sides, so six
reach the cells around it also where those are an S2 level coarser."""

MIN_DISC_RADIUS_KM: Final = 1e-3
"""A leaf whose samples all lie on one spot is a disc of one metre."""

NEGLIGIBLE_MASS: Final = 1e-6

LOST_MASS: Final = 1e-12
"""What the leaves that `infer` drops hold together, at most: less than any answer shows."""

HALF_CIRCUMFERENCE_KM: Final = math.pi * EARTH_RADIUS_KM

_RADIUS_STEP: Final = math.log1p(5e-4)
_MIN_RADIUS_KM: Final = 1e-4
_MAX_MEAN_STEPS: Final = 50
_MAX_NEWTON_STEPS: Final = 6


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
class Posteriors:
    """What is known of the locations of n queries. Row i is query i's, its most likely leaf first.

    Attributes:
        ordinals: (n, m) leaf ordinals; -1 pads the rows of queries with fewer leaves.
        probabilities: (n, m) probabilities; each row sums to one, padding has none.
        latitude_deg: (n,) latitudes of the point estimates.
        longitude_deg: (n,) longitudes of the point estimates.
        unit_vectors: (n, 3) directions of the point estimates.
        distance_km: (n, m) great-circle distances of the leaves' means to the point estimate.
        disc_radius_km: (n, m) radii of the leaves' discs.
        area_km2: (n, m) areas of the leaves.
    """

    ordinals: Int64Array
    probabilities: Float64Array
    latitude_deg: Float64Array
    longitude_deg: Float64Array
    unit_vectors: Float64Array
    distance_km: Float64Array
    disc_radius_km: Float64Array
    area_km2: Float64Array

    def around(self, points: Float64Array, leaves: LeafShapes) -> Posteriors:
        """The same posteriors with other point estimates: radii and masses are then those around these points.

        Args:
            points: (n, 3) unit vectors.
            leaves: The leaves that the posteriors were inferred with.
        """
        latitude_deg, longitude_deg = unit_vector_to_latlng(points)
        return replace(
            self,
            latitude_deg=latitude_deg,
            longitude_deg=longitude_deg,
            unit_vectors=points,
            distance_km=_distances_km(leaves.unit_vectors.take(self.ordinals, axis=0), points),
        )

    def mass_within(self, radius_km: ArrayLike) -> Float64Array:
        """(n,) posterior masses within great-circle distances of the point estimates; see `mass_within`."""
        return mass_within(radius_km, self.probabilities, self.distance_km, self.disc_radius_km)

    def radius_km(self, mass: ArrayLike) -> Float64Array:
        """(n,) radii around the point estimates that hold masses; see `radius_for_mass`."""
        return radius_for_mass(mass, self.probabilities, self.distance_km, self.disc_radius_km)

    def credible_leaves(self, mass: ArrayLike) -> CredibleLeaves:
        """The leaves that hold a mass on least area; see `credible_leaves`."""
        return credible_leaves(mass, self.probabilities, self.area_km2)


@dataclass(frozen=True)
class CredibleLeaves:
    """Sets of leaves of n queries.

    Attributes:
        positions: (n, k) positions in the queries' rows, densest first.
        counts: (n,) how many of them belong to the set, at least 1; the positions after them do not.
        masses: (n,) posterior masses of the sets.
        area_km2: (n,) areas of the sets.
    """

    positions: Int64Array
    counts: Int64Array
    masses: Float64Array
    area_km2: Float64Array


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
    *,
    shown: int = 1,
) -> Posteriors:
    """Turns the leaves that a search returned into posteriors.

    Args:
        ordinals: (n, m) ordinals of the leaves, best first; -1 pads. Every query has one leaf at least.
        scores: (n, m) composite inner products, descending; -inf where the ordinal is -1.
        leaves: The leaves of the index.
        temperature: Divides the scores.
        point: How the point estimate is made.
        shown: Leaves to keep of each query however unlikely they are.

    Returns:
        The posteriors over these leaves alone: see `leaf_posterior` for what that means after a beam search. Leaves
        that hold less than `LOST_MASS` together are left out.
    """
    kept = max(_kept_count(scores, temperature), min(shown, scores.shape[1]))
    ordinals = ordinals[:, :kept]
    probabilities = leaf_posterior(scores[:, :kept], temperature)
    vectors = leaves.unit_vectors.take(ordinals, axis=0)
    spread_km = leaves.spread_km.take(ordinals)
    estimates = vectors[:, 0]
    if point == "posterior_mean":
        estimates = posterior_mean(probabilities, vectors, WINDOW_SPREADS * spread_km[:, 0])
    latitude_deg, longitude_deg = unit_vector_to_latlng(estimates)
    return Posteriors(
        ordinals=ordinals,
        probabilities=probabilities,
        latitude_deg=latitude_deg,
        longitude_deg=longitude_deg,
        unit_vectors=estimates,
        distance_km=_distances_km(vectors, estimates),
        disc_radius_km=disc_radius_km(spread_km),
        area_km2=leaves.area_km2.take(ordinals),
    )


def leaf_posterior(scores: NDArray[np.floating], temperature: float = 1.0) -> Float64Array:
    """Probabilities of leaves: the softmax of their scores over a temperature.

    The normaliser runs over the leaves given. With all leaves (exact search) the result is the posterior. With those
    that a beam reached it is an upper bound leaf by leaf, p_beam >= p_exact, because the leaves left out are missing
    from the sum; the two agree as far as the beam holds the mass. Never pass only the few leaves that will be shown.

    Args:
        scores: (..., m) composite inner products; -inf has probability zero.
        temperature: Positive.

    Returns:
        (..., m) float64; the sums over the last axis are one.
    """
    rows = np.asarray(scores, dtype=np.float64)
    # A score divided by a temperature of almost nothing would leave the range of float64.
    weights = np.exp((rows - rows.max(axis=-1, keepdims=True)) / temperature)
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def path_masses(probabilities: Float64Array, ordinals: Int64Array, leaf_ranges: ArrayLike) -> Float64Array:
    """Posterior masses under cells.

    Args:
        probabilities: (n, m) probabilities.
        ordinals: (n, m) their leaf ordinals.
        leaf_ranges: (n, c, 2) half-open ranges of leaf ordinals, one for each cell (the descendants of a cell are
            contiguous).

    Returns:
        (n, c) masses.
    """
    ranges = np.asarray(leaf_ranges, dtype=np.int64)
    leaf = ordinals[:, np.newaxis]
    inside = (leaf >= ranges[..., :1]) & (leaf < ranges[..., 1:])
    # A mass of one must not read 1.0000000000000002.
    return np.asarray(np.minimum(np.matmul(inside, probabilities[..., np.newaxis])[..., 0], 1.0))


def posterior_mean(probabilities: Float64Array, unit_vectors: Float64Array, window_km: ArrayLike) -> Float64Array:
    """Mean of the leaves around the most likely one: a local minimum of the expected squared error capped at a window.

    Args:
        probabilities: (n, m) probabilities, the largest first.
        unit_vectors: (n, m, 3) directions of the leaves' means.
        window_km: (n,) leaves farther than this from the current point do not move it. `MIN_DISC_RADIUS_KM` at least: a
            leaf whose samples all lie on one spot has no spread, and rounding would put it outside of a window of
            nothing.

    Returns:
        (n, 3) unit vectors.
    """
    window = np.maximum(window_km, MIN_DISC_RADIUS_KM) / EARTH_RADIUS_KM
    smallest_cosine = np.cos(np.minimum(window, math.pi / 2))[:, np.newaxis]
    points = unit_vectors[:, 0]
    members: NDArray[np.bool_] | None = None
    for _ in range(_MAX_MEAN_STEPS):
        near = np.matmul(unit_vectors, points[..., np.newaxis])[..., 0] >= smallest_cosine
        if members is not None and np.array_equal(near, members):
            break
        members = near
        means = np.matmul((probabilities * near)[:, np.newaxis], unit_vectors)[:, 0]
        points = means / np.sqrt((means * means).sum(axis=1, keepdims=True))
    return np.asarray(points)


def disc_radius_km(spread_km: ArrayLike) -> Float64Array:
    """Radius of the uniform disc whose root-mean-square radius is a leaf's spread."""
    return np.maximum(math.sqrt(2.0) * np.asarray(spread_km, dtype=np.float64), MIN_DISC_RADIUS_KM)


def disc_fraction_within(radius_km: ArrayLike, distance_km: ArrayLike, disc_radius_km: ArrayLike) -> Float64Array:
    """Share of a disc's area that lies within a circle, in the plane; see the module.

    Args:
        radius_km: Radii r of the circle.
        distance_km: Distances d of the centres.
        disc_radius_km: Radii R of the discs, positive.

    Returns:
        Shares in [0, 1] of the broadcast shape, to within some 1e-15 (1 + r / R).
    """
    square = np.square(np.asarray(radius_km, np.float64))
    distance, disc = np.asarray(distance_km, np.float64), np.asarray(disc_radius_km, np.float64)
    far, area = distance * distance, disc * disc
    triangle, outside, inside = _lens(square, far + area, 2.0 * distance * disc, 2.0 * far)
    lost = outside + (triangle / 2.0 - square * inside) / area
    return np.clip(1.0 - lost / math.pi, 0.0, 1.0)


def mass_within(
    radius_km: ArrayLike, probabilities: Float64Array, distance_km: Float64Array, disc_radius_km: Float64Array
) -> Float64Array:
    """Posterior masses within radii of the points that distances were measured from.

    Args:
        radius_km: (n,) great-circle radii, or one for all; from half the Earth's circumference on, everything is
            inside.
        probabilities: (n, m) probabilities.
        distance_km: (n, m) distances of the leaves' means to the point.
        disc_radius_km: (n, m) radii of the leaves' discs.

    Returns:
        (n,) masses in [0, 1].
    """
    radius = np.asarray(radius_km, dtype=np.float64)
    shares = disc_fraction_within(radius[..., np.newaxis], distance_km, disc_radius_km)
    return np.where(radius >= HALF_CIRCUMFERENCE_KM, 1.0, np.minimum((probabilities * shares).sum(axis=-1), 1.0))


def radius_for_mass(
    mass: ArrayLike, probabilities: Float64Array, distance_km: Float64Array, disc_radius_km: Float64Array
) -> Float64Array:
    """Smallest radii, rounded up by at most 0.05 %, within which posterior masses lie.

    Args:
        mass: (n,) masses to enclose, at most one, or one for all; from ``1 - NEGLIGIBLE_MASS`` on, the least likely
            leaves are left out.
        probabilities: (n, m) probabilities, descending.
        distance_km: (n, m) distances of the leaves' means to the point.
        disc_radius_km: (n, m) radii of the leaves' discs.

    Returns:
        (n,) kilometres, at most half the Earth's circumference; never decreasing in ``mass``.
    """
    target = _reachable(mass, len(probabilities))
    p = _significant(probabilities)
    distance, disc = distance_km[:, : p.shape[1]], disc_radius_km[:, : p.shape[1]]
    near, far = distance - disc, distance + disc
    # No disc that starts beyond the answer counts, every disc that ends before it does: this brackets the radius.
    lower, upper = _weighted_quantile(near, p, target), _weighted_quantile(far, p, target)
    certain = far <= lower[:, np.newaxis]
    rows, columns = np.nonzero(~certain & (near < upper[:, np.newaxis]) & (p > 0.0))
    needed = target - (p * certain).sum(axis=1)
    discs = _Discs.of(rows, p[rows, columns], distance[rows, columns], disc[rows, columns], len(p))
    low, high = _radius_step(lower) - 1, _radius_step(upper)
    radius = (np.maximum(lower, 0.0) + upper) / 2.0
    tried = 0
    while (is_open := high - low > 1).any():
        # Newton's steps settle nearly all; halving ends what they do not, such as a gap between two discs.
        step = (low + high) // 2
        if tried < _MAX_NEWTON_STEPS:
            step = np.minimum(np.maximum(_radius_step(radius), low + 1), high - 1)
        tried += 1
        radius = _radius_at(step)
        held, slope = discs.mass_and_slope(radius)
        is_enough = held >= needed
        high = np.where(is_open & is_enough, step, high)
        low = np.where(is_open & ~is_enough, step, low)
        radius += (needed - held) / np.maximum(slope, 1e-300)
    return np.minimum(_radius_at(high), HALF_CIRCUMFERENCE_KM)


def credible_leaves(mass: ArrayLike, probabilities: Float64Array, area_km2: Float64Array) -> CredibleLeaves:
    """Leaves in order of probability density, probability per area, until they hold a mass.

    No other set of leaves that holds as much has less area.

    Args:
        mass: (n,) masses to hold, at most one, or one for all; from ``1 - NEGLIGIBLE_MASS`` on, the least likely leaves
            are left out.
        probabilities: (n, m) probabilities.
        area_km2: (n, m) areas, positive.
    """
    order = np.argsort(-probabilities / area_km2, axis=1, kind="stable")
    held = _in_order(probabilities, order).cumsum(axis=1)
    target = _reachable(mass, len(probabilities))
    counts = np.minimum((held < target[:, np.newaxis]).sum(axis=1) + 1, order.shape[1])
    largest = int(counts.max())
    positions = order[:, :largest]
    chosen = np.arange(largest) < counts[:, np.newaxis]
    area = (_in_order(area_km2, positions) * chosen).sum(axis=1)
    masses = np.minimum(held[np.arange(len(held)), counts - 1], 1.0)
    return CredibleLeaves(positions, counts, masses, area)


@dataclass(frozen=True)
class _Discs:
    """Discs of n queries, each with its query's row: what `radius_for_mass` needs of them again and again.

    Attributes:
        count: The number n of queries.
        rows: (k,) query of each disc.
        total: (k,) d² + R².
        product: (k,) 2 d R.
        twice_far: (k,) 2 d².
        weight: (k,) p / pi.
        density: (k,) p / (pi R²).
        mass: (n,) probability of all discs of a query.
    """

    count: int
    rows: Int64Array
    total: Float64Array
    product: Float64Array
    twice_far: Float64Array
    weight: Float64Array
    density: Float64Array
    mass: Float64Array

    @classmethod
    def of(cls, rows: Int64Array, p: Float64Array, distance: Float64Array, disc: Float64Array, count: int) -> _Discs:
        """Discs of ``count`` queries from (k,) rows, probabilities, distances d and radii R."""
        far, area, weight = distance * distance, disc * disc, p / math.pi
        mass = _sum_rows(rows, p, count)
        return cls(count, rows, far + area, 2.0 * distance * disc, 2.0 * far, weight, weight / area, mass)

    def mass_and_slope(self, radius_km: Float64Array) -> tuple[Float64Array, Float64Array]:
        """(n,) masses M of the discs within each query's radius, and (n,) their derivatives by the radius."""
        square = radius_km * radius_km
        triangle, outside, inside = _lens(square[self.rows], self.total, self.product, self.twice_far)
        lost = _sum_rows(self.rows, self.weight * outside + self.density * (triangle / 2.0), self.count)
        arcs = _sum_rows(self.rows, self.density * inside, self.count)
        return self.mass - lost + square * arcs, 2.0 * radius_km * arcs


def _lens(
    square: Float64Array, total: Float64Array, product: Float64Array, twice_far: Float64Array
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """H, pi - a and b of the module, from r², d² + R², 2 d R and 2 d².

    The supplement of a makes a circle that equals its disc hold all of it: both angles are then atan2(0, 0) = 0. Both
    come from one difference of squares, because for nearly concentric circles only the angles' difference counts.
    """
    excess = square - total
    # Heron's formula; the product is negative where the sides make no triangle.
    area = np.sqrt(np.maximum((product + excess) * (product - excess), 0.0))
    return area, np.arctan2(area, excess), np.arctan2(area, excess + twice_far)


def _sum_rows(rows: Int64Array, values: Float64Array, count: int) -> Float64Array:
    """(n,) sums of the values of each row."""
    # Without any value, the sums would be integers.
    return np.bincount(rows, values, count).astype(np.float64, copy=False)


def _distances_km(unit_vectors: Float64Array, points: Float64Array) -> Float64Array:
    offsets = unit_vectors - points[:, np.newaxis]
    half_chords = np.sqrt(np.einsum("nij,nij->ni", offsets, offsets)) / 2.0
    return np.asarray(2.0 * EARTH_RADIUS_KM * np.arcsin(np.minimum(half_chords, 1.0)))


def _kept_count(scores: NDArray[np.floating], temperature: float) -> int:
    """Leading columns outside of which no query has more than `LOST_MASS`."""
    # A leaf this far below the best has less than its part of the mass to lose, whatever the normaliser.
    furthest = temperature * math.log(scores.shape[1] / LOST_MASS)
    lowest = (scores[:, :1].astype(np.float64) - furthest).astype(scores.dtype)
    return int((scores >= lowest).sum(axis=1).max())


def _reachable(mass: ArrayLike, count: int) -> Float64Array:
    """(n,) masses to look for: with the negligible ones, rounding could leave a mass out of reach."""
    return np.asarray(np.minimum(np.broadcast_to(np.asarray(mass), count), 1.0 - NEGLIGIBLE_MASS))


def _significant(probabilities: Float64Array) -> Float64Array:
    """The leading columns with all but `NEGLIGIBLE_MASS` of each query, without what a query has beyond that."""
    counts = (probabilities.cumsum(axis=1) < 1.0 - NEGLIGIBLE_MASS / 2).sum(axis=1) + 1
    largest = min(int(counts.max()), probabilities.shape[1])
    return np.asarray(probabilities[:, :largest] * (np.arange(largest) < counts[:, np.newaxis]))


def _weighted_quantile(values: Float64Array, weights: Float64Array, mass: Float64Array) -> Float64Array:
    """(n,) smallest values at or below which the weights reach a mass."""
    order = np.argsort(values, axis=1)
    below = (_in_order(weights, order).cumsum(axis=1) < mass[:, np.newaxis]).sum(axis=1)
    rows = np.arange(len(values))
    return np.asarray(values[rows, order[rows, np.minimum(below, values.shape[1] - 1)]])


def _in_order(values: Float64Array, order: Int64Array) -> Float64Array:
    """Columns of each row in the order of that row; `np.take_along_axis`, faster."""
    starts = np.arange(len(values))[:, np.newaxis] * values.shape[1]
    return np.asarray(values.take(order + starts))


def _radius_at(step: Int64Array) -> Float64Array:
    return np.asarray(_MIN_RADIUS_KM * np.exp(step * _RADIUS_STEP))


def _radius_step(radius_km: Float64Array) -> Int64Array:
    """First steps of the series of radii that are not below the radii."""
    return np.ceil(np.log(np.maximum(radius_km, _MIN_RADIUS_KM) / _MIN_RADIUS_KM) / _RADIUS_STEP).astype(np.int64)
