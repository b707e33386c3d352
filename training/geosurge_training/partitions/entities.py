"""Partitions into administrative entities: country, region, subregion and city of the nearest city, offline.

A coordinate belongs to the city of at least `MIN_POPULATION` people that is nearest on the sphere, and to what that
city lies in (`places`: GeoNames). Borders between entities are therefore those of the cities' territories, the cells of
their spherical Voronoi diagram, and not legal borders; they reach out to sea. The area of an entity is that of its
cities' territories together, which is exactly where its coordinates are: like those of S2 cells, the areas of all
cities add up to the Earth, and a coastal city's area is mostly water.

Entities are named as HierLoc names them (arXiv 2601.23064): a key of the ISO 3166-1 code and the names down to the
entity, `NA`, `NA/Khomas Region`, `DE/Bavaria/Upper Bavaria`, `DE/Bavaria/Upper Bavaria/Munich`. This project's
decisions: a name that GeoNames does not have is empty (`SG///Singapore`), `%` and `/` in names are written `%25` and
`%2F`, and cities that would share a key get their coordinates appended to it (`...//Neuenkirchen@53.03259,9.70642`).

An entity with at most ``tau_min`` samples of its level is dropped: its samples belong to no cell of that level or of
finer ones, as those of a dropped S2 cell. An entity all of whose children would be dropped stands on the next level
again, with all its samples, so that every path leads down to a leaf.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.spatial import SphericalVoronoi, cKDTree

from geosurge.cells import CellRows
from geosurge.errors import ConfigurationError
from geosurge.geodesy import EARTH_RADIUS_KM, Float64Array, Int64Array, latlng_to_unit_vector, validate_coordinates
from geosurge_training.partitions.interface import array_name, write_arrays
from geosurge_training.partitions.samples import (
    CellStatistics,
    CoordinateChunks,
    check_repeatable,
    describe_cells,
    sum_runs,
    sum_tiles,
)
from geosurge_training.places import nearest_places, read_gazetteer

MIN_POPULATION: Final = 1000
"""People of the cities that count: GeoNames' file is of places of a thousand people, and of smaller seats besides."""

ENTITY_LEVELS: Final = ("country", "region", "subregion", "city")

_SEPARATOR: Final = "/"

LeafFinder: TypeAlias = Callable[[npt.ArrayLike, npt.ArrayLike], Int64Array]


_COLUMNS: Final = (
    "tokens",
    "parents",
    "sample_counts",
    "mean_latitude_deg",
    "mean_longitude_deg",
    "spread_km",
    "area_km2",
)
"""What a file holds of each level."""


@dataclass(frozen=True)
class EntityLevel(CellStatistics):
    """The entities of one level in the order of their ordinals, which is that of their keys below each parent.

    Attributes:
        tokens: n keys.
        parents: (n,) int64 ordinals on the level before, non-decreasing; -1 on level 1.
        area_km2: (n,) float64 areas of the territories of each entity's cities.
    """

    tokens: tuple[str, ...]
    parents: Int64Array
    area_km2: Float64Array


@dataclass(frozen=True)
class EntityPartition:
    """Nested levels of administrative entities, coarsest first.

    Attributes:
        levels: The levels: country, region, subregion, city.
        city_latitude_deg: (m,) latitudes of all cities, those of dropped entities too.
        city_longitude_deg: (m,) longitudes of them.
        city_ordinals: (m, L) entity of each city on each level; -1 for none.

    Raises:
        ValueError: On construction, if columns are of different lengths, a level's keys repeat, or an entity has no
            parent or no child.
    """

    levels: tuple[EntityLevel, ...]
    city_latitude_deg: Float64Array
    city_longitude_deg: Float64Array
    city_ordinals: Int64Array

    def __post_init__(self) -> None:
        _check_whole(self)

    @property
    def cell_kind(self) -> Literal["entity"]:
        """Kind of the cells, as a bundle's manifest says it."""
        return "entity"

    @property
    def cell_counts(self) -> tuple[int, ...]:
        """Number of entities of each level."""
        return tuple(len(level.tokens) for level in self.levels)

    def assign(self, latitude_deg: npt.ArrayLike, longitude_deg: npt.ArrayLike) -> Int64Array:
        """Entities of samples on every level; see `Partition.assign`."""
        return self.city_ordinals[_nearest(self._tree, latitude_deg, longitude_deg)]

    def cell_rows(self, level: int) -> CellRows:
        """What a cell tree holds of a level's entities, which have no outlines; see `Partition.cell_rows`."""
        entities = self.levels[level - 1]
        return CellRows(
            tokens=entities.tokens,
            parents=entities.parents,
            mean_latitude_deg=entities.mean_latitude_deg,
            mean_longitude_deg=entities.mean_longitude_deg,
            spread_km=entities.spread_km,
            area_km2=entities.area_km2,
            sample_counts=entities.sample_counts,
            outlines=[np.empty((0, 2))] * len(entities.tokens),
            # A territory is convex: the city nearest to the mean of a city's samples is this city.
            places=nearest_places(
                entities.mean_latitude_deg, entities.mean_longitude_deg, min_population=MIN_POPULATION
            ),
        )

    def save(self, path: Path) -> None:
        """Writes a file for `load_partition`; equal partitions make equal files."""
        arrays: dict[str, npt.NDArray[np.generic]] = {
            "city_latitude_deg": self.city_latitude_deg,
            "city_longitude_deg": self.city_longitude_deg,
            "city_ordinals": self.city_ordinals,
        }
        for number, level in enumerate(self.levels, start=1):
            arrays |= {array_name(number, column): np.asarray(getattr(level, column)) for column in _COLUMNS}
        write_arrays(path, self.cell_kind, len(self.levels), arrays)

    @classmethod
    def from_arrays(cls, level_count: int, arrays: Mapping[str, npt.NDArray[np.generic]]) -> EntityPartition:
        """Takes a partition from the arrays that `save` wrote.

        Raises:
            KeyError: An array is missing.
            ValueError: They do not make a tree.
        """
        levels = []
        for number in range(1, level_count + 1):
            columns = {column: arrays[array_name(number, column)] for column in _COLUMNS}
            tokens = tuple(columns.pop("tokens").tolist())
            levels.append(EntityLevel(tokens=tokens, **columns))  # type: ignore[arg-type]
        cities = (arrays[name] for name in ("city_latitude_deg", "city_longitude_deg", "city_ordinals"))
        return cls(tuple(levels), *cities)  # type: ignore[arg-type]

    @cached_property
    def _tree(self) -> cKDTree:
        return cKDTree(latlng_to_unit_vector(self.city_latitude_deg, self.city_longitude_deg))


def administrative_partition(chunks: CoordinateChunks, tau_min: Sequence[float]) -> EntityPartition:
    """Partition the Earth into the countries, regions, subregions and cities that have enough samples.

    The samples are streamed in two passes. Memory holds one block of them and some numbers a city.

    Args:
        chunks: Pairs of (n,) latitudes and (n,) longitudes in degrees. They are iterated twice and must be the same
            each time: a list or an object with ``__iter__``, not a generator.
        tau_min: Samples that an entity must exceed to be kept, of the four levels.

    Returns:
        The partition, of four levels.

    Raises:
        ConfigurationError: The thresholds are not usable, the chunks cannot be iterated again or change between passes,
            or no country has more than ``tau_min[0]`` samples.
        CoordinateOutOfRangeError: A coordinate is not on the globe; the message names its chunk and row.
        ImportError: The package with the cities is not installed.
    """
    minima = [float(value) for value in tau_min]
    if len(minima) != len(ENTITY_LEVELS) or not all(np.isfinite(value) and value >= 0 for value in minima):
        raise ConfigurationError(
            f"tau_min is {minima}: administrative partitions need {len(ENTITY_LEVELS)} values, finite and not negative"
        )
    check_repeatable(chunks)
    cities = _cities()
    tree = cKDTree(latlng_to_unit_vector(cities.latitude_deg, cities.longitude_deg))
    find = functools.partial(_nearest, tree)
    sums = sum_tiles(chunks, find, len(cities.latitude_deg))
    kept_keys = _kept_keys(cities.keys, sums.counts, minima)
    tokens = [tuple(dict.fromkeys(filter(None, column))) for column in kept_keys]
    if not tokens[0]:
        raise ConfigurationError(
            f"no country has more than tau_min = {minima[0]} of {int(sums.counts.sum())} samples; lower tau_min or "
            "pass more coordinates"
        )
    ordinals = np.stack(
        [_numbers(column, level_tokens) for column, level_tokens in zip(kept_keys, tokens, strict=True)], axis=1
    )
    levels = []
    for number, statistics in enumerate(describe_cells(chunks, find, ordinals, sums)):
        parents = np.full(len(tokens[number]), -1, dtype=np.int64)
        if number:
            inside = ordinals[:, number] >= 0
            parents[ordinals[inside, number]] = ordinals[inside, number - 1]
        levels.append(
            EntityLevel(
                **vars(statistics),
                tokens=tokens[number],
                parents=parents,
                area_km2=sum_runs(ordinals[:, number], cities.area_km2),
            )
        )
    return EntityPartition(tuple(levels), cities.latitude_deg, cities.longitude_deg, ordinals)


def entity_leaf_finder(tokens: Sequence[str]) -> LeafFinder | None:
    """A function from (n,) latitudes and (n,) longitudes to the (n,) leaves that hold them, -1 where none does.

    It gives what the partition's `assign` gives, with the keys of the installed gazetteer.

    Args:
        tokens: Keys of the leaves in the order of their ordinals.

    Returns:
        The function; `None` where a key is none of this gazetteer's.

    Raises:
        ImportError: The package with the cities is not installed.
    """
    cities = _cities()
    ordinals = {token: ordinal for ordinal, token in enumerate(tokens)}
    # The finest key that is a leaf: an entity is one only where no entity inside it is.
    leaves = np.array(
        [next((ordinals[key] for key in reversed(keys) if key in ordinals), -1) for keys in cities.keys], dtype=np.int64
    )
    if len(np.unique(leaves[leaves >= 0])) < len(tokens):
        return None
    tree = cKDTree(latlng_to_unit_vector(cities.latitude_deg, cities.longitude_deg))
    return lambda latitude_deg, longitude_deg: leaves[_nearest(tree, latitude_deg, longitude_deg)]


@dataclass(frozen=True)
class _Cities:
    """The gazetteer in the order of the keys, so that the cities of every entity are one contiguous run.

    Attributes:
        keys: Keys of country, region, subregion and city of each of the m cities.
        latitude_deg: (m,) latitudes.
        longitude_deg: (m,) longitudes.
    """

    keys: tuple[tuple[str, ...], ...]
    latitude_deg: Float64Array
    longitude_deg: Float64Array

    @cached_property
    def area_km2(self) -> Float64Array:
        """(m,) areas of the cities' territories."""
        # The least distance between two generators: some cities stand metres apart.
        vectors = latlng_to_unit_vector(self.latitude_deg, self.longitude_deg)
        diagram = SphericalVoronoi(vectors, threshold=1e-9)
        return np.asarray(diagram.calculate_areas() * EARTH_RADIUS_KM**2)


@functools.lru_cache(maxsize=1)
def _cities() -> _Cities:
    gazetteer = read_gazetteer(MIN_POPULATION)
    latitude, longitude = gazetteer.latitude_deg, gazetteer.longitude_deg
    names = [(city.country_code, city.region, city.subregion, city.name) for city in gazetteer.cities]
    shared = {name for name, count in Counter(names).items() if count > 1}
    parts = []
    for row, name in enumerate(names):
        escaped = [part.replace("%", "%25").replace(_SEPARATOR, "%2F") for part in name]
        if name in shared:
            escaped[-1] += f"@{latitude[row]},{longitude[row]}"
        parts.append(tuple(escaped))
    order = sorted(range(len(parts)), key=parts.__getitem__)
    keys = tuple(
        tuple(_SEPARATOR.join(parts[row][:level]) for level in range(1, len(ENTITY_LEVELS) + 1)) for row in order
    )
    return _Cities(keys, latitude[order], longitude[order])


def _nearest(tree: cKDTree, latitude_deg: npt.ArrayLike, longitude_deg: npt.ArrayLike) -> Int64Array:
    """Rows of the cities nearest to coordinates: chords grow with great-circle distances."""
    validate_coordinates(latitude_deg, longitude_deg)
    vectors = latlng_to_unit_vector(np.atleast_1d(latitude_deg), np.atleast_1d(longitude_deg))
    return np.asarray(tree.query(vectors)[1], dtype=np.int64)


def _numbers(keys: Sequence[str], tokens: Sequence[str]) -> Int64Array:
    """Ordinals of keys among tokens; -1 for those that are empty."""
    numbers = {token: number for number, token in enumerate(tokens)} | {"": -1}
    return np.array([numbers[key] for key in keys], dtype=np.int64)


def _kept_keys(keys: Sequence[tuple[str, ...]], counts: Int64Array, tau_min: Sequence[float]) -> list[list[str]]:
    """Key of the entity of each city, level by level; empty for none."""
    kept_keys: list[list[str]] = []
    for level, low in enumerate(tau_min):
        totals: Counter[str] = Counter()
        for key, count in zip(keys, counts.tolist(), strict=True):
            totals[key[level]] += count
        if level == 0:
            kept_keys.append([key[0] if totals[key[0]] > low else "" for key in keys])
            continue
        above = kept_keys[-1]
        # An entity that stands in for its children has another key than the level that it stands on.
        kept = [name == key[level - 1] and totals[key[level]] > low for name, key in zip(above, keys, strict=True)]
        divided = {name for name, is_kept in zip(above, kept, strict=True) if is_kept}
        kept_keys.append(
            [
                key[level] if is_kept else "" if name in divided else name
                for key, name, is_kept in zip(keys, above, kept, strict=True)
            ]
        )
    return kept_keys


def _check_whole(partition: EntityPartition) -> None:
    levels, cities = partition.levels, partition.city_ordinals
    if not levels or cities.shape != (len(partition.city_latitude_deg), len(levels)):
        raise ValueError("a partition needs at least one level, and an entity or -1 for every city on each")
    if partition.city_longitude_deg.shape != partition.city_latitude_deg.shape:
        raise ValueError("the cities have latitudes and longitudes of different lengths")
    for number, level in enumerate(levels, start=1):
        count = len(level.tokens)
        columns = [getattr(level, column) for column in _COLUMNS]
        if any(len(column) != count for column in columns) or len(set(level.tokens)) != count:
            raise ValueError(f"level {number} has columns of different lengths, or a key twice")
        ordinals = cities[:, number - 1]
        if not np.array_equal(np.unique(ordinals[ordinals >= 0]), np.arange(count)):
            raise ValueError(f"an entity of level {number} has no city, or a city an entity that is not there")
        parents = np.full(count, -1, dtype=np.int64)
        if number > 1:
            above = cities[:, number - 2]
            parents[ordinals[ordinals >= 0]] = above[ordinals >= 0]
            if not np.array_equal(np.unique(parents), np.arange(len(levels[number - 2].tokens))):
                raise ValueError(f"an entity of level {number} has no parent, or one of the level before has no child")
        if not np.array_equal(level.parents, parents) or (np.diff(parents) < 0).any():
            raise ValueError(f"the parents of level {number} are out of order, or not those of its cities")
