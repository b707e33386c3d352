"""Distances, vectors and means on the sphere, vectorised over numpy arrays.

Coordinates are WGS-84 degrees, read as latitude and longitude on a sphere of radius ``EARTH_RADIUS_KM``; lengths are
great-circle kilometres.

Arguments may be scalars, sequences or arrays, and broadcast. Results have the broadcast shape unless a docstring says
otherwise.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from geosurge.errors import CoordinateOutOfRangeError

Float64Array: TypeAlias = npt.NDArray[np.float64]
Int64Array: TypeAlias = npt.NDArray[np.int64]

EARTH_RADIUS_KM: Final = 6371.0088


def great_circle_km(
    latitude_deg: npt.ArrayLike,
    longitude_deg: npt.ArrayLike,
    other_latitude_deg: npt.ArrayLike,
    other_longitude_deg: npt.ArrayLike,
) -> Float64Array:
    """Great-circle distances between points.

    The haversine h = sin²(Δφ/2) + cos φ₁ cos φ₂ sin²(Δλ/2) in the form

        h     = sin²(Δφ/2) cos²(Δλ/2) + cos²((φ₁+φ₂)/2) sin²(Δλ/2)
        1 - h = cos²(Δφ/2) cos²(Δλ/2) + sin²((φ₁+φ₂)/2) sin²(Δλ/2)

    with the angle 2 atan2(√h, √(1-h)): no term cancels, so that both nearly equal and nearly antipodal points keep full
    precision.

    Args:
        latitude_deg: Latitudes of the first points.
        longitude_deg: Longitudes of the first points.
        other_latitude_deg: Latitudes of the second points.
        other_longitude_deg: Longitudes of the second points.

    Returns:
        Kilometres, float64, of the broadcast shape. NaN where an argument is NaN.
    """
    first_lat, first_lng, second_lat, second_lng = (
        np.asarray(values, dtype=np.float64)
        for values in (latitude_deg, longitude_deg, other_latitude_deg, other_longitude_deg)
    )
    difference = second_lng - first_lng
    half_lng = np.deg2rad(0.5 * (difference - 360.0 * np.rint(difference / 360.0)))
    half_lat = np.deg2rad(0.5 * (second_lat - first_lat))
    mean_lat = np.deg2rad(0.5 * (second_lat + first_lat))
    cos_half_lng, sin_half_lng = np.cos(half_lng), np.sin(half_lng)
    near = np.hypot(np.sin(half_lat) * cos_half_lng, np.cos(mean_lat) * sin_half_lng)
    far = np.hypot(np.cos(half_lat) * cos_half_lng, np.sin(mean_lat) * sin_half_lng)
    return np.asarray(2.0 * EARTH_RADIUS_KM * np.arctan2(near, far))


def latlng_to_unit_vector(latitude_deg: npt.ArrayLike, longitude_deg: npt.ArrayLike) -> Float64Array:
    """Unit vectors of points: x towards (0, 0), y towards (0, 90), z towards the north pole.

    Args:
        latitude_deg: Latitudes.
        longitude_deg: Longitudes.

    Returns:
        (..., 3) float64.
    """
    lat, lng = np.broadcast_arrays(_radians(latitude_deg), _radians(longitude_deg))
    vectors = np.empty((*lat.shape, 3), dtype=np.float64)
    cos_lat = np.cos(lat)
    vectors[..., 0] = np.cos(lng) * cos_lat
    vectors[..., 1] = np.sin(lng) * cos_lat
    vectors[..., 2] = np.sin(lat)
    return vectors


def unit_vector_to_latlng(vectors: npt.ArrayLike) -> tuple[Float64Array, Float64Array]:
    """Latitudes and longitudes of the directions of vectors.

    Args:
        vectors: (..., 3); any length but zero.

    Returns:
        Latitudes in [-90, 90] and longitudes in [-180, 180], each of shape (...).
    """
    array = np.asarray(vectors, dtype=np.float64)
    x, y, z = array[..., 0], array[..., 1], array[..., 2]
    return np.rad2deg(np.arctan2(z, np.hypot(x, y))), np.rad2deg(np.arctan2(y, x))


def spherical_mean(
    latitude_deg: npt.ArrayLike, longitude_deg: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> tuple[float, float]:
    """Mean of points on the sphere: the direction of the (weighted) sum of their unit vectors.

    Args:
        latitude_deg: (n,) latitudes, n at least 1.
        longitude_deg: (n,) longitudes.
        weights: (n,) weights, finite and not negative; equal when left out.

    Returns:
        Latitude and longitude of the mean.

    Raises:
        CoordinateOutOfRangeError: A coordinate is not on the globe.
        ValueError: There is no point, a weight is negative or not finite, all weights are zero, or the points balance
            around the Earth's centre, so that no direction is their mean.
    """
    validate_coordinates(latitude_deg, longitude_deg)
    vectors = latlng_to_unit_vector(latitude_deg, longitude_deg).reshape(-1, 3)
    count = len(vectors)
    if count == 0:
        raise ValueError("the mean of no points is undefined: pass at least one coordinate")
    weight = np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64).reshape(-1)
    if len(weight) != count:
        raise ValueError(f"{len(weight)} weights for {count} points: pass one weight a point")
    total = float(weight.sum())
    if not (np.isfinite(total) and total > 0 and bool((weight >= 0).all())):
        raise ValueError("weights must be finite and not negative, and at least one must be positive")
    mean = weight @ vectors / total
    # Rounding leaves sums of unit vectors that balance exactly with a remainder of some 1e-16 a point.
    if float(np.linalg.norm(mean)) < 1e-12:
        raise ValueError(f"the {count} points balance around the Earth's centre: their mean is undefined")
    latitude, longitude = unit_vector_to_latlng(mean)
    return float(latitude), float(longitude)


def validate_coordinates(latitude_deg: npt.ArrayLike, longitude_deg: npt.ArrayLike) -> None:
    """Check that coordinates are finite and on the globe: latitude in [-90, 90], longitude in [-180, 180].

    Args:
        latitude_deg: Latitudes.
        longitude_deg: Longitudes.

    Raises:
        CoordinateOutOfRangeError: One is not; the message names the first bad row and its values.
    """
    lat = np.asarray(latitude_deg, dtype=np.float64)
    lng = np.asarray(longitude_deg, dtype=np.float64)
    # A NaN makes the minimum NaN, and every comparison with it false.
    if lat.size == 0 or lng.size == 0:
        return
    if lat.min() >= -90.0 and lat.max() <= 90.0 and lng.min() >= -180.0 and lng.max() <= 180.0:
        return
    lat, lng = np.broadcast_arrays(lat, lng)
    good = (np.abs(lat) <= 90.0) & (np.abs(lng) <= 180.0)
    row = int(np.argmin(good))
    raise CoordinateOutOfRangeError(
        f"row {row}: latitude_deg={float(lat.flat[row])!r}, longitude_deg={float(lng.flat[row])!r} is off the globe: "
        "latitudes must be in [-90, 90] and longitudes in [-180, 180] (subtract 360 from longitudes above 180)"
    )


def _radians(degrees: npt.ArrayLike) -> Float64Array:
    return np.deg2rad(np.asarray(degrees, dtype=np.float64))
