"""What S2 and H3 have in common: cells that subdivide the Earth ever finer and are numbered along the tree.

Ids of a grid ascend along a walk through its tree, so that everything inside a cell is one contiguous range of ids.
Whatever holds for ranges of ids (which cell contains which, where a coordinate belongs) is then the same for all grids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from geosurge import hexagons, s2
from geosurge.geodesy import Float64Array, Int64Array
from geosurge.s2 import CellIdArray


@dataclass(frozen=True)
class Grid:
    """A discrete global grid.

    Attributes:
        cell_kind: Its cells' kind, as a bundle's manifest says it.
        name: Its name.
        resolution_name: What the grid calls the fineness of a cell.
        max_resolution: The finest; 0 is the coarsest.
        latlng_to_id: (n,) latitudes, (n,) longitudes and a resolution to (n,) ids.
        id_to_resolution: Ids to resolutions.
        id_to_parent: Ids and a resolution to the ancestors of this resolution.
        id_to_children: (...) ids to (..., k) ascending ids of the next resolution; an id may stand for no place.
        id_range: Ids to the first and the last id of the finest resolution inside each cell.
        id_to_token: (n,) ids to n tokens.
        token_to_id: n tokens to (n,) ids; raises `ValueError` for what is no cell.
        id_to_area_km2: (n,) ids to (n,) areas.
        id_to_outline: (n,) ids to n arrays (k, 2) of latitudes and longitudes of corners, counter-clockwise.
    """

    cell_kind: Literal["s2", "h3"]
    name: str
    resolution_name: str
    max_resolution: int
    latlng_to_id: Callable[[npt.ArrayLike, npt.ArrayLike, int], CellIdArray]
    id_to_resolution: Callable[[npt.ArrayLike], Int64Array]
    id_to_parent: Callable[[npt.ArrayLike, int], CellIdArray]
    id_to_children: Callable[[npt.ArrayLike], CellIdArray]
    id_range: Callable[[npt.ArrayLike], tuple[CellIdArray, CellIdArray]]
    id_to_token: Callable[[npt.ArrayLike], list[str]]
    token_to_id: Callable[[Iterable[str]], CellIdArray]
    id_to_area_km2: Callable[[npt.ArrayLike], Float64Array]
    id_to_outline: Callable[[npt.ArrayLike], Sequence[Float64Array]]


S2: Final = Grid(
    cell_kind="s2",
    name="S2",
    resolution_name="S2 level",
    max_resolution=s2.MAX_S2_LEVEL,
    latlng_to_id=s2.latlng_to_cell_id,
    id_to_resolution=s2.cell_id_to_s2_level,
    id_to_parent=s2.cell_id_to_parent,
    id_to_children=s2.cell_id_to_children,
    id_range=s2.cell_id_range,
    id_to_token=s2.cell_id_to_token,
    token_to_id=s2.token_to_cell_id,
    id_to_area_km2=s2.cell_id_to_area_km2,
    id_to_outline=lambda ids: list(s2.cell_id_to_outline(ids)),
)

H3: Final = Grid(
    cell_kind="h3",
    name="H3",
    resolution_name="H3 resolution",
    max_resolution=hexagons.MAX_H3_RESOLUTION,
    latlng_to_id=hexagons.latlng_to_h3_id,
    id_to_resolution=hexagons.h3_id_to_resolution,
    id_to_parent=hexagons.h3_id_to_parent,
    id_to_children=hexagons.h3_id_to_children,
    id_range=hexagons.h3_id_range,
    id_to_token=hexagons.h3_id_to_token,
    token_to_id=hexagons.token_to_h3_id,
    id_to_area_km2=hexagons.h3_id_to_area_km2,
    id_to_outline=hexagons.h3_id_to_outline,
)

GRIDS: Final = (S2, H3)


def containing(grid: Grid, cell_ids: CellIdArray, ids: CellIdArray) -> Int64Array:
    """Rows of the cells that contain other cells.

    Args:
        grid: The cells' grid.
        cell_ids: (n,) disjoint cells in ascending order.
        ids: Ids of any shape: cells that are nowhere larger than those, or of the finest resolution.

    Returns:
        int64 rows in the shape of the ids; -1 where no cell contains them.
    """
    if len(cell_ids) == 0:
        return np.full(ids.shape, -1, dtype=np.int64)
    first, last = grid.id_range(cell_ids)
    rows = np.searchsorted(first, ids, side="right") - 1
    return np.where((rows >= 0) & (ids <= last[rows]), rows, -1)
