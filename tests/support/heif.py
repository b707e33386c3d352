"""HEIF files box by box, as the standard allows them beyond what today's writers make."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping, Sequence

from geosurge.heif import Items, read_items

FILE_TYPE = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"

Extents = Sequence[tuple[int, int]]


def box(name: bytes, content: bytes, *, wide: bool = False) -> bytes:
    if wide:
        return struct.pack(">I4sQ", 1, name, len(content) + 16) + content
    return struct.pack(">I4s", len(content) + 8, name) + content


def information(kinds: Mapping[int, bytes], version: int = 2) -> bytes:
    """The kinds of the items; what follows ``mime`` is the content type."""
    number = "I" if version == 3 else "H"
    entries = [
        struct.pack(f">B3x{number}H", version, item, 0) + kind[:4] + b"\0" + kind[4:] for item, kind in kinds.items()
    ]
    entries.append(struct.pack(">B3xHH", 0, 9999, 0) + b"of version 0, without a kind\0")
    head = struct.pack(">B3xI", 1, len(entries)) if version == 3 else struct.pack(">B3xH", 0, len(entries))
    return box(b"iinf", head + b"".join(box(b"infe", entry) for entry in entries))


def locations(places: Mapping[int, Extents], version: int = 0, method: int = 0, base: int = 0) -> bytes:
    """Where the items are; offsets of eight bytes, lengths and bases of four."""
    number = ">I" if version == 2 else ">H"
    items = b""
    for item, extents in places.items():
        items += struct.pack(number, item) + (struct.pack(">H", method) if version else b"")
        items += struct.pack(">HIH", 0, base, len(extents))
        for offset, size in extents:
            items += (bytes(4) if version else b"") + struct.pack(">QI", offset, size)
    sizes = bytes([0x84, 0x44 if version else 0x40])
    return box(b"iloc", bytes([version, 0, 0, 0]) + sizes + struct.pack(number, len(places)) + items)


def references(links: Mapping[bytes, Mapping[int, Sequence[int]]], version: int = 0) -> bytes:
    """By kind (``dimg``, ``thmb``) the items that items refer to."""
    number = "I" if version else "H"
    content = bytes([version, 0, 0, 0])
    for kind, targets_by_source in links.items():
        for source, targets in targets_by_source.items():
            content += box(kind, struct.pack(f">{number}H{len(targets)}{number}", source, len(targets), *targets))
    return box(b"iref", content)


def primary(item: int, version: int = 0) -> bytes:
    return box(b"pitm", bytes([version, 0, 0, 0]) + item.to_bytes(4 if version else 2, "big"))


def grid(columns: int, rows: int, width: int, height: int) -> bytes:
    """The content of an item that is a grid."""
    wide = max(width, height) > 0xFFFF
    return bytes([0, wide, rows - 1, columns - 1]) + struct.pack(">II" if wide else ">HH", width, height)


def meta(*boxes: bytes) -> bytes:
    return box(b"meta", bytes(4) + b"".join(boxes))


def items_of(*boxes: bytes) -> Items:
    return read_items(io.BytesIO(FILE_TYPE + b"".join(boxes)))
