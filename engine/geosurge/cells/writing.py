"""Writes a tree of cells: records, tokens and columns."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from lmdb import _Database
from numpy.typing import NDArray

from geosurge.cells.layout import (
    DATABASES,
    LEAF_COLUMNS,
    LEVELS_KEY,
    RANGE_COLUMNS,
    cell_key,
    pack_ordinal,
    set_outline,
    token_prefix,
)
from geosurge.cells.rows import CellRows, grid_resolutions, validate_rows
from geosurge.v1 import cell_pb2


def write_cell_tree(path: Path, levels: Sequence[CellRows], *, store_outlines: bool = True) -> None:
    """Writes a tree into the directory ``path``, which must not exist or be empty.

    Args:
        path: Directory to make, ``cells.lmdb`` by convention.
        levels: Cells of each level, coarsest first.
        store_outlines: Keep the outlines of S2 and H3 cells in the records. Without them the file is a third smaller,
            and readers compute them from the tokens.

    Raises:
        ValueError: The rows do not form a tree, or are S2 or H3 cells that overlap, do not ascend along their grid or
            leave their parents; names the level and the first bad row.
        FileExistsError: The directory holds something.
    """
    validate_rows(levels)
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        raise FileExistsError(f"{path} is not empty; write the tree to a new directory")
    # A compacting copy is what makes the file as small as its data, so the pages are first written beside it.
    scratch = Path(tempfile.mkdtemp(prefix=".cells-", dir=path.parent))
    try:
        with lmdb.open(
            str(scratch), map_size=_map_size(levels), max_dbs=3, lib_version=0, lock=False, sync=False
        ) as environment:
            databases = [environment.open_db(name) for name in DATABASES]
            with environment.begin(write=True) as transaction:
                _write_records(transaction, databases[0], levels, store_outlines=store_outlines)
                _write_tokens(transaction, databases[1], levels)
                _write_columns(transaction, databases[2], levels)
            environment.copy(str(path), compact=True)
    finally:
        shutil.rmtree(scratch)


def _write_records(
    transaction: lmdb.Transaction, database: _Database, levels: Sequence[CellRows], *, store_outlines: bool
) -> None:
    for level, rows in enumerate(levels, start=1):
        below = levels[level].parents if level < len(levels) else None
        starts = None if below is None else np.searchsorted(below, np.arange(len(rows.tokens) + 1))
        resolutions = grid_resolutions(rows)
        for ordinal, token in enumerate(rows.tokens):
            cell = cell_pb2.Cell(
                token=token,
                level=level,
                ordinal=ordinal,
                mean=cell_pb2.Coordinate(
                    latitude_deg=rows.mean_latitude_deg[ordinal], longitude_deg=rows.mean_longitude_deg[ordinal]
                ),
                spread_km=rows.spread_km[ordinal],
                sample_count=int(rows.sample_counts[ordinal]),
                area_km2=rows.area_km2[ordinal],
            )
            if store_outlines or not resolutions:
                set_outline(cell, rows.outlines[ordinal])
            if level > 1:
                cell.parent_ordinal = int(rows.parents[ordinal])
            if starts is not None:
                cell.first_child_ordinal = int(starts[ordinal])
                cell.last_child_ordinal = int(starts[ordinal + 1]) - 1
            if rows.s2_levels is not None:
                cell.s2_level = int(rows.s2_levels[ordinal])
            place = rows.places[ordinal] if rows.places else None
            if place is not None:
                cell.place.CopyFrom(
                    cell_pb2.Place(
                        city=place.city,
                        region=place.region,
                        country=place.country,
                        country_code=place.country_code,
                        distance_km=place.distance_km,
                    )
                )
            value = cell.SerializeToString(deterministic=True)
            transaction.put(cell_key(level, ordinal), value, db=database, append=True)


def _write_tokens(transaction: lmdb.Transaction, database: _Database, levels: Sequence[CellRows]) -> None:
    entries = sorted(
        (token_prefix(token) + bytes([level]), ordinal)
        for level, rows in enumerate(levels, start=1)
        for ordinal, token in enumerate(rows.tokens)
    )
    for key, ordinal in entries:
        transaction.put(key, pack_ordinal(ordinal), db=database, append=True)


def _write_columns(transaction: lmdb.Transaction, database: _Database, levels: Sequence[CellRows]) -> None:
    columns: dict[str, NDArray[Any]] = {LEVELS_KEY.decode(): np.array([len(rows.tokens) for rows in levels], "<u4")}
    for level, rows in enumerate(levels, start=1):
        if level > 1:
            columns[f"{level}/parents"] = rows.parents.astype("<u4")
        encoded = [token.encode() for token in rows.tokens]
        columns[f"{level}/tokens"] = np.frombuffer(b"".join(encoded), np.uint8)
        columns[f"{level}/token_ends"] = np.cumsum([len(token) for token in encoded]).astype("<u4")
        for kind, resolutions in grid_resolutions(rows).items():
            columns[f"{level}/{RANGE_COLUMNS[kind]}"] = np.array([resolutions.min(), resolutions.max()], np.uint8)
    leaves = levels[-1]
    arrays = (
        leaves.mean_latitude_deg,
        leaves.mean_longitude_deg,
        leaves.spread_km,
        leaves.area_km2,
        leaves.sample_counts,
    )
    for (name, dtype), array in zip(LEAF_COLUMNS.items(), arrays, strict=True):
        columns[f"{len(levels)}/{name}"] = np.asarray(array).astype(dtype)
    for name, array in columns.items():
        transaction.put(name.encode(), array.tobytes(), db=database)


def _map_size(levels: Sequence[CellRows]) -> int:
    """An upper bound of the bytes that a tree needs before it is compacted; the file is only as large as its data."""
    cells = sum(len(rows.tokens) for rows in levels)
    corners = sum(len(outline) for rows in levels for outline in rows.outlines)
    return (64 << 20) + cells * 4096 + corners * 64
