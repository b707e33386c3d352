"""The reader of a tree of cells."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geosurge import geodesy
from geosurge.cells.columns import LeafColumns, join_tokens, read_columns, read_counts
from geosurge.cells.environment import acquire, corruption_of, release
from geosurge.cells.layout import DATA_FILE, LEAF_COLUMNS, RANGE_COLUMNS, set_outline
from geosurge.cells.records import CellRecords, RecordReader
from geosurge.errors import (
    BundleCorruptError,
    BundlePartialError,
    CellKindUnsupportedError,
    CellUnknownError,
    LevelOutOfRangeError,
)
from geosurge.geodesy import Int64Array
from geosurge.grids import GRIDS, Grid, containing
from geosurge.location import Place
from geosurge.s2 import CellIdArray
from geosurge.v1 import cell_pb2

MAX_CACHED_PLACES = 16_384
"""Places that a tree keeps in memory, some 10 MB: queries ask for those of the same leaves again and again."""


class CellTree:
    """A read-only tree of cells; safe to use from many threads at once."""

    def __init__(self, records: CellRecords, counts: tuple[int, ...], columns: dict[str, NDArray[Any]]) -> None:
        self._columns = columns
        self.records = records
        """The records of the cells, as the file has them."""
        self.cell_counts = counts
        """Cells on each level, coarsest first."""
        self.level_count = len(counts)
        """Number of levels, L."""
        self.leaves = LeafColumns(**{name: columns[f"{len(counts)}/{name}"] for name in LEAF_COLUMNS})
        """Coordinates, spreads, areas and sample counts of the leaves."""
        self.grid: Grid | None = next((grid for grid in GRIDS if f"1/{RANGE_COLUMNS[grid.cell_kind]}" in columns), None)
        """Grid of the cells; ``None`` when they are entities."""
        # Row i of level l has the children starts[i] to starts[i + 1] - 1 on level l + 1.
        self._child_starts = [
            np.searchsorted(self.parents(level + 1), np.arange(counts[level - 1] + 1)).astype(np.int64)
            for level in range(1, len(counts))
        ]
        # The same for the leaves under row i of each level.
        self._leaf_starts = [np.arange(counts[-1] + 1)]
        for starts in reversed(self._child_starts):
            self._leaf_starts.insert(0, self._leaf_starts[0][starts])
        self._tokens = join_tokens(columns, len(counts))
        self._places: dict[tuple[int, int], Place | None] = {}

    @classmethod
    def open(cls, path: Path) -> CellTree:
        """Opens the tree in the directory ``path``.

        A process shares one LMDB environment between all trees opened on the same file, and so does a process that is
        forked while a tree is open.

        Raises:
            BundlePartialError: There is no tree.
            BundleCorruptError: The file is damaged or misses a part.
        """
        data = path / DATA_FILE
        if not data.is_file():
            raise BundlePartialError(f"the cell tree {data} is missing; publish the bundle again")
        environment = acquire(data)
        try:
            with corruption_of(data):
                counts = read_counts(environment)
                columns = read_columns(environment, counts)
            return cls(CellRecords(environment), counts, columns)
        except BaseException:
            release(environment)
            raise

    def close(self) -> None:
        """Gives the file back; calling it again does nothing."""
        self.records.close()
        self._places = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def cell(self, level: int, ordinal: int) -> cell_pb2.Cell:
        """Reads one cell.

        Raises:
            LevelOutOfRangeError: The tree has no such level.
            CellUnknownError: The level has no such row.
        """
        self._check_ordinal(level, ordinal)
        with self.records.reading() as reader:
            return self._with_outline(reader.read(level, ordinal))

    def find(self, token: str, level: int | None = None, *, finest: bool = False) -> cell_pb2.Cell:
        """Finds a cell by its token.

        A cell that was not split stands on several levels under the same token.

        Args:
            token: Id of the cell.
            level: Level to look on; ``None`` looks on all.
            finest: Without a level, return the cell of the finest level with this token instead of the coarsest.

        Raises:
            CellUnknownError: No cell has this token.
            LevelOutOfRangeError: The tree has no such level.
        """
        if level is not None:
            self._check_level(level)
        with self.records.reading() as reader:
            found = reader.find(token, level)
            if found:
                return self._with_outline(reader.read(*found[-1 if finest else 0]))
        where = "" if level is None else f" on level {level}"
        raise CellUnknownError(f"no cell has the token {token!r}{where}; tokens of level 1 can be listed as children")

    def children(self, level: int, ordinal: int) -> range:
        """Ordinals, on the next level, of a cell's children; empty for a leaf."""
        self._check_ordinal(level, ordinal)
        if level == self.level_count:
            return range(0)
        starts = self._child_starts[level - 1]
        return range(int(starts[ordinal]), int(starts[ordinal + 1]))

    def path(self, latitude_deg: float, longitude_deg: float) -> list[cell_pb2.Cell]:
        """Cells that hold a coordinate, from level 1 down.

        The path ends where the coordinate leaves the partition, and is empty when no cell of level 1 holds it. What an
        H3 cell holds is told by H3's hierarchy: see `geosurge.hexagons`.

        Raises:
            CellKindUnsupportedError: The tree's cells are entities.
            CoordinateOutOfRangeError: The coordinate is not on the globe.
        """
        geodesy.validate_coordinates(latitude_deg, longitude_deg)
        grid = self._checked_grid("which of them holds a coordinate")
        point = np.atleast_1d(grid.latlng_to_id([latitude_deg], [longitude_deg], grid.max_resolution))
        cells: list[cell_pb2.Cell] = []
        above = 0
        with self.records.reading() as reader:
            for level in range(1, self.level_count + 1):
                coarsest, finest = (int(value) for value in self._columns[f"{level}/{RANGE_COLUMNS[grid.cell_kind]}"])
                for resolution in range(max(above, coarsest), finest + 1):
                    token = grid.id_to_token(grid.id_to_parent(point, resolution))[0]
                    found = reader.find(token, level)
                    if found:
                        cells.append(self._with_outline(reader.read(*found[0])))
                        above = resolution
                        break
                else:
                    return cells
        return cells

    def find_leaves(self, latitude_deg: ArrayLike, longitude_deg: ArrayLike) -> Int64Array:
        """Ordinals of the leaves that hold coordinates, which is where `path` ends if it reaches the last level.

        Args:
            latitude_deg: (n,) latitudes.
            longitude_deg: (n,) longitudes.

        Returns:
            (n,) ordinals; -1 where no leaf holds the coordinate.

        Raises:
            CellKindUnsupportedError: The tree's cells are entities.
            CoordinateOutOfRangeError: A coordinate is not on the globe.
            BundleCorruptError: A token is no cell of the grid.
        """
        grid = self._checked_grid("which of them holds a coordinate")
        points = grid.latlng_to_id(latitude_deg, longitude_deg, grid.max_resolution)
        return containing(grid, self.cell_ids(self.level_count), points)

    def ancestors(self, leaf_ordinals: ArrayLike) -> Int64Array:
        """Ordinals of leaves and all cells above them.

        Args:
            leaf_ordinals: (m,) ordinals of leaves; -1 pads.

        Returns:
            (m, L) ordinals, level 1 in the first column and the leaf in the last; padding gives rows of -1.
        """
        ordinals = np.asarray(leaf_ordinals, dtype=np.int64)
        result = np.empty((*ordinals.shape, self.level_count), dtype=np.int64)
        result[..., -1] = ordinals
        for level in range(self.level_count, 1, -1):
            result[..., level - 2] = self.parents(level)[result[..., level - 1]]
        result[ordinals < 0] = -1
        return result

    def leaf_range(self, level: int, ordinal: int) -> tuple[int, int]:
        """Half-open range of the ordinals of the leaves under a cell; a leaf is under itself."""
        self._check_ordinal(level, ordinal)
        starts = self._leaf_starts[level - 1]
        return int(starts[ordinal]), int(starts[ordinal + 1])

    def leaf_ranges(self, paths: Int64Array) -> Int64Array:
        """Half-open ranges of the ordinals of the leaves under whole paths, as `ancestors` returns them.

        Args:
            paths: (m, L) ordinals without padding, level 1 in the first column.

        Returns:
            (m, L, 2) first leaf and the one after the last.
        """
        ranges = np.empty((*paths.shape, 2), dtype=np.int64)
        for column, starts in enumerate(self._leaf_starts):
            ranges[:, column, 0] = starts[paths[:, column]]
            ranges[:, column, 1] = starts[paths[:, column] + 1]
        return ranges

    def tokens(self, level: int, ordinals: ArrayLike) -> list[str]:
        """Tokens of cells of one level.

        Args:
            level: 1 to L.
            ordinals: (m,) rows of that level.
        """
        self._check_level(level)
        rows = np.asarray(ordinals, dtype=np.int64)
        count = self.cell_counts[level - 1]
        # One pass for both ends: a negative number is a large one without its sign.
        if rows.size and int(rows.view(np.uint64).max()) >= count:
            raise CellUnknownError(f"level {level} has the ordinals 0 to {count - 1}, not {rows.min()} to {rows.max()}")
        return self._tokens.of(rows + self._tokens.level_starts[level - 1])

    def path_tokens(self, paths: Int64Array) -> list[list[str]]:
        """Tokens of whole paths, as `ancestors` returns them.

        Args:
            paths: (m, L) ordinals without padding, level 1 in the first column.
        """
        tokens = iter(self._tokens.of((paths + self._tokens.level_starts).ravel()))
        return [list(itertools.islice(tokens, self.level_count)) for _ in paths]

    def parents(self, level: int) -> Int64Array:
        """(n,) ordinals of the parents of a level's cells; -1 on level 1."""
        self._check_level(level)
        parents: Int64Array = self._columns[f"{level}/parents"]
        return parents

    def cell_ids(self, level: int) -> CellIdArray:
        """(n,) ids of a level's cells on their grid.

        Raises:
            CellKindUnsupportedError: The tree's cells are entities.
            LevelOutOfRangeError: The tree has no such level.
            BundleCorruptError: A token is no cell of the grid.
        """
        grid = self._checked_grid("an id on a grid")
        try:
            return grid.token_to_id(self.tokens(level, np.arange(self.cell_counts[level - 1])))
        except ValueError as error:
            raise BundleCorruptError(f"{self.records.file}: level {level}: {error}") from error

    def places(self, level: int, ordinals: Sequence[int]) -> list[Place | None]:
        """The named places nearest to cells' means, ``None`` where none is known.

        Raises:
            LevelOutOfRangeError: The tree has no such level.
            CellUnknownError: The level has no such row.
        """
        wanted = [(level, ordinal) for ordinal in ordinals]
        known = self._places
        missing = {key for key in wanted if key not in known}
        if missing or self.records.is_closed:
            with self.records.reading() as reader:
                read = {key: self._read_place(reader, *key) for key in missing}
            if len(known) + len(read) > MAX_CACHED_PLACES:
                # Other threads may be reading the old dictionary: they keep it, and this call its own part of it.
                known = self._places = {key: known[key] for key in wanted if key in known}
            known.update(read)
        return [known[key] for key in wanted]

    @property
    def cell_kind(self) -> Literal["s2", "h3", "entity"]:
        """Kind of the cells, as a manifest says it."""
        return "entity" if self.grid is None else self.grid.cell_kind

    def _read_place(self, reader: RecordReader, level: int, ordinal: int) -> Place | None:
        self._check_ordinal(level, ordinal)
        cell = reader.read(level, ordinal)
        if not cell.HasField("place"):
            return None
        place = cell.place
        return Place(place.city, place.region, place.country, place.country_code, place.distance_km)

    def _with_outline(self, cell: cell_pb2.Cell) -> cell_pb2.Cell:
        """Adds the outline of a grid's cell to a record that was stored without it."""
        if self.grid is not None and not cell.outline:
            set_outline(cell, self.grid.id_to_outline(self.grid.token_to_id([cell.token]))[0])
        return cell

    def _checked_grid(self, asked: str) -> Grid:
        if self.grid is None:
            raise CellKindUnsupportedError(
                f"this index has named places for cells, not S2 or H3 cells, and does not know {asked}; look cells up "
                "by their tokens"
            )
        return self.grid

    def _check_level(self, level: int) -> None:
        if not 1 <= level <= self.level_count:
            raise LevelOutOfRangeError(f"level is {level}, but this index has the levels 1 to {self.level_count}")

    def _check_ordinal(self, level: int, ordinal: int) -> None:
        self._check_level(level)
        count = self.cell_counts[level - 1]
        if not 0 <= ordinal < count:
            raise CellUnknownError(f"level {level} has the ordinals 0 to {count - 1}, not {ordinal}")
