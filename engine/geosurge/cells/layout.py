"""What the file of a tree holds: one LMDB environment (0.9 format) with three named databases.

| database | key | value |
|---|---|---|
| ``cells`` | level (1 byte), ordinal (big-endian u32) | serialized ``geosurge.v1.Cell`` |
| ``tokens`` | token in UTF-8, ``0x00``, level (1 byte) | ordinal (big-endian u32) |
| ``columns`` | ``levels``, ``<level>/<column>`` | packed little-endian array |

The records hold everything that is known of one cell. The columns repeat what a query needs of all cells at once
(parents, tokens, and the leaves' coordinates), so that opening a tree parses no records.
"""

from __future__ import annotations

import struct

import numpy as np

from geosurge.geodesy import Float64Array
from geosurge.v1 import cell_pb2

DATA_FILE = "data.mdb"
"""The one file of a tree, inside its directory."""

MAX_LEVELS = 255
MAX_TOKEN_BYTES = 509  # LMDB's 511-byte key less the separator and the level.

DATABASES = (b"cells", b"tokens", b"columns")
LEVELS_KEY = b"levels"
RANGE_COLUMNS = {"s2": "s2_level_range", "h3": "h3_resolution_range"}
"""What tells the kind of a tree's cells: a column of its first level; entities have none."""
LEAF_COLUMNS = {
    "latitude_deg": np.dtype("<f8"),
    "longitude_deg": np.dtype("<f8"),
    "spread_km": np.dtype("<f8"),
    "area_km2": np.dtype("<f8"),
    "sample_counts": np.dtype("<i8"),
}


def cell_key(level: int, ordinal: int) -> bytes:
    """Key of a cell's record."""
    return struct.pack(">BI", level, ordinal)


def token_prefix(token: str) -> bytes:
    """What the keys of all cells with a token begin with; only the level follows."""
    return token.encode("utf-8", "surrogatepass") + b"\x00"


def pack_ordinal(ordinal: int) -> bytes:
    """Value of a token."""
    return struct.pack(">I", ordinal)


def unpack_ordinal(value: bytes | memoryview) -> int:
    """Ordinal from the value of a token.

    Raises:
        struct.error: The value is damaged.
    """
    ordinal: int = struct.unpack(">I", value)[0]
    return ordinal


def set_outline(cell: cell_pb2.Cell, outline: Float64Array) -> None:
    """Adds corners (k, 2) of [latitude, longitude] in degrees to a record without any."""
    for latitude, longitude in outline.tolist():
        cell.outline.add(latitude_deg=latitude, longitude_deg=longitude)
