"""From the sphere to a map, and lines on the sphere."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from geosurge import geodesy
from geosurge.description import Coordinate
from geosurge.geodesy import EARTH_RADIUS_KM, Float64Array

Projection: TypeAlias = Callable[[Float64Array, Float64Array], tuple[Float64Array, Float64Array]]
"""Latitudes and longitudes in degrees, of any one shape, to x and y of that shape."""


def equal_earth(latitude_deg: Float64Array, longitude_deg: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Projects the sphere of radius 1 onto the plane, true in area.

    Source: B. Savric, T. Patterson, B. Jenny, "The Equal Earth map projection", IJGIS 33(3), 2019, equations 7 to 10.

    Args:
        latitude_deg: Any shape.
        longitude_deg: The same shape; beyond 180 degrees the map simply goes on.

    Returns:
        x and y of that shape.
    """
    a1, a2, a3, a4 = 1.340264, -0.081106, 0.000893, 0.003796
    theta = np.arcsin(math.sqrt(3.0) / 2.0 * np.sin(np.radians(latitude_deg)))
    square = theta**2
    slope = a1 + 3.0 * a2 * square + square**3 * (7.0 * a3 + 9.0 * a4 * square)
    x = 2.0 / math.sqrt(3.0) * np.radians(longitude_deg) * np.cos(theta) / slope
    return x, theta * (a1 + a2 * square + square**3 * (a3 + a4 * square))


def azimuthal_equidistant(centre: Coordinate) -> Projection:
    """A projection, in kilometres, that is true in distance and bearing from its centre."""
    latitude, longitude = math.radians(centre.latitude_deg), math.radians(centre.longitude_deg)

    def project(latitude_deg: Float64Array, longitude_deg: Float64Array) -> tuple[Float64Array, Float64Array]:
        vectors = geodesy.latlng_to_unit_vector(latitude_deg, longitude_deg)
        east = vectors @ [-math.sin(longitude), math.cos(longitude), 0.0]
        north = vectors @ [
            -math.sin(latitude) * math.cos(longitude),
            -math.sin(latitude) * math.sin(longitude),
            math.cos(latitude),
        ]
        across = np.hypot(east, north)
        up = vectors @ geodesy.latlng_to_unit_vector(centre.latitude_deg, centre.longitude_deg)
        angle = np.arctan2(across, up)
        scale = EARTH_RADIUS_KM * np.divide(angle, across, out=np.ones_like(across), where=across > 0.0)
        return scale * east, scale * north

    return project


def great_circle(start: Coordinate, end: Coordinate, count: int = 100) -> Float64Array:
    """Points on the shortest way between two places.

    Args:
        start: Where it begins.
        end: Where it ends.
        count: Points, at least 2.

    Returns:
        (count, 2) latitudes and longitudes in degrees.
    """
    first, last = (geodesy.latlng_to_unit_vector(end.latitude_deg, end.longitude_deg) for end in (start, end))
    # Steps along the chord are uneven, but the line is the same, and nothing is divided by the sine of a small angle.
    steps = np.linspace(0.0, 1.0, count)[:, None]
    latitude_deg, longitude_deg = geodesy.unit_vector_to_latlng((1.0 - steps) * first + steps * last)
    return np.stack([latitude_deg, longitude_deg], axis=-1)


def circle(centre: Coordinate, radius_km: float, count: int = 181) -> Float64Array:
    """Points at one great-circle distance around a place.

    Args:
        centre: The place.
        radius_km: The distance.
        count: Points; the last is the first again.

    Returns:
        (count, 2) latitudes and longitudes in degrees.
    """
    up = geodesy.latlng_to_unit_vector(centre.latitude_deg, centre.longitude_deg)
    # The axis that is farthest from the centre's own direction makes the best-conditioned basis.
    east = np.cross(np.eye(3)[np.argmin(np.abs(up))], up)
    east /= np.linalg.norm(east)
    turn = np.linspace(0.0, 2.0 * math.pi, count)[:, None]
    angle = radius_km / EARTH_RADIUS_KM
    sideways = np.cos(turn) * east + np.sin(turn) * np.cross(up, east)
    latitude_deg, longitude_deg = geodesy.unit_vector_to_latlng(math.cos(angle) * up + math.sin(angle) * sideways)
    return np.stack([latitude_deg, longitude_deg], axis=-1)
