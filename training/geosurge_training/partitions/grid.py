"""Partitions into cells of a discrete global grid, S2 or H3: disjoint, nested, of mixed resolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from geosurge.cells import CellRows
from geosurge.geodesy import Int64Array
from geosurge.grids import Grid, containing
from geosurge.s2 import CellIdArray
from geosurge_training.partitions.interface import CellKind, array_name, write_arrays
from geosurge_training.partitions.samples import CellStatistics
from geosurge_training.places import nearest_places

COLUMNS: Final = ("cell_ids", "parents", "sample_counts", "mean_latitude_deg", "mean_longitude_deg", "spread_km")
"""What a file holds of each level."""


@dataclass(frozen=True)
class GridLevel(CellStatistics):
    """The cells of one level, in ascending order of id, which is the order of their ordinals.

    Attributes:
        grid: The grid.
        cell_ids: (n,) uint64 ids on the grid, disjoint.
        parents: (n,) int64 ordinals on the level before, non-decreasing; -1 on level 1.
    """

    grid: Grid
    cell_ids: CellIdArray
    parents: Int64Array

    @cached_property
    def tokens(self) -> Sequence[str]:
        """The grid's own names of the cells."""
        return self.grid.id_to_token(self.cell_ids)


@dataclass(frozen=True)
class GridPartition:
    """Nested levels of disjoint cells of a grid, coarsest first.

    Attributes:
        levels: The levels, 1 to L.

    Raises:
        ValueError: On construction, if cells of a level overlap or are out of order, a parent does not contain its
            child, or a cell has no child on the next level.
    """

    levels: tuple[GridLevel, ...]

    def __post_init__(self) -> None:
        _check_nested(self.levels)

    @property
    def grid(self) -> Grid:
        """The grid of all levels."""
        return self.levels[0].grid

    @property
    def cell_kind(self) -> CellKind:
        """Kind of the cells, as a bundle's manifest says it."""
        return self.grid.cell_kind

    @property
    def cell_counts(self) -> tuple[int, ...]:
        """Number of cells of each level."""
        return tuple(len(level.cell_ids) for level in self.levels)

    def assign(self, latitude_deg: npt.ArrayLike, longitude_deg: npt.ArrayLike) -> Int64Array:
        """Cells of samples on every level; see `Partition.assign`."""
        points = self.grid.latlng_to_id(latitude_deg, longitude_deg, self.grid.max_resolution).reshape(-1)
        return self._intervals.ordinals[self._intervals.find(points)]

    def cell_rows(self, level: int) -> CellRows:
        """What a cell tree holds of a level's cells; see `Partition.cell_rows`."""
        cells, grid = self.levels[level - 1], self.grid
        resolutions = grid.id_to_resolution(cells.cell_ids)
        return CellRows(
            tokens=cells.tokens,
            parents=cells.parents,
            mean_latitude_deg=cells.mean_latitude_deg,
            mean_longitude_deg=cells.mean_longitude_deg,
            spread_km=cells.spread_km,
            area_km2=grid.id_to_area_km2(cells.cell_ids),
            sample_counts=cells.sample_counts,
            outlines=grid.id_to_outline(cells.cell_ids),
            s2_levels=resolutions if grid.cell_kind == "s2" else None,
            h3_resolutions=resolutions if grid.cell_kind == "h3" else None,
            places=nearest_places(cells.mean_latitude_deg, cells.mean_longitude_deg),
        )

    def save(self, path: Path) -> None:
        """Writes a file for `load_partition`; equal partitions make equal files."""
        arrays = {
            array_name(number, column): getattr(level, column)
            for number, level in enumerate(self.levels, start=1)
            for column in COLUMNS
        }
        write_arrays(path, self.cell_kind, len(self.levels), arrays)

    @classmethod
    def from_arrays(cls, grid: Grid, level_count: int, arrays: Mapping[str, npt.NDArray[np.generic]]) -> GridPartition:
        """Takes a partition from the arrays that `save` wrote.

        Raises:
            KeyError: An array is missing.
            ValueError: The levels are not nested.
        """
        return cls(
            tuple(
                GridLevel(grid=grid, **{column: arrays[array_name(number, column)] for column in COLUMNS})  # type: ignore[arg-type]
                for number in range(1, level_count + 1)
            )
        )

    @cached_property
    def _intervals(self) -> Intervals:
        return Intervals.of(self.grid, [level.cell_ids for level in self.levels])


@dataclass(frozen=True)
class Intervals:
    """The ids of the finest resolution, cut at every border of every cell of every level.

    Inside an interval, every id is in the same cells. One binary search therefore answers for all levels.

    Attributes:
        starts: (m,) uint64 first id of each interval, ascending from 0.
        ordinals: (m, L) int64 cell on each level, -1 for none.
    """

    starts: CellIdArray
    ordinals: Int64Array = field(repr=False)

    @classmethod
    def of(cls, grid: Grid, cell_ids: Sequence[CellIdArray]) -> Intervals:
        """Intervals of the levels' ascending cell ids."""
        first, last = grid.id_range(np.unique(np.concatenate(cell_ids)))
        starts = np.unique(np.concatenate([np.zeros(1, dtype=np.uint64), first, last + np.uint64(1)]))
        return cls(starts, np.stack([containing(grid, ids, starts) for ids in cell_ids], axis=1))

    def find(self, ids: CellIdArray) -> Int64Array:
        """Rows of the intervals that hold ids of the finest resolution."""
        return np.searchsorted(self.starts, ids, side="right") - 1


def _check_nested(levels: Sequence[GridLevel]) -> None:
    if not levels:
        raise ValueError("a partition needs at least one level")
    coarser: CellIdArray | None = None
    for number, level in enumerate(levels, start=1):
        grid, ids = level.grid, level.cell_ids
        if len(ids) == 0 or any(getattr(level, column).shape != ids.shape for column in COLUMNS):
            raise ValueError(f"level {number} has no cells, or columns of different lengths")
        first, last = grid.id_range(ids)
        if not (first[1:] > last[:-1]).all():
            raise ValueError(f"the cells of level {number} overlap or are not in ascending order")
        expected = np.full(len(ids), -1, dtype=np.int64) if coarser is None else containing(grid, coarser, ids)
        if not np.array_equal(level.parents, expected):
            raise ValueError(f"the parents of level {number} are not the cells that contain its cells a level before")
        if coarser is not None and not np.array_equal(np.unique(expected), np.arange(len(coarser))):
            raise ValueError(f"a cell of level {number} has no parent, or a cell of the level before has no child")
        coarser = ids
