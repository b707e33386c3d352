"""H3 cells of many coordinates at once, and their hierarchy as arithmetic on whole numbers.

An H3 index has a header (its kind and its resolution), a base cell (0 to 121) and fifteen digits of three bits, one a
resolution: 0 to 6 where the cell has been subdivided, 7 beyond its resolution (h3geo.org, "H3 index bit layout"). The
*id* of a cell here is the index without the header. Everything below a cell is then one contiguous range of ids, as it
is for S2: a parent's id is its child's with digits set to 7, and is the last of the range.

A cell contains what its index contains, by H3's own relation ``cell_to_parent``. Hexagons do not tile a larger hexagon,
so this is not quite what lies inside the cell's outline: a coordinate belongs to the ancestors of its cell of
resolution 15, which near an outline may differ from ``latlng_to_cell`` at the coarser resolution. Only so do the cells
of all resolutions make one tree. A pentagon has no child with the digit 1: no coordinate has such an id.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import repeat
from typing import Final

import h3
import h3.api.basic_int as h3_int
import numpy as np
import numpy.typing as npt

from geosurge.geodesy import EARTH_RADIUS_KM, Float64Array, Int64Array, validate_coordinates
from geosurge.s2 import CellIdArray

MAX_H3_RESOLUTION: Final = 15
"""Finest resolution; its cells are about a square metre large."""

_DIGIT_BITS: Final = 3
_DIGITS: Final = np.uint64((1 << (_DIGIT_BITS * MAX_H3_RESOLUTION)) - 1)
_ID: Final = np.uint64((1 << 52) - 1)
_CELL_MODE: Final = np.uint64(1 << 59)
_TOKEN_PATTERN: Final = re.compile(r"[0-9a-fA-F]{15}")
_RESOLUTION_SHIFT: Final = np.uint64(52)


def latlng_to_h3_id(
    latitude_deg: npt.ArrayLike, longitude_deg: npt.ArrayLike, resolution: int = MAX_H3_RESOLUTION
) -> CellIdArray:
    """Cells of coordinates: of the cells of resolution 15 around them, the ancestors at a resolution.

    The projection is the H3 library's, one coordinate at a time; everything after it is arithmetic on arrays.

    Args:
        latitude_deg: (n,) latitudes, or one.
        longitude_deg: (n,) longitudes, or one.
        resolution: Resolution of the cells, 0 to 15.

    Returns:
        (n,) uint64 ids.

    Raises:
        CoordinateOutOfRangeError: A coordinate is not on the globe.
    """
    validate_coordinates(latitude_deg, longitude_deg)
    latitude = np.atleast_1d(np.asarray(latitude_deg, dtype=np.float64))
    longitude = np.atleast_1d(np.asarray(longitude_deg, dtype=np.float64))
    indexes = map(h3_int.latlng_to_cell, latitude.tolist(), longitude.tolist(), repeat(MAX_H3_RESOLUTION))
    return h3_id_to_parent(np.fromiter(indexes, np.uint64, len(latitude)) & _ID, resolution)


def h3_id_to_resolution(ids: npt.ArrayLike) -> Int64Array:
    """Resolutions of cells, in the shape of the ids."""
    used = ~np.asarray(ids, dtype=np.uint64) & _DIGITS
    lowest = used & (~used + np.uint64(1))
    # The exponent of a power of two is exact in float64; of 0, a cell whose digits are all 7, it is set below.
    bit = np.frexp(lowest.astype(np.float64))[1].astype(np.int64) - 1
    return np.where(used == 0, 0, MAX_H3_RESOLUTION - bit // _DIGIT_BITS)


def h3_id_to_parent(ids: npt.ArrayLike, resolution: int) -> CellIdArray:
    """Ancestors at a resolution, in the shape of the ids; none of the cells may be coarser than that.

    Raises:
        ValueError: The resolution is not one of 0 to 15.
    """
    if not 0 <= resolution <= MAX_H3_RESOLUTION:
        raise ValueError(f"resolution is {resolution}; H3 has the resolutions 0 to {MAX_H3_RESOLUTION}")
    beyond = np.uint64((1 << (_DIGIT_BITS * (MAX_H3_RESOLUTION - resolution))) - 1)
    return np.asarray(ids, dtype=np.uint64) | beyond


def h3_id_to_children(ids: npt.ArrayLike) -> CellIdArray:
    """Ids below cells on the next resolution, ascending.

    Args:
        ids: Ids of any shape, none of resolution 15.

    Returns:
        Ids of that shape and one more axis of 7. The second child of a pentagon is no cell, and no coordinate has it.

    Raises:
        ValueError: A cell has no children.
    """
    cells = np.asarray(ids, dtype=np.uint64)
    resolutions = h3_id_to_resolution(cells)
    if np.any(resolutions == MAX_H3_RESOLUTION):
        raise ValueError(f"a cell of resolution {MAX_H3_RESOLUTION} has no children")
    shifts = (_DIGIT_BITS * (MAX_H3_RESOLUTION - 1 - resolutions)).astype(np.uint64)[..., np.newaxis]
    missing = np.arange(7, 0, -1, dtype=np.uint64)
    return cells[..., np.newaxis] - (missing << shifts)


def h3_id_range(ids: npt.ArrayLike) -> tuple[CellIdArray, CellIdArray]:
    """First and last id of what is below cells, themselves included, in the shape of the ids."""
    cells = np.asarray(ids, dtype=np.uint64)
    beyond = (_DIGIT_BITS * (MAX_H3_RESOLUTION - h3_id_to_resolution(cells))).astype(np.uint64)
    return cells - ((np.uint64(1) << beyond) - np.uint64(1)), cells


def h3_id_to_token(ids: npt.ArrayLike) -> list[str]:
    """H3's own names of (n,) cells: the index in hexadecimal digits."""
    return [f"{index:x}" for index in _indexes(ids)]


def token_to_h3_id(tokens: Iterable[str]) -> CellIdArray:
    """Ids of the cells that H3's names stand for.

    Raises:
        ValueError: A name is not that of an H3 cell.
    """
    names = list(tokens)
    for row, name in enumerate(names):
        if not _TOKEN_PATTERN.fullmatch(name) or not h3.is_valid_cell(name):
            raise ValueError(f"token {row}, {name!r}, is not an H3 cell")
    return np.array([int(name, 16) for name in names], dtype=np.uint64) & _ID


def h3_id_to_area_km2(ids: npt.ArrayLike) -> Float64Array:
    """Areas of the outlines of (n,) cells, on the sphere that all distances are on."""
    areas = [h3_int.cell_area(index, "rads^2") for index in _indexes(ids)]
    return np.array(areas, dtype=np.float64) * EARTH_RADIUS_KM**2


def h3_id_to_outline(ids: npt.ArrayLike) -> list[Float64Array]:
    """Corners of (n,) cells.

    Returns:
        n arrays (k, 2) of latitudes and longitudes in degrees, counter-clockwise: five corners of a pentagon, six of a
        hexagon, and those where an edge crosses an edge of H3's icosahedron.
    """
    return [np.array(h3_int.cell_to_boundary(index), dtype=np.float64) for index in _indexes(ids)]


def _indexes(ids: npt.ArrayLike) -> list[int]:
    """H3 indexes, header included."""
    cells = np.atleast_1d(np.asarray(ids, dtype=np.uint64))
    resolutions = h3_id_to_resolution(cells).astype(np.uint64)
    indexes: list[int] = (cells | (resolutions << _RESOLUTION_SHIFT) | _CELL_MODE).tolist()
    return indexes
