"""What a query needs of all cells at once, read when a tree is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from geosurge.cells.environment import Environment
from geosurge.cells.layout import LEAF_COLUMNS, LEVELS_KEY, RANGE_COLUMNS
from geosurge.errors import BundleCorruptError
from geosurge.geodesy import Float64Array, Int64Array


@dataclass(frozen=True)
class LeafColumns:
    """What a query needs of all leaves at once; read-only arrays of shape (n,) in ordinal order."""

    latitude_deg: Float64Array
    longitude_deg: Float64Array
    spread_km: Float64Array
    area_km2: Float64Array
    sample_counts: Int64Array


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of all cells, level after level.

    Attributes:
        text: The tokens in UTF-8, one after the other.
        bounds: (n + 1,) where each begins, and where the last ends.
        level_starts: (L,) row of the first cell of each level.
    """

    text: bytes
    bounds: Int64Array
    level_starts: Int64Array

    def of(self, rows: Int64Array) -> list[str]:
        """Tokens of some rows."""
        begins, ends = self.bounds[rows].tolist(), self.bounds[rows + 1].tolist()
        return [self.text[begin:end].decode() for begin, end in zip(begins, ends, strict=True)]


def join_tokens(columns: dict[str, NDArray[Any]], level_count: int) -> Tokens:
    """Takes the tokens out of the columns of a tree."""
    texts = [columns.pop(f"{level}/tokens") for level in range(1, level_count + 1)]
    ends = [columns.pop(f"{level}/token_ends").astype(np.int64) for level in range(1, level_count + 1)]
    sizes, counts = [len(text) for text in texts], [len(level_ends) for level_ends in ends]
    shifted = [level_ends + before for level_ends, before in zip(ends, _starts(sizes), strict=True)]
    bounds = np.concatenate([np.zeros(1, np.int64), *shifted])
    return Tokens(b"".join(text.tobytes() for text in texts), bounds, _starts(counts))


def _starts(sizes: Sequence[int]) -> Int64Array:
    """Where parts of these sizes begin in a row of them."""
    return np.cumsum([0, *sizes[:-1]])


def read_counts(environment: Environment) -> tuple[int, ...]:
    """Cells on each level, coarsest first.

    Raises:
        BundleCorruptError: The column is missing or damaged.
    """
    with environment.lmdb.begin() as transaction:
        value = transaction.get(LEVELS_KEY, db=environment.columns)
    if not value or len(value) % 4:
        raise BundleCorruptError(f"{environment.file}: the column of level sizes is missing or damaged")
    return tuple(int(count) for count in np.frombuffer(value, "<u4"))


def read_columns(environment: Environment, counts: tuple[int, ...]) -> dict[str, NDArray[Any]]:
    """All columns by their name in the file, read-only; parents, on level 1 too, as int64.

    Args:
        environment: The tree.
        counts: Cells on each level.

    Raises:
        BundleCorruptError: A column is missing or of the wrong length.
    """
    columns: dict[str, NDArray[Any]] = {}
    with environment.lmdb.begin() as transaction:

        def read(name: str, dtype: DTypeLike, count: int | None) -> NDArray[Any]:
            value = transaction.get(name.encode(), db=environment.columns)
            size = np.dtype(dtype).itemsize
            if value is None or len(value) % size or (count is not None and len(value) != count * size):
                raise BundleCorruptError(f"{environment.file}: the column {name!r} is missing or of the wrong length")
            return np.frombuffer(value, dtype)

        for level, count in enumerate(counts, start=1):
            parents = (
                np.full(count, -1, np.int64) if level == 1 else read(f"{level}/parents", "<u4", count).astype("<i8")
            )
            parents.flags.writeable = False
            columns[f"{level}/parents"] = parents
            ends = columns[f"{level}/token_ends"] = read(f"{level}/token_ends", "<u4", count)
            columns[f"{level}/tokens"] = read(f"{level}/tokens", np.uint8, int(ends[-1]) if count else 0)
            for name in (f"{level}/{column}" for column in RANGE_COLUMNS.values()):
                if transaction.get(name.encode(), db=environment.columns) is not None:
                    columns[name] = read(name, np.uint8, 2)
        for name, dtype in LEAF_COLUMNS.items():
            columns[f"{len(counts)}/{name}"] = read(f"{len(counts)}/{name}", dtype, counts[-1])
    return columns
