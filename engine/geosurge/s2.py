"""Cells of S2, vectorised over numpy arrays.

Cells are S2 cell ids as uint64: 3 bits of cube face, two bits for each S2 level of the position on the face's Hilbert
curve, one set bit that ends the position, then zeros. Ascending ids walk along the curve, and everything inside a cell
is one contiguous range of ids. Ids, ranges and tokens equal those of s2sphere and of Google's S2 library bit for bit
(quadratic projection).

Arguments and results are as in `geosurge.geodesy`. A leaf is here what S2 calls one: a cell of S2 level 30.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from geosurge.geodesy import EARTH_RADIUS_KM, Float64Array, Int64Array, unit_vector_to_latlng, validate_coordinates

CellIdArray: TypeAlias = npt.NDArray[np.uint64]

FACE_COUNT: Final = 6
MAX_S2_LEVEL: Final = 30

_FACE_SIZE: Final = 1 << MAX_S2_LEVEL
_POSITION_BITS: Final = 2 * MAX_S2_LEVEL + 1
_VALID_END_BITS: Final = np.uint64(0x1555555555555555)
_ONE: Final = np.uint64(1)
_TOKEN_PATTERN: Final = re.compile(r"[0-9a-fA-F]{1,16}")

# A block of points and its temporaries stay in a core's L2 cache.
_BLOCK_POINTS: Final = 1 << 13

# numpy's sine and cosine may differ from the C library's by a few units in the last place, depending on the processor:
# less than 1e-5 of a leaf's side. Points this near to a leaf's border, in sides, are redone with the C library's.
_BORDER_MARGIN: Final = 2.0**-13


def latlng_to_cell_id(
    latitude_deg: npt.ArrayLike, longitude_deg: npt.ArrayLike, s2_level: int = MAX_S2_LEVEL
) -> CellIdArray:
    """S2 cells that hold points.

    Args:
        latitude_deg: Latitudes.
        longitude_deg: Longitudes.
        s2_level: S2 level of the cells, 0 to 30.

    Returns:
        uint64 cell ids of the broadcast shape.

    Raises:
        CoordinateOutOfRangeError: A coordinate is not finite or not on the globe.
        ValueError: ``s2_level`` is outside 0 to 30.
    """
    end_bit = _end_bit(s2_level)
    lat, lng = np.broadcast_arrays(
        np.asarray(latitude_deg, dtype=np.float64), np.asarray(longitude_deg, dtype=np.float64)
    )
    validate_coordinates(lat, lng)
    shape = lat.shape
    lat, lng = lat.reshape(-1), lng.reshape(-1)
    ids = np.empty(lat.shape, dtype=np.uint64)
    for start in range(0, len(ids), _BLOCK_POINTS):
        block = slice(start, start + _BLOCK_POINTS)
        ids[block] = _leaf_ids(lat[block], lng[block])
    if s2_level < MAX_S2_LEVEL:
        ids &= ~(end_bit - _ONE)
        ids |= end_bit
    return ids.reshape(shape)


def cell_id_to_s2_level(cell_ids: npt.ArrayLike) -> Int64Array:
    """S2 levels of cells.

    Args:
        cell_ids: uint64 cell ids.

    Returns:
        int64, 0 to 30.

    Raises:
        ValueError: An id is not a valid S2 cell id.
    """
    return _s2_levels(_checked(cell_ids))


def cell_id_to_parent(cell_ids: npt.ArrayLike, s2_level: int) -> CellIdArray:
    """Ancestors of cells at an S2 level; a cell of that S2 level is its own.

    Args:
        cell_ids: uint64 cell ids.
        s2_level: S2 level of the ancestors, at most that of every cell.

    Returns:
        uint64 cell ids.

    Raises:
        ValueError: An id is invalid or of a coarser S2 level than ``s2_level``.
    """
    ids = _checked(cell_ids)
    end_bit = _end_bit(s2_level)
    too_coarse = _lowest_bit(ids) > end_bit
    if too_coarse.any():
        bad = ids[too_coarse].flat[0]
        raise ValueError(
            f"cell {_token(bad)} is of S2 level {int(_s2_levels(bad))} and has no ancestor at S2 level {s2_level}: "
            "ask for an S2 level at or above the cell's own"
        )
    return np.asarray((ids & ~(end_bit - _ONE)) | end_bit)


def cell_id_to_children(cell_ids: npt.ArrayLike) -> CellIdArray:
    """The four children of cells, in Hilbert-curve order.

    Args:
        cell_ids: (...) uint64 cell ids of S2 level 29 or less.

    Returns:
        (..., 4) uint64 cell ids, ascending along the last axis.

    Raises:
        ValueError: An id is invalid or a leaf of S2 (level 30).
    """
    ids = _checked(cell_ids)
    child_bit = _lowest_bit(ids) >> np.uint64(2)
    if not child_bit.all():
        raise ValueError(f"cell {_token(ids[child_bit == 0].flat[0])} is of S2 level 30 and has no children")
    steps = np.array([0, 2, 4, 6], dtype=np.uint64)
    return np.asarray((ids - child_bit * np.uint64(3))[..., None] + child_bit[..., None] * steps)


def cell_id_range(cell_ids: npt.ArrayLike) -> tuple[CellIdArray, CellIdArray]:
    """Smallest and largest leaf ids (S2 level 30) inside cells; both ends belong to the cell.

    Args:
        cell_ids: uint64 cell ids.

    Returns:
        First and last leaf id of each cell, uint64.

    Raises:
        ValueError: An id is not a valid S2 cell id.
    """
    ids = _checked(cell_ids)
    below_end = _lowest_bit(ids) - _ONE
    return ids - below_end, ids + below_end


def cell_id_to_token(cell_ids: npt.ArrayLike) -> list[str]:
    """S2 tokens of cells: the id in 16 hexadecimal digits without the zeros at its end.

    Args:
        cell_ids: (n,) uint64 cell ids.

    Returns:
        n tokens, lower case.

    Raises:
        ValueError: An id is not a valid S2 cell id.
    """
    digits = _checked(cell_ids).reshape(-1).astype(">u8").tobytes().hex()
    return [digits[start : start + 16].rstrip("0") for start in range(0, len(digits), 16)]


def token_to_cell_id(tokens: Iterable[str]) -> CellIdArray:
    """Cell ids of S2 tokens.

    Args:
        tokens: n tokens; either case.

    Returns:
        (n,) uint64 cell ids.

    Raises:
        ValueError: A token is not an S2 token; the message names it.
    """
    if isinstance(tokens, str):
        raise TypeError(f"tokens must be a sequence of tokens, not the single string {tokens!r}: put it in a list")
    rows = list(tokens)
    for row, token in enumerate(rows):
        if not _TOKEN_PATTERN.fullmatch(token):
            raise ValueError(f"token {row}, {token!r}, is not an S2 token: 1 to 16 hexadecimal digits are")
    ids = np.array([int(token.ljust(16, "0"), 16) for token in rows], dtype=np.uint64)
    invalid = ~_is_valid(ids)
    if invalid.any():
        row = int(np.argmax(invalid))
        raise ValueError(
            f"token {row}, {rows[row]!r}, is no S2 cell: its face or the bit that ends its position is wrong"
        )
    return ids


def cell_id_to_center(cell_ids: npt.ArrayLike) -> tuple[Float64Array, Float64Array]:
    """Centres of cells: the middle in the cell's own (s, t) coordinates, as in S2.

    Args:
        cell_ids: uint64 cell ids.

    Returns:
        Latitudes and longitudes.

    Raises:
        ValueError: An id is not a valid S2 cell id.
    """
    face, i, j, size = _face_ij_size(_checked(cell_ids))
    u, v = (_st_to_uv((2 * lower + size) / (2 * _FACE_SIZE)) for lower in (i, j))
    return unit_vector_to_latlng(_face_uv_to_vector(face, u, v))


def cell_id_to_outline(cell_ids: npt.ArrayLike) -> Float64Array:
    """Corners of cells, counter-clockwise; the edges between them are great-circle arcs.

    A corner on the antimeridian gets longitude -180 or 180, whichever is on the side of the cell's centre, so that the
    outline of a cell of S2 level 1 or finer never jumps across a flat map; a corner on a pole gets the centre's
    longitude.

    Args:
        cell_ids: (...) uint64 cell ids.

    Returns:
        (..., 4, 2) float64: latitude and longitude of each corner.

    Raises:
        ValueError: An id is not a valid S2 cell id.
    """
    ids = _checked(cell_ids)
    face, i, j, size = _face_ij_size(ids)
    u_low, v_low = (_st_to_uv(lower / _FACE_SIZE) for lower in (i, j))
    u_high, v_high = (_st_to_uv((lower + size) / _FACE_SIZE) for lower in (i, j))
    u = np.stack([u_low, u_high, u_high, u_low], axis=-1)
    v = np.stack([v_low, v_low, v_high, v_high], axis=-1)
    latitude, longitude = unit_vector_to_latlng(_face_uv_to_vector(face[..., None], u, v))
    center_longitude = cell_id_to_center(ids)[1][..., None]
    longitude = np.where(np.abs(longitude) == 180.0, np.copysign(longitude, center_longitude), longitude)
    longitude = np.where(np.abs(latitude) == 90.0, center_longitude, longitude)
    return np.stack([latitude, longitude], axis=-1)


def cell_id_to_area_km2(cell_ids: npt.ArrayLike) -> Float64Array:
    """Exact spherical areas of cells.

    A cell is a rectangle (u, v) on its cube face, cut into two spherical triangles. The excess E of a triangle with
    corners a, b, c is tan(E/2) = a·(b×c) / (|a||b||c| + (a·b)|c| + (b·c)|a| + (c·a)|b|) (Van Oosterom and Strackee,
    1983). Here the triple product is exactly Δu Δv, and Δu is taken from the integer side of the cell, so that nothing
    cancels: S2 leaves of a square centimetre are as precise as whole faces.

    Args:
        cell_ids: uint64 cell ids.

    Returns:
        Square kilometres, float64.

    Raises:
        ValueError: An id is not a valid S2 cell id.
    """
    _, i, j, size = _face_ij_size(_checked(cell_ids))
    u_low, v_low = (_st_to_uv(lower / _FACE_SIZE) for lower in (i, j))
    u_high, v_high = (_st_to_uv((lower + size) / _FACE_SIZE) for lower in (i, j))
    double_area = _uv_side(i, size) * _uv_side(j, size)
    norm_ll, norm_hl, norm_hh, norm_lh = (
        np.sqrt(1.0 + u * u + v * v) for u, v in ((u_low, v_low), (u_high, v_low), (u_high, v_high), (u_low, v_high))
    )
    dot_diagonal = 1.0 + u_low * u_high + v_low * v_high

    def triangle_excess(norm_corner: Float64Array, dot_low: Float64Array, dot_high: Float64Array) -> Float64Array:
        denominator = (
            norm_ll * norm_corner * norm_hh + dot_low * norm_hh + dot_high * norm_ll + dot_diagonal * norm_corner
        )
        return 2.0 * np.arctan2(double_area, denominator)

    lower = triangle_excess(norm_hl, 1.0 + u_low * u_high + v_low * v_low, 1.0 + u_high * u_high + v_low * v_high)
    upper = triangle_excess(norm_lh, 1.0 + u_low * u_low + v_low * v_high, 1.0 + u_low * u_high + v_high * v_high)
    return np.asarray((lower + upper) * EARTH_RADIUS_KM**2)


def _end_bit(s2_level: int) -> np.uint64:
    if not 0 <= s2_level <= MAX_S2_LEVEL:
        raise ValueError(f"S2 level {s2_level} does not exist: S2 levels go from 0 to {MAX_S2_LEVEL}")
    return np.uint64(1 << (2 * (MAX_S2_LEVEL - s2_level)))


def _lowest_bit(ids: CellIdArray) -> CellIdArray:
    return ids & (~ids + _ONE)


def _is_valid(ids: CellIdArray) -> npt.NDArray[np.bool_]:
    return np.asarray(((ids >> np.uint64(_POSITION_BITS)) < FACE_COUNT) & ((_lowest_bit(ids) & _VALID_END_BITS) != 0))


def _checked(cell_ids: npt.ArrayLike) -> CellIdArray:
    ids = np.asarray(cell_ids, dtype=np.uint64)
    valid = _is_valid(ids)
    if not valid.all():
        row = int(np.argmin(valid))
        raise ValueError(f"row {row}: {int(ids.flat[row]):#018x} is not an S2 cell id")
    return ids


def _s2_levels(ids: CellIdArray | np.uint64) -> Int64Array:
    trailing_zeros = np.bitwise_count(~ids & (ids - _ONE))
    return MAX_S2_LEVEL - (trailing_zeros.astype(np.int64) >> 1)


def _token(cell_id: np.uint64) -> str:
    return f"{int(cell_id):016x}".rstrip("0")


def _libm(function: Callable[[float], float]) -> Callable[[Float64Array], Float64Array]:
    def apply(values: Float64Array) -> Float64Array:
        return np.array([function(value) for value in values.tolist()], dtype=np.float64)

    return apply


_LIBM_SIN: Final = _libm(math.sin)
_LIBM_COS: Final = _libm(math.cos)


def _leaf_ids(latitude_deg: Float64Array, longitude_deg: Float64Array) -> CellIdArray:
    """Leaf ids of one block of (n,) points."""
    face, s, t = _face_st(latitude_deg, longitude_deg, np.sin, np.cos)
    # Another face is only near where s or t is near a border of this one, so that one test covers faces too.
    doubtful = (np.abs(s - np.rint(s)) < _BORDER_MARGIN) | (np.abs(t - np.rint(t)) < _BORDER_MARGIN)
    if doubtful.any():
        rows = np.flatnonzero(doubtful)
        face[rows], s[rows], t[rows] = _face_st(latitude_deg[rows], longitude_deg[rows], _LIBM_SIN, _LIBM_COS)
    i = np.minimum(s.astype(np.int64), _FACE_SIZE - 1)
    j = np.minimum(t.astype(np.int64), _FACE_SIZE - 1)
    return _face_ij_to_leaf(face, i, j)


def _face_st(
    latitude_deg: Float64Array,
    longitude_deg: Float64Array,
    sin: Callable[[Float64Array], Float64Array],
    cos: Callable[[Float64Array], Float64Array],
) -> tuple[Int64Array, Float64Array, Float64Array]:
    """Cube faces and (s, t) in leaf sides, [0, 2^30], with the operations of S2 in their order."""
    lat, lng = np.deg2rad(latitude_deg), np.deg2rad(longitude_deg)
    cos_lat = cos(lat)
    x, y, z = cos(lng) * cos_lat, sin(lng) * cos_lat, sin(lat)
    abs_x, abs_y, abs_z = np.abs(x), np.abs(y), np.abs(z)
    on_x = (abs_x > abs_y) & (abs_x > abs_z)
    on_y = ~(abs_x > abs_y) & (abs_y > abs_z)
    on_z = ~(on_x | on_y)
    depth = np.where(on_x, x, np.where(on_y, y, z))
    first = np.where(on_x, y, -x) / depth
    second = np.where(on_z, -y, z) / depth
    negative = depth < 0
    face = 2 * on_z.astype(np.int64) + on_y + 3 * negative
    return (
        face,
        _uv_to_leaf_sides(np.where(negative, second, first)),
        _uv_to_leaf_sides(np.where(negative, first, second)),
    )


def _uv_to_leaf_sides(u: Float64Array) -> Float64Array:
    root = 0.5 * np.sqrt(1.0 + 3.0 * np.abs(u))
    return np.where(u >= 0.0, root, 1.0 - root) * _FACE_SIZE


def _st_to_uv(s: Float64Array) -> Float64Array:
    return (1.0 / 3.0) * np.where(s >= 0.5, 4.0 * s * s - 1.0, 1.0 - 4.0 * (1.0 - s) * (1.0 - s))


def _uv_side(lower: Int64Array, size: Int64Array) -> Float64Array:
    """u(lower + size) - u(lower) without cancellation; a cell lies in one half of its face or is the whole face."""
    upper = lower + size
    twice_middle = np.where(lower >= _FACE_SIZE // 2, lower + upper, 2 * _FACE_SIZE - lower - upper)
    side = (4.0 / 3.0) * (size / _FACE_SIZE) * (twice_middle / _FACE_SIZE)
    return np.where(size == _FACE_SIZE, 2.0, side)


def _face_uv_to_vector(face: Int64Array, u: Float64Array, v: Float64Array) -> Float64Array:
    """Vectors, not of unit length, of points (u, v) on cube faces."""
    one = np.ones_like(u)
    face = np.broadcast_to(face, u.shape)
    x = np.choose(face, [one, -u, -u, -one, v, v])
    y = np.choose(face, [u, one, -v, -v, -one, u])
    z = np.choose(face, [v, v, one, -u, -u, -one])
    return np.stack([x, y, z], axis=-1)


# The Hilbert curve, six S2 levels (12 bits) a step: 30 = 5 * 6, and a table of 2^14 uint16 fits in the L1 cache.
_STEP_LEVELS: Final = 6
_STEP_COUNT: Final = MAX_S2_LEVEL // _STEP_LEVELS
_SWAP: Final = 1
_INVERT: Final = 2


def _hilbert_tables() -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]:
    """Tables of six S2 levels of the curve for each of its four orientations.

    Returns:
        Encoding, indexed by (i << 8 | j << 2 | orientation) with six bits of i and j, and decoding, indexed by
        (position << 2 | orientation). Their entries are (position << 2 | next orientation) and
        (i << 8 | j << 2 | next orientation).
    """
    quadrant = np.array([[0, 1, 3, 2], [0, 2, 3, 1], [3, 2, 0, 1], [3, 1, 0, 2]], dtype=np.int64)
    turn = np.array([_SWAP, 0, 0, _INVERT | _SWAP], dtype=np.int64)
    position, start = np.meshgrid(np.arange(1 << (2 * _STEP_LEVELS)), np.arange(4), indexing="ij")
    orientation = start.copy()
    i = np.zeros_like(position)
    j = np.zeros_like(position)
    for level in range(_STEP_LEVELS - 1, -1, -1):
        digit = (position >> (2 * level)) & 3
        corner = quadrant[orientation, digit]
        i = (i << 1) | (corner >> 1)
        j = (j << 1) | (corner & 1)
        orientation ^= turn[digit]
    encode = np.empty(position.size, dtype=np.uint16)
    decode = np.empty(position.size, dtype=np.uint16)
    encode[(i << 8) | (j << 2) | start] = (position << 2) | orientation
    decode[(position << 2) | start] = (i << 8) | (j << 2) | orientation
    return encode, decode


_ENCODE, _DECODE = _hilbert_tables()


def _face_ij_to_leaf(face: Int64Array, i: Int64Array, j: Int64Array) -> CellIdArray:
    orientation = face & _SWAP
    ids = face
    for step in range(_STEP_COUNT - 1, -1, -1):
        shift = step * _STEP_LEVELS
        entry = _ENCODE[(((i >> shift) & 63) << 8) | (((j >> shift) & 63) << 2) | orientation].astype(np.int64)
        ids = (ids << 12) | (entry >> 2)
        orientation = entry & 3
    return (ids.view(np.uint64) << _ONE) | _ONE


def _face_ij_size(ids: CellIdArray) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array]:
    """Faces, lower corners (i, j) and sides of cells, in leaf sides."""
    position = (ids >> _ONE).astype(np.int64)
    face = position >> (2 * MAX_S2_LEVEL)
    orientation = face & _SWAP
    i = np.zeros_like(face)
    j = np.zeros_like(face)
    for step in range(_STEP_COUNT - 1, -1, -1):
        entry = _DECODE[(((position >> (step * 12)) & 4095) << 2) | orientation].astype(np.int64)
        i = (i << _STEP_LEVELS) | (entry >> 8)
        j = (j << _STEP_LEVELS) | ((entry >> 2) & 63)
        orientation = entry & 3
    size = np.int64(1) << (MAX_S2_LEVEL - _s2_levels(ids))
    return face, i & -size, j & -size, size
