"""Small pictures with metadata in every container, and EXIF blocks with any content."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from geosurge.archive.metadata.guess import Guess
from geosurge.archive.metadata.positions import read_claims
from geosurge.archive.rows import Position

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")
"""Containers that positions are written to."""

READ_FORMATS = (*FORMATS, "HEIF", "AVIF")
"""Containers that positions are read from."""

PIXELS = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)

BYTE, ASCII, SHORT, LONG, RATIONAL, UNDEFINED, SRATIONAL, DOUBLE = 1, 2, 3, 4, 5, 7, 10, 12
_FORMATS = {BYTE: "B", SHORT: "H", LONG: "L", RATIONAL: "2L", SRATIONAL: "2l", DOUBLE: "d"}

GUESS = Guess(-33.856784, 151.215297, 12.3456, 0.25, "blue-marble-v2", "ab" * 32, "run-1")

Field = tuple[int, Any]
"""TIFF type and values: numbers, pairs of them for rationals, or bytes."""


def picture(file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, file_format, **options)
    return buffer.getvalue()


def sexagesimal(degrees: float) -> Field:
    units = round(abs(degrees) * 3600 * 10000)
    return RATIONAL, [(units // 36000000, 1), (units // 600000 % 60, 1), (units % 600000, 10000)]


def gps(latitude: float, longitude: float, /, **changes: Field | None) -> dict[int, Field]:
    """Tags of a GPS directory; `changes` are by the names of EXIF, and `None` leaves one out."""
    names = {"version": 0, "latitude_ref": 1, "latitude": 2, "longitude_ref": 3, "longitude": 4}
    tags = {
        0: (BYTE, [2, 2, 0, 0]),
        1: (ASCII, b"S\0" if latitude < 0 else b"N\0"),
        2: sexagesimal(latitude),
        3: (ASCII, b"W\0" if longitude < 0 else b"E\0"),
        4: sexagesimal(longitude),
    }
    for name, field in changes.items():
        if field is None:
            del tags[names[name]]
        else:
            tags[names[name]] = field
    return tags


def exif_block(
    *directories: dict[int, Field], order: str = "<", gps_tags: dict[int, Field] | None = None, padding: bytes = b""
) -> bytes:
    """A TIFF structure of directories that follow each other, the first with a pointer to the GPS directory."""
    block = bytearray((b"II*\0" if order == "<" else b"MM\0*") + bytes(4) + padding)
    where = struct.Struct(f"{order}L")
    link = 4
    pointer = None if gps_tags is None else _add(block, gps_tags, order)[0]
    for number, tags in enumerate(directories or ({},)):
        full = dict(tags) | ({0x8825: (LONG, [pointer])} if pointer and number == 0 else {})
        start, next_link = _add(block, full, order)
        where.pack_into(block, link, start)
        link = next_link
    return bytes(block)


def xmp_packet(content: str, attributes: str = "", before: str = "", after: str = "") -> str:
    return (
        f'{before}<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about="" xmlns:exif="http://ns.adobe.com/exif/1.0/" {attributes}>{content}'
        f"</rdf:Description></rdf:RDF></x:xmpmeta>{after}"
    )


def first_position(image: BinaryIO, sidecars: Sequence[Path] = ()) -> Position | None:
    """The first position that a picture has."""
    return next((claim.position for claim in read_claims(image, sidecars)), None)


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">L", len(content)) + name + content + struct.pack(">L", zlib.crc32(name + content))


def with_png_chunk(data: bytes, name: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk, after the header."""
    return data[:33] + png_chunk(name, content) + data[33:]


def jpeg_segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def _add(block: bytearray, tags: dict[int, Field], order: str) -> tuple[int, int]:
    """Appends values and then the directory; where it starts, and where its link to the next one is."""
    entries = []
    for tag, (kind, values) in sorted(tags.items()):
        data = values if isinstance(values, bytes) else _pack(kind, values, order)
        count = len(values)
        if len(data) > 4:
            offset = len(block)
            block.extend(data + bytes(len(data) % 2))
            data = struct.pack(f"{order}L", offset)
        entries.append(struct.pack(f"{order}HHL", tag, kind, count) + data.ljust(4, b"\0"))
    start = len(block)
    block.extend(struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4))
    return start, len(block) - 4


def _pack(kind: int, values: Sequence[Any], order: str) -> bytes:
    pairs = kind in (RATIONAL, SRATIONAL)
    return b"".join(struct.pack(f"{order}{_FORMATS[kind]}", *(value if pairs else (value,))) for value in values)
