from __future__ import annotations

import math

import numpy as np
import pytest
import s2sphere
from hypothesis import given
from hypothesis import strategies as st
from support.points import latitudes, longitudes, random_points

from geosurge.errors import CoordinateOutOfRangeError
from geosurge.geodesy import (
    EARTH_RADIUS_KM,
    great_circle_km,
    latlng_to_unit_vector,
    spherical_mean,
    unit_vector_to_latlng,
    validate_coordinates,
)


def oracle_point(latitude_deg: float, longitude_deg: float) -> s2sphere.Point:
    return s2sphere.LatLng.from_degrees(latitude_deg, longitude_deg).to_point()


@pytest.mark.parametrize(
    ("latitude", "longitude"),
    [(math.nan, 0.0), (0.0, math.nan), (math.inf, 0.0), (90.0001, 0.0), (-91.0, 0.0), (0.0, 180.5), (0.0, 359.0)],
)
def test_bad_coordinates_are_refused_with_their_row(latitude: float, longitude: float) -> None:
    rows = np.array([[0.0, 0.0], [latitude, longitude], [math.nan, math.nan]])
    for function in (validate_coordinates, spherical_mean):
        with pytest.raises(CoordinateOutOfRangeError, match=r"^row 1: "):
            function(rows[:, 0], rows[:, 1])


def test_coordinates_on_the_limits_are_accepted() -> None:
    validate_coordinates([90.0, -90.0, 0.0, 0.0], [0.0, 0.0, 180.0, -180.0])
    validate_coordinates([], [])


@pytest.mark.parametrize(
    ("first", "second", "kilometres"),
    [
        ((0.0, 0.0), (0.0, 1.0), EARTH_RADIUS_KM * math.pi / 180.0),
        ((90.0, 0.0), (-90.0, 77.0), EARTH_RADIUS_KM * math.pi),
        ((0.0, 179.5), (0.0, -179.5), EARTH_RADIUS_KM * math.pi / 180.0),
        ((0.0, 0.0), (0.0, 180.0), EARTH_RADIUS_KM * math.pi),
        ((33.0, -70.0), (-33.0, 110.0), EARTH_RADIUS_KM * math.pi),
        ((45.0, 0.0), (45.0, 180.0), EARTH_RADIUS_KM * math.pi / 2.0),
        # Paris to New York, and London to Sydney.
        ((48.8566, 2.3522), (40.7128, -74.006), 5837.0),
        ((51.5074, -0.1278), (-33.8688, 151.2093), 16994.0),
    ],
)
def test_known_distances(first: tuple[float, float], second: tuple[float, float], kilometres: float) -> None:
    tolerance = 1.0 if kilometres == round(kilometres) else 1e-9
    assert float(great_circle_km(*first, *second)) == pytest.approx(kilometres, abs=tolerance)


@given(latitudes, longitudes, latitudes, longitudes)
def test_distances_equal_s2sphere(lat: float, lng: float, other_lat: float, other_lng: float) -> None:
    angle = oracle_point(lat, lng).angle(oracle_point(other_lat, other_lng))
    assert float(great_circle_km(lat, lng, other_lat, other_lng)) == pytest.approx(angle * EARTH_RADIUS_KM, abs=1e-8)


@given(latitudes, longitudes, latitudes, longitudes, latitudes, longitudes)
def test_distance_is_a_metric(a: float, b: float, c: float, d: float, e: float, f: float) -> None:
    there, back = great_circle_km(a, b, c, d), great_circle_km(c, d, a, b)
    assert there == pytest.approx(back, abs=1e-12)
    assert great_circle_km(a, b, a, b) == 0.0
    assert there <= great_circle_km(a, b, e, f) + great_circle_km(e, f, c, d) + 1e-9


@given(latitudes, longitudes, latitudes, longitudes)
def test_distances_to_a_point_and_its_antipode_sum_to_half_the_circumference(
    lat: float, lng: float, other_lat: float, other_lng: float
) -> None:
    antipode = (-lat, lng - 180.0 if lng > 0 else lng + 180.0)
    total = great_circle_km(lat, lng, other_lat, other_lng) + great_circle_km(*antipode, other_lat, other_lng)
    assert total == pytest.approx(math.pi * EARTH_RADIUS_KM, rel=1e-14)


@pytest.mark.parametrize("step_deg", [1e-3, 1e-6, 1e-9, 1e-12])
def test_distances_keep_their_digits_near_a_point_and_near_its_antipode(step_deg: float) -> None:
    step_km = math.radians(step_deg) * EARTH_RADIUS_KM
    assert float(great_circle_km(0.0, 0.0, step_deg, 0.0)) == pytest.approx(step_km, rel=1e-14, abs=0)
    from_antipode = math.pi * EARTH_RADIUS_KM - float(great_circle_km(0.0, 0.0, step_deg, 180.0))
    assert from_antipode == pytest.approx(step_km, abs=1e-11)


def test_both_names_of_an_antimeridian_point_are_the_same_point() -> None:
    assert float(great_circle_km(12.3, 180.0, 12.3, -180.0)) == 0.0


def test_distances_broadcast() -> None:
    latitude, longitude = random_points(6)
    table = great_circle_km(latitude[:, None], longitude[:, None], latitude, longitude)
    assert table.shape == (6, 6)
    assert table[2, 5] == great_circle_km(latitude[2], longitude[2], latitude[5], longitude[5])


@given(latitudes, longitudes)
def test_unit_vectors_round_trip(latitude: float, longitude: float) -> None:
    vector = latlng_to_unit_vector(latitude, longitude)
    point = oracle_point(latitude, longitude)
    np.testing.assert_allclose(vector, [point[axis] for axis in range(3)], rtol=0, atol=3e-16)
    assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-15)
    assert great_circle_km(*unit_vector_to_latlng(3.0 * vector), latitude, longitude) == pytest.approx(0.0, abs=1e-8)


def test_unit_vectors_point_where_the_docstring_says() -> None:
    vectors = latlng_to_unit_vector([0.0, 0.0, 90.0], [0.0, 90.0, 0.0])
    np.testing.assert_allclose(vectors, np.eye(3), atol=1e-16)


def test_the_mean_crosses_the_antimeridian_and_the_pole() -> None:
    assert abs(spherical_mean([10.0, 10.0], [179.0, -179.0])[1]) == pytest.approx(180.0)
    latitude, _ = spherical_mean([80.0, 80.0, 80.0, 80.0], [0.0, 90.0, 180.0, -90.0])
    assert latitude == pytest.approx(90.0)


@given(st.lists(st.tuples(st.floats(-40.0, 40.0), st.floats(100.0, 160.0)), min_size=1, max_size=8))
def test_the_mean_minimises_the_sum_of_squared_chords(points: list[tuple[float, float]]) -> None:
    rows = np.array(points)
    mean = latlng_to_unit_vector(*spherical_mean(rows[:, 0], rows[:, 1]))
    vectors = latlng_to_unit_vector(rows[:, 0], rows[:, 1])
    others = latlng_to_unit_vector(*random_points(50))
    assert np.square(vectors - mean).sum() <= np.square(vectors - others[:, None]).sum(axis=(1, 2)).min() + 1e-12


def test_weights_count_as_repeated_points() -> None:
    latitude, longitude = [10.0, 20.0, -5.0], [30.0, 50.0, 70.0]
    weighted = spherical_mean(latitude, longitude, [2, 0, 3])
    repeated = spherical_mean([10.0, 10.0, -5.0, -5.0, -5.0], [30.0, 30.0, 70.0, 70.0, 70.0])
    assert weighted == pytest.approx(repeated)


@pytest.mark.parametrize(
    ("latitude", "longitude", "weights", "message"),
    [
        ([], [], None, "no points"),
        ([90.0, -90.0], [0.0, 0.0], None, "balance"),
        ([0.0, 0.0, 0.0], [0.0, 120.0, -120.0], None, "balance"),
        ([0.0, 1.0], [0.0, 1.0], [0.0, 0.0], "positive"),
        ([0.0, 1.0], [0.0, 1.0], [2.0, -1.0], "negative"),
        ([0.0, 1.0], [0.0, 1.0], [1.0, math.nan], "finite"),
        ([0.0, 1.0], [0.0, 1.0], [1.0], "1 weights for 2 points"),
    ],
)
def test_undefined_means_are_refused(
    latitude: list[float], longitude: list[float], weights: list[float] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        spherical_mean(latitude, longitude, weights)
