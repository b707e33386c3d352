"""Random leaves, and truths drawn from posteriors over them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from geosurge.geodesy import EARTH_RADIUS_KM, great_circle_km, unit_vector_to_latlng
from geosurge.posterior import Posteriors


def random_leaves(count: int, seed: int, around: tuple[float, float] | None = None) -> tuple[NDArray[np.float64], ...]:
    """Means, spreads and areas of leaves all over the Earth, or within some degrees of a point."""
    rng = np.random.default_rng(seed)
    if around is None:
        latitude, longitude = np.degrees(np.arcsin(rng.uniform(-1, 1, count))), rng.uniform(-180, 180, count)
    else:
        latitude, longitude = around[0] + rng.uniform(-8, 8, count), around[1] + rng.uniform(-8, 8, count)
    return latitude, longitude, rng.uniform(5, 60, count), rng.uniform(1e3, 1e5, count)


def sample_distances_km(
    posteriors: Posteriors, row: int, leaves: NDArray[np.float64], count: int, seed: int
) -> NDArray[np.float64]:
    """Distances to a point estimate of truths drawn from the mixture of discs around ``leaves`` (unit vectors)."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(posteriors.probabilities.shape[1], size=count, p=posteriors.probabilities[row])
    # A point at a distance and bearing from a leaf's mean, in the frame of the mean.
    angle = posteriors.disc_radius_km[row, chosen] * np.sqrt(rng.uniform(size=count)) / EARTH_RADIUS_KM
    bearing = rng.uniform(0, 2 * np.pi, count)
    mean = leaves[posteriors.ordinals[row, chosen]]
    side = np.cross(mean, np.where(np.abs(mean[:, 2:]) < 0.9, [[0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0]]))
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    other = np.cross(mean, side)
    tangent = side * np.cos(bearing)[:, None] + other * np.sin(bearing)[:, None]
    points = mean * np.cos(angle)[:, None] + tangent * np.sin(angle)[:, None]
    latitude, longitude = unit_vector_to_latlng(points)
    return great_circle_km(latitude, longitude, posteriors.latitude_deg[row], posteriors.longitude_deg[row])
