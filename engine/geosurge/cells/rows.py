"""The cells of a level as a builder gives them, and the check that the levels form a tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from geosurge import geodesy
from geosurge.cells.layout import MAX_LEVELS, MAX_TOKEN_BYTES
from geosurge.cells.rules import link_problem, nesting_problem
from geosurge.geodesy import Float64Array, Int64Array
from geosurge.grids import GRIDS
from geosurge.location import Place


@dataclass(frozen=True)
class CellRows:
    """The cells of one level as columns, in ordinal order.

    Attributes:
        tokens: Ids of the n cells, unique within the level.
        parents: (n,) ordinals of the parents on the level above, never decreasing; -1 on level 1.
        mean_latitude_deg: (n,) latitude of the cells' answer.
        mean_longitude_deg: (n,) longitude of the cells' answer.
        spread_km: (n,) root-mean-square great-circle distance of the samples to the mean.
        area_km2: (n,) areas.
        sample_counts: (n,) training coordinates in each cell.
        outlines: n arrays (k, 2) of [latitude, longitude] corners in degrees, counter-clockwise.
        s2_levels: (n,) subdivision levels; ``None`` when the cells are not S2 cells.
        h3_resolutions: (n,) H3 resolutions; ``None`` when the cells are not H3 cells.
        places: The place nearest to each mean; empty when none is known for any.
    """

    tokens: Sequence[str]
    parents: Int64Array
    mean_latitude_deg: Float64Array
    mean_longitude_deg: Float64Array
    spread_km: Float64Array
    area_km2: Float64Array
    sample_counts: Int64Array
    outlines: Sequence[Float64Array]
    s2_levels: Int64Array | None = None
    h3_resolutions: Int64Array | None = None
    places: Sequence[Place | None] = field(default=())


def grid_resolutions(rows: CellRows) -> dict[str, Int64Array]:
    """Resolutions of the cells by the kind of their grid; entities have none."""
    known = {"s2": rows.s2_levels, "h3": rows.h3_resolutions}
    return {kind: resolutions for kind, resolutions in known.items() if resolutions is not None}


def validate_rows(levels: Sequence[CellRows]) -> None:
    """Checks that the rows form a tree.

    Args:
        levels: Cells of each level, coarsest first.

    Raises:
        ValueError: They do not, or are S2 or H3 cells that overlap, do not ascend along their grid or leave their
            parents; names the level and the first bad row.
    """
    if not 1 <= len(levels) <= MAX_LEVELS:
        raise ValueError(f"a tree has 1 to {MAX_LEVELS} levels, not {len(levels)}")
    counts = tuple(len(rows.tokens) for rows in levels)
    kinds = {tuple(grid_resolutions(rows)) for rows in levels}
    if len(kinds) > 1 or max(map(len, kinds)) > 1:
        raise ValueError("s2_levels, or h3_resolutions, or neither of them must be given for all levels")
    for level, rows in enumerate(levels, start=1):
        _validate_columns(rows, level)
        _validate_tokens(rows, level)
        problem = link_problem(np.asarray(rows.parents), level, counts)
        if problem:
            raise ValueError(problem)
    for grid in (grid for grid in GRIDS if grid.cell_kind in grid_resolutions(levels[0])):
        ids = [grid.token_to_id(rows.tokens) for rows in levels]
        for level, (cells, rows) in enumerate(zip(ids, levels, strict=True), start=1):
            above = ids[level - 2] if level > 1 else None
            problem = nesting_problem(grid, cells, above, np.asarray(rows.parents), level)
            if problem:
                raise ValueError(problem)


def _validate_columns(rows: CellRows, level: int) -> None:
    count = len(rows.tokens)
    if count == 0:
        raise ValueError(f"level {level} has no cells")
    for name in ("parents", "mean_latitude_deg", "mean_longitude_deg", "spread_km", "area_km2", "sample_counts"):
        if np.shape(getattr(rows, name)) != (count,):
            raise ValueError(f"level {level}: {name} has the shape {np.shape(getattr(rows, name))}, not ({count},)")
    if len(rows.outlines) != count or len(rows.places) not in (0, count):
        raise ValueError(f"level {level}: {count} cells, {len(rows.outlines)} outlines and {len(rows.places)} places")
    geodesy.validate_coordinates(rows.mean_latitude_deg, rows.mean_longitude_deg)
    given = grid_resolutions(rows)
    for grid in (grid for grid in GRIDS if grid.cell_kind in given):
        resolutions = given[grid.cell_kind]
        if np.shape(resolutions) != (count,):
            raise ValueError(
                f"level {level}: the {grid.resolution_name}s have the shape {np.shape(resolutions)}, not ({count},)"
            )
        actual = grid.id_to_resolution(grid.token_to_id(list(rows.tokens)))
        wrong = np.flatnonzero(actual != resolutions)
        if wrong.size:
            row = int(wrong[0])
            raise ValueError(
                f"level {level}, row {row}: the cell {rows.tokens[row]!r} is of {grid.resolution_name} {actual[row]}, "
                f"not {resolutions[row]}"
            )


def _validate_tokens(rows: CellRows, level: int) -> None:
    seen: set[str] = set()
    for ordinal, token in enumerate(rows.tokens):
        if not token or "\x00" in token or len(token.encode()) > MAX_TOKEN_BYTES:
            raise ValueError(
                f"level {level}, row {ordinal}: the token {token!r} is empty, holds a NUL or is longer than "
                f"{MAX_TOKEN_BYTES} bytes"
            )
        if token in seen:
            raise ValueError(f"level {level}, row {ordinal}: the token {token!r} stands twice on the level")
        seen.add(token)
