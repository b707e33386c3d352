"""EXIF and XMP of HEIF and AVIF pictures, which are items of the ``meta`` box (ISO/IEC 14496-12, 8.11; 23008-12, A.2).

Only that box and the items themselves are read.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import BinaryIO, Final

from geosurge.archive.metadata.containers import MAX_METADATA_BYTES, ContainerError, read_at

_XMP_TYPE: Final = b"application/rdf+xml"
_MAX_BOXES: Final = 1000
_MAX_EXTENTS: Final = 1000
_IN_FILE, _IN_BOX = 0, 1
"""Where an item's bytes lie: in the file, or in the box ``idat``."""


def exif_structure(stream: BinaryIO) -> bytes | None:
    """The TIFF structure of a picture's EXIF; ``None`` if there is none.

    Raises:
        ContainerError: The file is damaged, or the EXIF larger than `containers.MAX_METADATA_BYTES`.
    """
    for name, content in _metadata_items(stream):
        if name == b"Exif" and len(content) >= 4:
            # The bytes between this number and the structure are most often "Exif\0\0".
            return content[4 + int.from_bytes(content[:4], "big") :]
    return None


def xmp_packets(stream: BinaryIO) -> Iterator[bytes]:
    """The XMP packets of a picture.

    Raises:
        ContainerError: The file is damaged, or a packet larger than `containers.MAX_METADATA_BYTES`.
    """
    return (content for name, content in _metadata_items(stream) if name == b"mime")


def _metadata_items(stream: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Type and content of the items that are EXIF or XMP."""
    try:
        meta = _box(stream, b"meta")
        if meta is None:
            return
        # Version and flags stand before the boxes in it.
        boxes = dict(_boxes(io.BytesIO(meta), 4))
        wanted = dict(_item_types(boxes.get(b"iinf", b"")))
        for item, method, extents in _item_places(boxes.get(b"iloc", b"")):
            if item not in wanted or method not in (_IN_FILE, _IN_BOX):
                continue
            if sum(size for _, size in extents) > MAX_METADATA_BYTES:
                raise ContainerError(f"an item claims more than {MAX_METADATA_BYTES // 2**20} MiB of metadata")
            source = stream if method == _IN_FILE else io.BytesIO(boxes.get(b"idat", b""))
            yield wanted[item], b"".join(read_at(source, offset, size) for offset, size in extents)
    except struct.error as error:
        raise ContainerError(f"a box ends before its fields do: {error}") from error


def _box(stream: BinaryIO, wanted: bytes) -> bytes | None:
    return next((content for name, content in _boxes(stream, 0, wanted)), None)


def _boxes(stream: BinaryIO, offset: int, wanted: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
    """Names and contents of boxes from an offset on, or of those of one name."""
    stream.seek(0, io.SEEK_END)
    end_of_file = stream.tell()
    for _ in range(_MAX_BOXES):
        if offset + 8 > end_of_file:
            return
        size, name = struct.unpack(">I4s", read_at(stream, offset, 8))
        start = offset + 8
        if size == 1:
            (size,) = struct.unpack(">Q", read_at(stream, start, 8))
            start += 8
        end = end_of_file if size == 0 else offset + size
        if end < start or end > end_of_file:
            raise ContainerError(f"the box {name!r} at byte {offset} does not fit into what holds it")
        if wanted in (None, name):
            if end - start > MAX_METADATA_BYTES:
                raise ContainerError(f"the box {name!r} has more than {MAX_METADATA_BYTES // 2**20} MiB")
            yield name, read_at(stream, start, end - start)
        offset = end
    raise ContainerError(f"there are more than {_MAX_BOXES} boxes")


def _item_types(information: bytes) -> Iterator[tuple[int, bytes]]:
    """Items that are EXIF or XMP, and their type."""
    if not information:
        return
    for name, entry in _boxes(io.BytesIO(information), 6 if information[0] == 0 else 8):
        # Version 2 numbers items with 16 bits, version 3 with 32; older ones have no type.
        form = {b"\2": ">HH4s", b"\3": ">IH4s"}.get(entry[:1])
        if name != b"infe" or form is None:
            continue
        item, _, kind = struct.unpack_from(form, entry, 4)
        if kind == b"Exif":
            yield item, kind
        elif kind == b"mime":
            _item_name, _, rest = entry[4 + struct.calcsize(form) :].partition(b"\0")
            content_type, _, encoding = rest.partition(b"\0")
            if content_type == _XMP_TYPE and not encoding.strip(b"\0"):
                yield item, kind


def _item_places(location: bytes) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Number, construction method and extents, as offset and size, of every item."""
    if not location:
        return
    fields = io.BytesIO(location)

    def number(width: int) -> int:
        return int.from_bytes(read_at(fields, fields.tell(), width), "big")

    version = number(1)
    if version > 2:
        raise ContainerError(f"iloc has the unknown version {version}")
    number(3)
    sizes = number(2)
    offset_width, length_width, base_width, index_width = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    for _ in range(number(4 if version == 2 else 2)):
        item = number(4 if version == 2 else 2)
        method = number(2) & 15 if version else _IN_FILE
        number(2)
        base = number(base_width)
        extents = []
        extent_count = number(2)
        if extent_count > _MAX_EXTENTS:
            raise ContainerError(f"an item has more than {_MAX_EXTENTS} parts")
        for _ in range(extent_count):
            if version:
                number(index_width)
            offset = number(offset_width)
            extents.append((base + offset, number(length_width)))
        yield item, method, extents
