"""Where references like the query gather: a kernel density on the sphere, and the point where it is highest.

Revisiting Im2GPS (Vo, Jacobs, Hays, ICCV 2017) answers with the densest place among the k references nearest to the
query: with the distance δ_j between the unit embeddings of query and reference j, the weights are 1 / δ_j^power, and a
Gaussian stands on each reference. The published figures are k = 100, power 10 and σ = 4 degrees, on planar degrees.

Here the density lives on the sphere, and the leaves of the posterior take part in it:

    f(x) = share * sum_j q_j K(x, y_j) + (1 - share) * sum_i p_i K(x, m_i),     K(x, y) = exp((x·y - 1) R² / σ²)

with the unit vectors y_j of the references, q_j ∝ 1 / δ_j^power over the k nearest that lie in the likeliest leaves,
and the probabilities p_i and means m_i of those leaves. K is a Gaussian of the chord, hence next to a Gaussian of the
distance where σ is small against the Earth, and has no seam at the antimeridian or at the poles. OURS are the leaves'
part, and that σ is a number of spreads of the likeliest leaf rather than a fixed distance: leaves are small where
pictures are dense, and only there can a reference tell more than its leaf.

**Mode.** From the component where f is highest, mean shift: x moves to the direction of the sum of all components,
each times its weight and its kernel at x. No step decreases f, because log f is bounded from below by what the step
maximises (Jensen's inequality; log K is linear in x). On a long ridge, the steps allowed end a little below its top.

**Cost.** k (k + l) kernels to find the start and k + l a step, for l leaves: arrays of shape (n, k, k + l).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from geosurge.geodesy import EARTH_RADIUS_KM, Float64Array

SMALLEST_DISTANCE: Final = 1e-2
"""Embeddings nearer to each other count as this far apart: compressed storage moves them by about as much, and a
reference that equals the query must not have an infinite weight."""

_MAX_SHIFTS: Final = 50
_SETTLED: Final = 1e-7
"""Mean shift ends for a point that moves less, in radians: less than a metre."""


@dataclass(frozen=True)
class Kernel:
    """How references become a density; see the module.

    Attributes:
        power: Exponent of the embeddings' distances, positive.
        share: Part of the density that the references have; the leaves have the rest.
        spreads: σ in spreads of the likeliest leaf, positive.
        snap: Answer with the heaviest reference within σ of the mode instead of the mode itself, as Revisiting Im2GPS
            does within 100 km.
    """

    power: float = 10.0
    share: float = 0.5
    spreads: float = 6.0
    snap: bool = False


@dataclass(frozen=True)
class Components:
    """What the densities of n queries are made of.

    Attributes:
        similarities: (n, k) inner products of the embeddings of query and references; -inf where there is none.
        references: (n, k, 3) unit vectors of the references.
        probabilities: (n, l) probabilities of the leaves, the largest first, which is positive.
        leaves: (n, l, 3) unit vectors of the leaves' means.
        spread_km: (n,) spreads of the likeliest leaves, positive.
    """

    similarities: NDArray[np.float32]
    references: Float64Array
    probabilities: Float64Array
    leaves: Float64Array
    spread_km: Float64Array


def reference_weights(similarities: NDArray[np.floating], power: float) -> Float64Array:
    """Weights 1 / distance^power of references, in sum one.

    Args:
        similarities: (n, k) inner products of unit embeddings; -inf where there is no reference.
        power: Positive.

    Returns:
        (n, k) weights; a row without any reference is zero.
    """
    squares = np.maximum(2.0 - 2.0 * np.asarray(similarities, dtype=np.float64), SMALLEST_DISTANCE**2)
    nearest = squares.min(axis=1, initial=4.0, keepdims=True)
    # Of the ratio, a power can be taken that would leave the range of float64.
    weights = (nearest / squares) ** (power / 2.0)
    return np.asarray(weights / np.maximum(weights.sum(axis=1, keepdims=True), 1.0))


def densest_points(components: Components, kernel: Kernel) -> Float64Array:
    """Modes of the densities of n queries.

    Args:
        components: What the densities are made of.
        kernel: How that becomes a density.

    Returns:
        (n, 3) unit vectors.
    """
    references = components.references
    own = reference_weights(components.similarities, kernel.power)
    share = np.where(own.any(axis=1, keepdims=True), kernel.share, 0.0)
    weights = np.concatenate([share * own, (1.0 - share) * components.probabilities], axis=1)
    vectors = np.concatenate([references, components.leaves], axis=1)
    sharpness = np.square(EARTH_RADIUS_KM / (kernel.spreads * components.spread_km))[:, np.newaxis]
    # The likeliest leaf stands for all: around the others the density is lower, or has references that say so.
    starts = slice(references.shape[1] + 1)
    cosines = np.matmul(vectors[:, starts], vectors.transpose(0, 2, 1))
    heights = np.matmul(np.exp((cosines - 1.0) * sharpness[..., np.newaxis]), weights[..., np.newaxis])[..., 0]
    highest = np.where(weights[:, starts] > 0.0, heights, -1.0).argmax(axis=1)
    points = _shift_to_mode(vectors[np.arange(len(vectors)), highest], weights, vectors, sharpness)
    return _snap(points, own, references, sharpness) if kernel.snap else points


def _shift_to_mode(
    points: Float64Array, weights: Float64Array, vectors: Float64Array, sharpness: Float64Array
) -> Float64Array:
    is_moving = np.ones((len(points), 1), dtype=bool)
    for _ in range(_MAX_SHIFTS):
        cosines = np.matmul(vectors, points[..., np.newaxis])[..., 0]
        pulls = weights * np.exp((cosines - 1.0) * sharpness)
        means = np.matmul(pulls[:, np.newaxis], vectors)[:, 0]
        shifted = means / np.sqrt((means * means).sum(axis=1, keepdims=True))
        steps = np.abs(shifted - points).max(axis=1, keepdims=True)
        # A point that has settled stays, so that it depends on no other query of its batch.
        points = np.where(is_moving, shifted, points)
        is_moving &= steps >= _SETTLED
        if not is_moving.any():
            break
    return points


def _snap(
    points: Float64Array, weights: Float64Array, references: Float64Array, sharpness: Float64Array
) -> Float64Array:
    """The heaviest reference within σ of each point; the point itself where there is none."""
    chords = np.square(references - points[:, np.newaxis]).sum(axis=2)
    inside = np.where(chords * sharpness <= 1.0, weights, 0.0)
    rows, best = np.arange(len(points)), inside.argmax(axis=1)
    return np.where(inside[rows, best, np.newaxis] > 0.0, references[rows, best], points)
