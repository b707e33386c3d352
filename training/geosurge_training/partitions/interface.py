"""What partitions of every kind have in common: nested levels of cells, and the cells of a coordinate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from geosurge.cells import CellRows
from geosurge.geodesy import Float64Array, Int64Array

CellKind: TypeAlias = Literal["s2", "h3", "entity"]

FORMAT_VERSION: Final = 1
"""Of a partition's file."""


class PartitionLevel(Protocol):
    """The n cells of one level in the order of their ordinals."""

    @property
    def tokens(self) -> Sequence[str]:
        """N ids, unique within the level: S2 tokens, H3 indexes, or entity keys."""
        ...

    @property
    def parents(self) -> Int64Array:
        """(n,) ordinals on the level before, non-decreasing; -1 on level 1."""
        ...

    @property
    def sample_counts(self) -> Int64Array:
        """(n,) samples in each cell."""
        ...

    @property
    def mean_latitude_deg(self) -> Float64Array:
        """(n,) latitude of the direction of the sum of the samples' unit vectors."""
        ...

    @property
    def mean_longitude_deg(self) -> Float64Array:
        """(n,) longitude of it."""
        ...

    @property
    def spread_km(self) -> Float64Array:
        """(n,) root mean square great-circle distance of the samples to the mean."""
        ...


class Partition(Protocol):
    """Nested levels of disjoint cells, coarsest first.

    The children of a cell are one contiguous run of ordinals. Every cell of all levels but the last has a child: a cell
    that is not divided stands on the next level again, under the same token.
    """

    @property
    def cell_kind(self) -> CellKind:
        """Kind of the cells, as a bundle's manifest says it."""
        ...

    @property
    def levels(self) -> Sequence[PartitionLevel]:
        """The levels, 1 to L."""
        ...

    @property
    def cell_counts(self) -> tuple[int, ...]:
        """Number of cells of each level."""
        ...

    def assign(self, latitude_deg: npt.ArrayLike, longitude_deg: npt.ArrayLike) -> Int64Array:
        """Cells of samples on every level.

        Args:
            latitude_deg: (n,) latitudes.
            longitude_deg: (n,) longitudes.

        Returns:
            (n, L) int64 ordinals; -1 where a sample is in no cell of that level.

        Raises:
            CoordinateOutOfRangeError: A coordinate is not on the globe.
        """
        ...

    def cell_rows(self, level: int) -> CellRows:
        """What a cell tree holds of a level's cells: that, areas, outlines, and the nearest places.

        Args:
            level: 1 to L.

        Raises:
            ImportError: The package with the places is not installed.
        """
        ...

    def save(self, path: Path) -> None:
        """Writes a file for `load_partition`; equal partitions make equal files."""
        ...


def write_arrays(path: Path, kind: CellKind, level_count: int, arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
    """Writes an uncompressed .npz of plain arrays: a partition's own and what says what they are.

    Args:
        path: File to write.
        kind: Kind of the cells.
        level_count: Number of levels.
        arrays: Of names other than `format_version`, `level_count` and `cell_kind`.
    """
    about: dict[str, npt.NDArray[np.generic]] = {
        "format_version": np.array(FORMAT_VERSION),
        "level_count": np.array(level_count),
    }
    # S2 was the only kind once: its files do not say so.
    if kind != "s2":
        about["cell_kind"] = np.array(kind)
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **about, **arrays)


def array_name(level: int, column: str) -> str:
    """Name of a level's column in the file of a partition."""
    return f"level_{level}_{column}"
