"""The adaptive algorithm on H3 cells, against the H3 library's own functions, one cell at a time."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import h3
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geosurge.cells import CellTree, check_cell_tree, write_cell_tree
from geosurge.errors import ConfigurationError
from geosurge.geodesy import Float64Array, great_circle_km, spherical_mean
from geosurge.grids import H3
from geosurge_training.partitions.adaptive import adaptive_partition
from geosurge_training.partitions.grid import COLUMNS, GridPartition
from geosurge_training.partitions.load import load_partition

PENTAGONS = [h3.cell_to_latlng(cell) for cell in h3.get_pentagons(0)]
"""Hypothesis draws samples around these too, and around the poles and the antimeridian."""


@dataclass(frozen=True)
class Case:
    latitude_deg: Float64Array
    longitude_deg: Float64Array
    tau_min: tuple[float, ...]
    tau_max: tuple[float, ...]
    start: int
    finest: int

    def partition(self, chunk_size: int = 1_000_000) -> GridPartition:
        chunks = [
            (self.latitude_deg[row : row + chunk_size], self.longitude_deg[row : row + chunk_size])
            for row in range(0, len(self.latitude_deg), chunk_size)
        ]
        return adaptive_partition(
            chunks, self.tau_min, self.tau_max, grid=H3, start_resolution=self.start, max_resolution=self.finest
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    special = [*PENTAGONS, (90.0, 0.0), (-90.0, 0.0), (10.0, 180.0), (-40.0, -180.0)]
    centres = draw(st.lists(st.sampled_from(special) | st.just((48.85, 2.35)), min_size=1, max_size=4))
    count = draw(st.integers(1, 120))
    latitude, longitude = np.array(centres)[rng.integers(0, len(centres), count)].T
    scatter_deg = 10.0 ** rng.uniform(-4.0, 0.7, count)
    latitude = np.clip(latitude + rng.normal(size=count) * scatter_deg, -90.0, 90.0)
    longitude = (longitude + rng.normal(size=count) * scatter_deg + 180.0) % 360.0 - 180.0
    threshold = st.floats(0.0, 30.0) | st.integers(0, 30).map(float)
    level_count = draw(st.integers(1, 4))
    low = sorted(draw(st.lists(threshold, min_size=level_count, max_size=level_count)), reverse=True)
    above = sorted(draw(st.lists(threshold, min_size=level_count, max_size=level_count)), reverse=True)
    high = [tau_min + extra + 0.5 for tau_min, extra in zip(low, above, strict=True)]
    start = draw(st.integers(0, 3))
    return Case(latitude, longitude, tuple(low), tuple(high), start, draw(st.integers(start, 15)))


def finest_cells(case: Case) -> list[str]:
    points = zip(case.latitude_deg.tolist(), case.longitude_deg.tolist(), strict=True)
    return [h3.latlng_to_cell(latitude, longitude, 15) for latitude, longitude in points]


def oracle(case: Case) -> list[dict[str, list[int]]]:
    """The samples of the cells of each level."""
    points = finest_cells(case)

    def grouped(rows: list[int], resolution: int, low: float) -> dict[str, list[int]]:
        groups = defaultdict(list)
        for row in rows:
            groups[h3.cell_to_parent(points[row], resolution)].append(row)
        return {cell: members for cell, members in groups.items() if len(members) > low}

    def refined(cell: str, rows: list[int], low: float, high: float) -> dict[str, list[int]]:
        resolution = h3.get_resolution(cell)
        if len(rows) <= high or resolution == case.finest:
            return {cell: rows}
        children = grouped(rows, resolution + 1, low)
        if not children:
            return {cell: rows}
        return {k: v for child, members in children.items() for k, v in refined(child, members, low, high).items()}

    cells = grouped(list(range(len(points))), case.start, case.tau_min[0])
    levels = []
    for low, high in zip(case.tau_min, case.tau_max, strict=True):
        cells = {k: v for cell, rows in cells.items() for k, v in refined(cell, rows, low, high).items()}
        levels.append(cells)
    return levels


@settings(max_examples=80, deadline=None)
@given(cases(), st.integers(1, 40))
def test_cells_counts_means_and_samples_equal_a_cell_by_cell_computation(case: Case, chunk_size: int) -> None:
    expected = oracle(case)
    if not expected[0]:
        with pytest.raises(ConfigurationError, match="no cell of H3 resolution"):
            case.partition()
        return
    partition, cut = case.partition(), case.partition(chunk_size)
    ordinals = partition.assign(case.latitude_deg, case.longitude_deg)
    above: dict[str, list[int]] = {}
    for number, (level, cells) in enumerate(zip(partition.levels, expected, strict=True)):
        assert set(level.tokens) == set(cells)
        assert (np.diff(level.parents) >= 0).all()
        for ordinal, token in enumerate(level.tokens):
            rows = cells[token]
            assert level.sample_counts[ordinal] == len(rows)
            assert np.flatnonzero(ordinals[:, number] == ordinal).tolist() == sorted(rows)
            latitude, longitude = case.latitude_deg[rows], case.longitude_deg[rows]
            mean = spherical_mean(latitude, longitude)
            found = level.mean_latitude_deg[ordinal], level.mean_longitude_deg[ordinal]
            assert great_circle_km(*mean, *found) == pytest.approx(0.0, abs=1e-7)
            spread = np.sqrt(np.mean(np.square(great_circle_km(latitude, longitude, *mean))))
            assert level.spread_km[ordinal] == pytest.approx(spread, rel=1e-9, abs=1e-7)
            if number:
                parent = partition.levels[number - 1].tokens[level.parents[ordinal]]
                assert parent in above
                assert h3.cell_to_parent(token, h3.get_resolution(parent)) == parent
        above = cells
        for column in COLUMNS:
            np.testing.assert_array_equal(getattr(level, column), getattr(cut.levels[number], column))


def test_a_file_says_that_its_cells_are_h3_cells(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    points = np.degrees(np.arcsin(rng.uniform(-1, 1, 4000))), rng.uniform(-180, 180, 4000)
    partition = adaptive_partition([points], [2, 1], [60, 15], grid=H3, start_resolution=0)
    partition.save(tmp_path / "partition.npz")
    loaded = load_partition(tmp_path / "partition.npz")
    assert (loaded.cell_kind, loaded.cell_counts) == ("h3", partition.cell_counts)
    assert loaded.levels[1].tokens == partition.levels[1].tokens
    np.testing.assert_array_equal(loaded.assign(*points), partition.assign(*points))


def test_the_rows_of_a_tree_have_h3s_areas_and_outlines_and_make_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    points = np.degrees(np.arcsin(rng.uniform(-1, 1, 3000))), rng.uniform(-180, 180, 3000)
    partition = adaptive_partition([points], [2, 1], [60, 15], grid=H3, start_resolution=0)
    rows = [partition.cell_rows(level) for level in (1, 2)]
    for token, area, outline in zip(rows[1].tokens, rows[1].area_km2, rows[1].outlines, strict=True):
        assert area == pytest.approx(h3.cell_area(token, "km^2"), rel=1e-5)
        assert outline.tolist() == [list(corner) for corner in h3.cell_to_boundary(token)]
    assert rows[0].s2_levels is None
    write_cell_tree(tmp_path / "tree", rows, store_outlines=False)
    with CellTree.open(tmp_path / "tree") as tree:
        check_cell_tree(tree)
        assert tree.cell_kind == "h3"
        np.testing.assert_array_equal(tree.find_leaves(*points), partition.assign(*points)[:, -1])
