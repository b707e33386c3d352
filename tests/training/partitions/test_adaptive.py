from __future__ import annotations

import dataclasses
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import s2sphere
from hypothesis import given, settings
from hypothesis import strategies as st

from geosurge.errors import ConfigurationError, CoordinateOutOfRangeError
from geosurge.geodesy import Float64Array, great_circle_km, spherical_mean
from geosurge.s2 import cell_id_range, cell_id_to_parent, cell_id_to_s2_level, latlng_to_cell_id
from geosurge_training.partitions import samples as samples_module
from geosurge_training.partitions.adaptive import adaptive_partition
from geosurge_training.partitions.grid import COLUMNS, GridPartition
from geosurge_training.partitions.load import load_partition

PUBLISHED_TAU_MIN = 50
PUBLISHED_TAU_MAX = (25_000, 10_000, 5_000, 2_000, 1_000, 750, 500)
PUBLISHED_CELL_COUNTS = (684, 1_744, 3_298, 7_202, 12_893, 16_150, 21_673)
PUBLISHED_SAMPLE_COUNT = 4_700_000


@dataclasses.dataclass(frozen=True)
class Case:
    latitude_deg: Float64Array
    longitude_deg: Float64Array
    tau_min: tuple[float, ...]
    tau_max: tuple[float, ...]
    start_s2_level: int
    max_s2_level: int

    def partition(self, chunk_size: int = 1_000_000) -> GridPartition:
        return adaptive_partition(
            chunks_of(self.latitude_deg, self.longitude_deg, chunk_size),
            self.tau_min,
            self.tau_max,
            start_resolution=self.start_s2_level,
            max_resolution=self.max_s2_level,
        )


def chunks_of(latitude: Float64Array, longitude: Float64Array, size: int) -> list[tuple[Float64Array, Float64Array]]:
    return [(latitude[row : row + size], longitude[row : row + size]) for row in range(0, len(latitude), size)]


def clustered(count: int, clusters: int, seed: int, tail: float = 1.0) -> tuple[Float64Array, Float64Array]:
    """Points around centres of heavy-tailed popularity, scattered by 100 m to 100 km, some on the same coordinate."""
    rng = np.random.default_rng(seed)
    popularity = 1.0 / np.arange(1, clusters + 1) ** tail
    cluster = rng.choice(clusters, count, p=popularity / popularity.sum())
    latitude = np.degrees(np.arcsin(rng.uniform(-0.8, 0.95, clusters)))[cluster]
    longitude = rng.uniform(-180.0, 180.0, clusters)[cluster]
    scatter_deg = 10.0 ** rng.uniform(-3.0, 0.0, clusters)[cluster] * rng.integers(0, 8, count).clip(max=1)
    latitude = np.clip(latitude + rng.normal(size=count) * scatter_deg, -90.0, 90.0)
    longitude = longitude + rng.normal(size=count) * scatter_deg / np.cos(np.radians(np.clip(latitude, -80.0, 80.0)))
    return latitude, (longitude + 180.0) % 360.0 - 180.0


@st.composite
def cases(draw: st.DrawFn) -> Case:
    latitude, longitude = clustered(draw(st.integers(1, 120)), draw(st.integers(1, 6)), draw(st.integers(0, 10_000)))
    threshold = st.floats(0.0, 30.0) | st.integers(0, 30).map(float)
    level_count = draw(st.integers(1, 4))
    low = sorted(draw(st.lists(threshold, min_size=level_count, max_size=level_count)), reverse=True)
    above = sorted(draw(st.lists(threshold, min_size=level_count, max_size=level_count)), reverse=True)
    margin = draw(st.sampled_from([0.5, 1.0]))
    high = [tau_min + extra + margin for tau_min, extra in zip(low, above, strict=True)]
    start = draw(st.integers(0, 6))
    return Case(latitude, longitude, tuple(low), tuple(high), start, draw(st.integers(start, 30)))


def oracle_leaves(case: Case) -> list[s2sphere.CellId]:
    points = zip(case.latitude_deg.tolist(), case.longitude_deg.tolist(), strict=True)
    return [s2sphere.CellId.from_lat_lng(s2sphere.LatLng.from_degrees(*point)) for point in points]


def oracle(case: Case) -> list[dict[s2sphere.CellId, list[int]]]:
    """The samples of the cells of each level, one cell at a time."""
    leaves = oracle_leaves(case)

    def grouped(rows: Sequence[int], s2_level: int, low: float) -> dict[s2sphere.CellId, list[int]]:
        groups = defaultdict(list)
        for row in rows:
            groups[leaves[row].parent(s2_level)].append(row)
        return {cell: members for cell, members in groups.items() if len(members) > low}

    def refined(cell: s2sphere.CellId, rows: list[int], low: float, high: float) -> dict[s2sphere.CellId, list[int]]:
        if len(rows) <= high or cell.level() == case.max_s2_level:
            return {cell: rows}
        children = grouped(rows, cell.level() + 1, low)
        if not children:
            return {cell: rows}
        return {k: v for child, members in children.items() for k, v in refined(child, members, low, high).items()}

    cells = grouped(range(len(leaves)), case.start_s2_level, case.tau_min[0])
    levels = []
    for low, high in zip(case.tau_min, case.tau_max, strict=True):
        cells = {k: v for cell, rows in cells.items() for k, v in refined(cell, rows, low, high).items()}
        levels.append(cells)
    return levels


@settings(max_examples=150, deadline=None)
@given(cases())
def test_cells_counts_means_and_spreads_equal_a_cell_by_cell_computation(case: Case) -> None:
    expected = oracle(case)
    if not expected[0]:
        with pytest.raises(ConfigurationError, match="no cell of S2 level"):
            case.partition()
        return
    for level, cells in zip(case.partition().levels, expected, strict=True):
        ordered = sorted(cells)
        assert level.cell_ids.tolist() == [cell.id() for cell in ordered]
        assert level.sample_counts.tolist() == [len(cells[cell]) for cell in ordered]
        for ordinal, cell in enumerate(ordered):
            latitude, longitude = case.latitude_deg[cells[cell]], case.longitude_deg[cells[cell]]
            mean = spherical_mean(latitude, longitude)
            found = level.mean_latitude_deg[ordinal], level.mean_longitude_deg[ordinal]
            assert great_circle_km(*mean, *found) == pytest.approx(0.0, abs=1e-8)
            spread = np.sqrt(np.mean(np.square(great_circle_km(latitude, longitude, *mean))))
            assert level.spread_km[ordinal] == pytest.approx(spread, rel=1e-9, abs=1e-8)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_levels_are_disjoint_nested_and_within_bounds(case: Case) -> None:
    if not oracle(case)[0]:
        return
    levels = case.partition().levels
    assert (levels[0].parents == -1).all()
    for number, level in enumerate(levels):
        first, last = cell_id_range(level.cell_ids)
        assert (first[1:] > last[:-1]).all()
        s2_levels = cell_id_to_s2_level(level.cell_ids)
        assert ((s2_levels >= case.start_s2_level) & (s2_levels <= case.max_s2_level)).all()
        assert (level.sample_counts > case.tau_min[number]).all()
        # Above tau_max are only cells that cannot be split: at the S2 limit, or all four children at most tau_min.
        over = (level.sample_counts > case.tau_max[number]) & (s2_levels < case.max_s2_level)
        assert (level.sample_counts[over] <= 4 * case.tau_min[number]).all()
    for coarse, fine in pairwise(levels):
        parents = coarse.cell_ids[fine.parents]
        assert [
            int(cell_id_to_parent(cell_id, s2_level))
            for cell_id, s2_level in zip(fine.cell_ids, cell_id_to_s2_level(parents).tolist(), strict=True)
        ] == parents.tolist()
        assert np.unique(fine.parents).tolist() == list(range(len(coarse.cell_ids)))
        assert (np.bincount(fine.parents, fine.sample_counts) <= coarse.sample_counts).all()


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(1, 40))
def test_chunks_do_not_change_the_last_bit(case: Case, chunk_size: int) -> None:
    if not oracle(case)[0]:
        return
    whole, cut = case.partition(), case.partition(chunk_size)
    for level, other in zip(whole.levels, cut.levels, strict=True):
        for column in COLUMNS:
            np.testing.assert_array_equal(getattr(level, column), getattr(other, column))


def test_blocks_do_not_change_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    latitude, longitude = clustered(5_000, 50, seed=2)
    whole = adaptive_partition([(latitude, longitude)], [2, 1], [100, 10])
    monkeypatch.setattr(samples_module, "BLOCK_SAMPLES", 64)
    cut = adaptive_partition([(latitude, longitude)], [2, 1], [100, 10])
    for level, other in zip(whole.levels, cut.levels, strict=True):
        for column in COLUMNS:
            np.testing.assert_array_equal(getattr(level, column), getattr(other, column))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_assignment_equals_s2sphere_containment(case: Case) -> None:
    if not oracle(case)[0]:
        return
    partition = case.partition()
    ordinals = partition.assign(case.latitude_deg, case.longitude_deg)
    assert ordinals.shape == (len(case.latitude_deg), len(case.tau_max))
    for number, level in enumerate(partition.levels):
        cells = [s2sphere.CellId(cell_id) for cell_id in level.cell_ids.tolist()]
        expected = [
            next((ordinal for ordinal, cell in enumerate(cells) if cell.contains(leaf)), -1)
            for leaf in oracle_leaves(case)
        ]
        assert ordinals[:, number].tolist() == expected
        counts = np.bincount(ordinals[ordinals[:, number] >= 0, number], minlength=len(cells))
        np.testing.assert_array_equal(counts, level.sample_counts)


def test_assignment_covers_the_borders_of_cells_and_the_whole_earth() -> None:
    latitude, longitude = clustered(3_000, 40, seed=5)
    partition = adaptive_partition([(latitude, longitude)], [3, 3], [100, 20])
    rng = np.random.default_rng(0)
    elsewhere = np.degrees(np.arcsin(rng.uniform(-1, 1, 5_000))), rng.uniform(-180, 180, 5_000)
    leaf_ids = latlng_to_cell_id(*elsewhere)
    ordinals = partition.assign(*elsewhere)
    for number, level in enumerate(partition.levels):
        first, last = cell_id_range(level.cell_ids)
        inside = (leaf_ids[:, None] >= first) & (leaf_ids[:, None] <= last)
        np.testing.assert_array_equal(ordinals[:, number], np.where(inside.any(axis=1), inside.argmax(axis=1), -1))
    parents = partition.levels[1].parents[ordinals[:, 1]]
    np.testing.assert_array_equal(np.where(ordinals[:, 1] >= 0, parents, ordinals[:, 0]), ordinals[:, 0])


def test_level_counts_are_of_the_published_order_of_magnitude() -> None:
    count = 400_000
    scale = count / PUBLISHED_SAMPLE_COUNT
    latitude, longitude = clustered(count, 20_000, seed=0)
    partition = adaptive_partition(
        chunks_of(latitude, longitude, 150_000),
        [PUBLISHED_TAU_MIN * scale] * 7,
        [tau_max * scale for tau_max in PUBLISHED_TAU_MAX],
    )
    for cells, published in zip(partition.cell_counts, PUBLISHED_CELL_COUNTS, strict=True):
        assert published / 2 < cells < published * 2


def test_samples_at_one_coordinate_end_in_one_cell_of_the_finest_s2_level() -> None:
    partition = adaptive_partition(
        [(np.full(500, 48.8584), np.full(500, 2.2945))], [1, 1], [300, 10], max_resolution=17
    )
    expected = int(latlng_to_cell_id(48.8584, 2.2945, 17))
    for level in partition.levels:
        assert level.cell_ids.tolist() == [expected]
        assert level.sample_counts.tolist() == [500]
        assert level.spread_km[0] == pytest.approx(0.0, abs=1e-9)


def test_a_cell_whose_children_would_all_be_dropped_is_not_split() -> None:
    cell = s2sphere.CellId.from_token("89c25")
    centers = [child.to_lat_lng() for child in cell.children()]
    latitude = np.array([center.lat().degrees for center in centers])
    longitude = np.array([center.lng().degrees for center in centers])
    partition = adaptive_partition([(latitude, longitude)], [1, 0], [3, 3], start_resolution=cell.level())
    assert partition.levels[0].cell_ids.tolist() == [cell.id()]
    assert partition.levels[1].cell_ids.tolist() == [child.id() for child in cell.children()]


def test_a_mean_next_to_the_antimeridian_stays_there() -> None:
    latitude, longitude = np.zeros(40) + 5.0, np.linspace(-1.0, 1.0, 40)
    longitude = np.where(longitude < 0, longitude + 180.0, longitude - 180.0)
    partition = adaptive_partition([(latitude, longitude)], [1], [100], start_resolution=0)
    assert partition.cell_counts == (1,)
    assert abs(partition.levels[0].mean_longitude_deg[0]) == pytest.approx(180.0)
    assert partition.levels[0].spread_km[0] < 112.0


def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    distinct = clustered(2_000, 300, seed=3)
    chunk_size = 50_000

    class Chunks:
        def __init__(self, chunk_count: int) -> None:
            self.chunk_count = chunk_count

        def __iter__(self) -> Iterator[tuple[Float64Array, Float64Array]]:
            for seed in range(self.chunk_count):
                rows = np.random.default_rng(seed).integers(0, len(distinct[0]), chunk_size)
                yield distinct[0][rows], distinct[1][rows]

    def peak_bytes(chunk_count: int) -> int:
        samples = chunk_size * chunk_count
        tracemalloc.start()
        try:
            adaptive_partition(Chunks(chunk_count), [samples / 1e4], [samples / 1e3], max_resolution=14)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # Eight bytes for each further sample would be 6.4 million.
    assert peak_bytes(20) - peak_bytes(4) < 1_000_000


def test_single_precision_chunks_are_read_as_they_are() -> None:
    latitude, longitude = (values.astype(np.float32) for values in clustered(2_000, 20, seed=8))
    narrow = adaptive_partition([(latitude, longitude)], [2], [50])
    wide = adaptive_partition([(latitude.astype(np.float64), longitude.astype(np.float64))], [2], [50])
    np.testing.assert_array_equal(narrow.levels[0].cell_ids, wide.levels[0].cell_ids)
    np.testing.assert_array_equal(narrow.levels[0].mean_latitude_deg, wide.levels[0].mean_latitude_deg)


@pytest.mark.parametrize(
    ("tau_min", "tau_max", "message"),
    [
        ([], [], "at least one|one value a level"),
        ([1], [10, 5], "tau_min has 1 values and tau_max 2"),
        ([1, 1], [5, 10], "tau_max rises from 5.0 on level 1 to 10.0 on level 2"),
        ([1, 2], [10, 10], "tau_min rises from 1.0 on level 1 to 2.0 on level 2"),
        ([5], [5], "tau_min 5.0 of level 1 must be less than its tau_max 5.0"),
        ([1, 1], [10, 0.5], "of level 2 must be less"),
        ([-1], [5], "tau_min of level 1 is -1.0"),
        ([float("nan")], [5], "tau_min of level 1 is nan"),
        ([1], [float("inf")], "tau_max of level 1 is inf"),
    ],
)
def test_bad_thresholds_are_refused(tau_min: list[float], tau_max: list[float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        adaptive_partition([(np.zeros(100), np.zeros(100))], tau_min, tau_max)


@pytest.mark.parametrize(("start", "finest"), [(-1, 30), (5, 4), (2, 31)])
def test_bad_s2_levels_are_refused(start: int, finest: int) -> None:
    with pytest.raises(ConfigurationError, match=f"the S2 levels go from {start} to {finest}"):
        adaptive_partition([(np.zeros(100), np.zeros(100))], [1], [10], start_resolution=start, max_resolution=finest)


@pytest.mark.parametrize("chunks", [[], [(np.zeros(0), np.zeros(0))], [(np.zeros(3), np.zeros(3))]])
def test_a_partition_without_cells_is_refused(chunks: list[tuple[Float64Array, Float64Array]]) -> None:
    with pytest.raises(ConfigurationError, match=r"no cell of S2 level 2 has more than tau_min = 5\.0 samples"):
        adaptive_partition(chunks, [5], [10])


def test_chunks_that_can_be_read_only_once_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="read only once"):
        adaptive_partition(iter([(np.zeros(100), np.zeros(100))]), [1], [10])


def test_chunks_that_change_between_passes_are_refused() -> None:
    class Shrinking:
        size = 100

        def __iter__(self) -> Iterator[tuple[Float64Array, Float64Array]]:
            self.size -= 1
            yield np.zeros(self.size), np.zeros(self.size)

    with pytest.raises(ConfigurationError, match="gave 99 samples on the first pass and 98 on a later one"):
        adaptive_partition(Shrinking(), [1], [10])


def test_bad_coordinates_are_refused_with_chunk_and_row() -> None:
    with pytest.raises(CoordinateOutOfRangeError, match=r"chunk 1, row 2: latitude_deg=nan"):
        adaptive_partition([(np.zeros(9), np.zeros(9)), (np.array([0, 0, np.nan]), np.zeros(3))], [1], [10])


@pytest.mark.parametrize("longitude", [np.zeros(3), np.zeros((4, 1))])
def test_chunks_of_different_shapes_are_refused(longitude: Float64Array) -> None:
    with pytest.raises(ConfigurationError, match="chunk 0: latitudes of shape"):
        adaptive_partition([(np.zeros(4), longitude)], [1], [10])


@pytest.fixture
def partition() -> GridPartition:
    return adaptive_partition([clustered(4_000, 30, seed=1)], [2, 2, 1], [400, 100, 20])


def test_save_and_load_round_trip(partition: GridPartition, tmp_path: Path) -> None:
    first, second = tmp_path / "partition.npz", tmp_path / "without-suffix"
    partition.save(first)
    loaded = load_partition(first)
    loaded.save(second)
    assert first.read_bytes() == second.read_bytes()
    assert loaded.cell_counts == partition.cell_counts
    points = clustered(500, 30, seed=1)
    np.testing.assert_array_equal(loaded.assign(*points), partition.assign(*points))
    for level, other in zip(partition.levels, loaded.levels, strict=True):
        for column in COLUMNS:
            values, read = getattr(level, column), getattr(other, column)
            assert values.dtype == read.dtype
            np.testing.assert_array_equal(values, read)


def changed(path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    with np.load(path, allow_pickle=False) as archive:
        arrays = dict(archive)
    change(arrays)
    np.savez(path, **arrays)


def test_files_that_are_no_partition_are_refused(partition: GridPartition, tmp_path: Path) -> None:
    path = tmp_path / "partition.npz"

    def refused(message: str) -> None:
        with pytest.raises(ConfigurationError, match=message) as failure:
            load_partition(path)
        assert str(path) in str(failure.value)

    refused("No such file")
    path.write_bytes(b"")
    refused("not a readable partition")
    path.write_bytes(b"not an archive")
    refused("not a readable partition")
    partition.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    refused("not a readable partition")
    np.save(path.open("wb"), np.zeros(3))
    refused("not a readable partition")

    def newer(arrays: dict[str, np.ndarray]) -> None:
        arrays["format_version"] = np.array(2)

    def pickled(arrays: dict[str, np.ndarray]) -> None:
        arrays["level_1_spread_km"] = np.array([object()], dtype=object)

    def misses_a_column(arrays: dict[str, np.ndarray]) -> None:
        del arrays["level_3_spread_km"]

    def swaps_cells(arrays: dict[str, np.ndarray]) -> None:
        arrays["level_2_cell_ids"] = arrays["level_2_cell_ids"][::-1]

    def moves_a_child(arrays: dict[str, np.ndarray]) -> None:
        arrays["level_2_parents"] = np.roll(arrays["level_2_parents"], 1)

    def loses_a_leaf(arrays: dict[str, np.ndarray]) -> None:
        arrays["level_3_spread_km"] = arrays["level_3_spread_km"][:-1]

    for change, message in (
        (newer, "format 2; this version reads format 1"),
        (pickled, "allow_pickle"),
        (misses_a_column, "level_3_spread_km"),
        (swaps_cells, "the cells of level 2 overlap or are not in ascending order"),
        (moves_a_child, "the parents of level 2 are not the cells"),
        (loses_a_leaf, "columns of different lengths"),
    ):
        partition.save(path)
        changed(path, change)
        refused(message)


def test_levels_with_a_childless_cell_are_refused(partition: GridPartition) -> None:
    coarse, fine = partition.levels[:2]
    orphaned = fine.parents != 0
    columns = {column: getattr(fine, column)[orphaned] for column in COLUMNS}
    with pytest.raises(ValueError, match="a cell of the level before has no child"):
        GridPartition((coarse, dataclasses.replace(fine, **columns)))
    with pytest.raises(ValueError, match="at least one level"):
        GridPartition(())
