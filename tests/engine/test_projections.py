from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.points import latitudes, longitudes

from geosurge import geodesy
from geosurge.description import Coordinate
from geosurge.geodesy import EARTH_RADIUS_KM, great_circle_km
from geosurge.projections import azimuthal_equidistant, circle, equal_earth, great_circle

COORDINATES = st.builds(Coordinate, latitudes, longitudes)


def distances_km(points: NDArray[np.float64], place: Coordinate) -> NDArray[np.float64]:
    return np.asarray(great_circle_km(points[:, 0], points[:, 1], place.latitude_deg, place.longitude_deg))


@given(st.floats(-89.5, 89.5), longitudes)
def test_the_map_of_the_world_is_true_in_area(latitude_deg: float, longitude_deg: float) -> None:
    step = 1e-4
    x, y = equal_earth(
        latitude_deg + np.array([-step, step, 0.0, 0.0]), longitude_deg + np.array([0.0, 0.0, -step, step])
    )
    area = (x[3] - x[2]) * (y[1] - y[0])
    side = math.radians(2 * step)
    assert area == pytest.approx(math.cos(math.radians(latitude_deg)) * side**2, rel=1e-5)


def test_the_map_of_the_world_has_the_published_shape() -> None:
    x, y = equal_earth(np.array([0.0, 90.0, 90.0]), np.array([180.0, 0.0, 180.0]))
    assert (x[0], y[0]) == (pytest.approx(2.70663, abs=1e-5), 0.0)
    assert (x[1], y[1]) == (0.0, pytest.approx(1.31736, abs=1e-5))
    assert x[2] == pytest.approx(0.59 * x[0], abs=0.01)


@given(COORDINATES, COORDINATES)
def test_close_ups_are_true_in_distance_from_their_centre(centre: Coordinate, place: Coordinate) -> None:
    x, y = azimuthal_equidistant(centre)(np.array(place.latitude_deg), np.array(place.longitude_deg))
    expected = great_circle_km(centre.latitude_deg, centre.longitude_deg, place.latitude_deg, place.longitude_deg)
    if expected < 20_000.0:
        assert math.hypot(float(x), float(y)) == pytest.approx(float(expected), rel=1e-6, abs=1e-3)


def test_in_close_ups_north_is_up_and_east_is_right() -> None:
    project = azimuthal_equidistant(Coordinate(-40.0, 179.5))
    x, y = project(np.array([-39.0, -40.0]), np.array([179.5, -179.5]))
    assert x[0] == pytest.approx(0.0, abs=1e-6)
    assert y[0] > 0.0
    assert x[1] > 80.0
    assert abs(y[1]) < 1.0


@given(COORDINATES, COORDINATES)
def test_a_great_circle_is_as_long_as_the_distance(start: Coordinate, end: Coordinate) -> None:
    expected = float(great_circle_km(start.latitude_deg, start.longitude_deg, end.latitude_deg, end.longitude_deg))
    if expected > 19_900.0:
        return
    line = great_circle(start, end)
    steps = great_circle_km(line[:-1, 0], line[:-1, 1], line[1:, 0], line[1:, 1])
    assert float(np.sum(steps)) == pytest.approx(expected, rel=1e-6, abs=1e-3)
    assert distances_km(line[:1], start)[0] == pytest.approx(0.0, abs=1e-3)
    assert distances_km(line[-1:], end)[0] == pytest.approx(0.0, abs=1e-3)


@given(COORDINATES, st.floats(1.0, 0.99 * math.pi * EARTH_RADIUS_KM))
def test_a_circle_has_one_distance_and_goes_all_around(centre: Coordinate, radius_km: float) -> None:
    points = circle(centre, radius_km)
    assert distances_km(points, centre) == pytest.approx(radius_km, rel=1e-6, abs=1e-3)
    middle = geodesy.latlng_to_unit_vector(points[:-1, 0], points[:-1, 1]).mean(axis=0)
    up = geodesy.latlng_to_unit_vector(centre.latitude_deg, centre.longitude_deg)
    assert middle == pytest.approx(math.cos(radius_km / EARTH_RADIUS_KM) * up, abs=1e-9)
