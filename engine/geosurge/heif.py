"""The items of a HEIF or AVIF file, told from its ``meta`` box: pictures, their tiles, EXIF and XMP.

A picture is an item that is coded, or is derived from others: a grid from its tiles. Boxes are of ISO/IEC 14496-12,
8.11 (``pitm``, ``iinf``, ``iloc``, ``iref``, ``idat``) and ISO/IEC 23008-12, 6.6. Nothing is decoded, and of the file
only that box and what is asked for is read.

What this says of a picture is no bound on what its codec does with a hostile file: codecs differ in which boxes of
several they take, and follow what is not looked at here.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, Final

MAX_META_BYTES: Final = 4 * 2**20
"""The box is read up to this size; that of a phone has some 10 kB."""

_MAX_BOXES: Final = 1000
_MAX_ITEMS: Final = 20_000
_GRID_BYTES: Final = 12
_MIN_LOCATIONS_BYTES: Final = 8
_MAX_PADDING_BYTES: Final = 64
_IN_FILE, _IN_BOX = 0, 1
_CODED: Final = (b"hvc1", b"hev1")
_SINGLE: Final = (b"pitm", b"iinf", b"iloc", b"iref", b"idat")

_Place = tuple[int, list[tuple[int, int]]]
"""Construction method of an item, and its extents: offset and size."""


class HeifError(ValueError):
    """The file is damaged: its boxes cannot be followed, contradict each other, or hold more than any picture needs."""


@dataclass(frozen=True)
class Item:
    """One item of a file.

    Attributes:
        kind: Four letters: ``hvc1``, ``grid``, ``Exif``, ``mime``.
        content_type: Of an item of kind ``mime``; empty if its content is packed.
    """

    kind: bytes
    content_type: bytes = b""


@dataclass
class Items:
    """The items of a file.

    Attributes:
        items: All items, by their numbers; empty of a video.
    """

    _file: BinaryIO
    _file_size: int
    _parts: dict[bytes, bytes] = field(default_factory=dict)
    items: dict[int, Item] = field(default_factory=dict)
    _places: dict[int, _Place] = field(default_factory=dict)

    def content(self, number: int, max_bytes: int) -> bytes:
        """The bytes of an item.

        Raises:
            HeifError: They are not there, or more than that.
            OSError: The system cannot read them.
        """
        method, extents = self._places.get(number, (_IN_FILE, []))
        if method == _IN_FILE:
            source, source_size = self._file, self._file_size
        elif method == _IN_BOX:
            box = self._parts.get(b"idat", b"")
            source, source_size = io.BytesIO(box), len(box)
        else:
            raise HeifError(f"item {number} is made of others")
        # No length means: up to the end.
        known = [(offset, size or max(0, source_size - offset)) for offset, size in extents]
        if sum(size for _, size in known) > max_bytes:
            raise HeifError(f"item {number} claims more than {max_bytes} bytes")
        if any(offset + size > source_size for offset, size in known):
            raise HeifError(f"it ends before item {number} does")
        return b"".join(_read_at(source, source_size, offset, size) for offset, size in known)

    def is_whole(self) -> bool:
        """Whether the bytes of the primary picture, and of all its tiles, are there.

        A codec may leave black what is not.

        Raises:
            HeifError: There is no picture, or its parts cannot be told.
        """
        primary = self._primary()
        tiles = self._references().get(primary, [])
        kinds = {number: self._kind(number) for number in [primary, *tiles]}
        return all(self._is_there(number) for number, kind in kinds.items() if kind in _CODED)

    def canvas(self) -> tuple[int, int] | None:
        """Width and height of the primary picture if it is a grid, which tells them; otherwise ``None``.

        Raises:
            HeifError: There is no picture, or its grid is damaged.
        """
        primary = self._primary()
        if self._kind(primary) != b"grid":
            return None
        content = self.content(primary, MAX_META_BYTES)[:_GRID_BYTES].ljust(_GRID_BYTES, b"\0")
        version, flags, rows, columns = content[:4]
        if version != 0 or (rows + 1) * (columns + 1) != len(self._references().get(primary, [])):
            raise HeifError("its grid has other tiles than it says")
        width, height = struct.unpack_from(">II" if flags & 1 else ">HH", content, 4)
        return width, height

    def _primary(self) -> int:
        box = self._parts.get(b"pitm", b"")
        if len(box) < (8 if box[:1] != b"\0" else 6):
            raise HeifError("it holds no picture")
        return int.from_bytes(box[4:8] if box[0] else box[4:6], "big")

    def _kind(self, number: int) -> bytes:
        item = self.items.get(number)
        if item is None:
            raise HeifError(f"item {number} is missing")
        return item.kind

    def _references(self) -> dict[int, list[int]]:
        """What items are derived from, by their numbers."""
        box = self._parts.get(b"iref", bytes(4))
        sources: dict[int, list[int]] = {}
        width, letter = (4, "I") if box[:1] != b"\0" else (2, "H")
        left = _MAX_ITEMS
        for name, start, end in _boxes(io.BytesIO(box), len(box), 4, _MAX_ITEMS):
            if name != b"dimg":
                continue
            number, count = _unpack(f">{letter}H", box, start, end)
            left -= count
            if left < 0 or number in sources:
                raise HeifError("its pictures are derived from more than any is")
            sources[number] = list(_unpack(f">{count}{letter}", box, start + width + 2, end))
        return sources

    def _is_there(self, number: int) -> bool:
        """Whether the bytes of a coded item are there and have been written: a download may leave zeros for them."""
        method, extents = self._places.get(number, (_IN_FILE, []))
        if method != _IN_FILE:
            return method == _IN_BOX
        extents = [(offset, size) for offset, size in extents if size]
        if not extents or any(offset + size > self._file_size for offset, size in extents):
            return False
        # It starts with the length of its first part, and no part has three zeros in a row (H.265, 7.4.2).
        (first, first_size), (last, last_size) = extents[0], extents[-1]
        tail = min(last_size, _MAX_PADDING_BYTES)
        return any(self._in_file(first, min(first_size, 4))) and any(self._in_file(last + last_size - tail, tail))

    def _in_file(self, offset: int, size: int) -> bytes:
        return _read_at(self._file, self._file_size, offset, size)


def read_items(file: BinaryIO) -> Items:
    """Reads what a file says of its items.

    Args:
        file: Seekable; it has to stay open as long as contents are asked for.

    Raises:
        HeifError: The file is damaged.
        OSError: The system cannot read it.
    """
    file_size = file.seek(0, io.SEEK_END)
    for name, start, end in _boxes(file, file_size, 0):
        if name == b"meta":
            if end - start > MAX_META_BYTES:
                raise HeifError(f"the box of items has more than {MAX_META_BYTES // 2**20} MiB")
            return _read_meta(Items(file, file_size), _read_at(file, file_size, start, end - start))
    return Items(file, file_size)


def _read_meta(items: Items, meta: bytes) -> Items:
    # Version and flags stand before the boxes in it.
    for name, start, end in _boxes(io.BytesIO(meta), len(meta), 4):
        if name in _SINGLE:
            if name in items._parts:
                raise HeifError(f"there are two boxes {name!r}")
            items._parts[name] = meta[start:end]
    items.items = _read_information(items._parts.get(b"iinf", bytes(6)))
    items._places = _read_locations(items._parts.get(b"iloc", bytes(8)))
    return items


def _boxes(file: BinaryIO, file_size: int, offset: int, most: int = _MAX_BOXES) -> Iterator[tuple[bytes, int, int]]:
    """Name of each box, and where its content starts and ends."""
    for _ in range(most):
        if offset + 8 > file_size:
            return
        size, name = struct.unpack(">I4s", _read_at(file, file_size, offset, 8))
        start = offset + 8
        if size == 1:
            (size,) = struct.unpack(">Q", _read_at(file, file_size, start, 8))
            start += 8
        end = file_size if size == 0 else offset + size
        if end < start or end > file_size:
            raise HeifError(f"the box {name!r} at byte {offset} does not fit into what holds it")
        yield name, start, end
        offset = end
    if offset < file_size:
        raise HeifError(f"there are more than {most} boxes")


def _read_at(file: BinaryIO, file_size: int, offset: int, size: int) -> bytes:
    if offset + size > file_size:
        raise HeifError(f"it ends before byte {offset + size}")
    file.seek(offset)
    data = file.read(size)
    if len(data) < size:
        raise HeifError(f"it ends before byte {offset + size}")
    return data


def _unpack(form: str, data: bytes, offset: int, end: int) -> tuple[int, ...]:
    if offset + struct.calcsize(form) > end:
        raise HeifError("a box ends before its fields do")
    return struct.unpack_from(form, data, offset)


def _read_information(content: bytes) -> dict[int, Item]:
    """Kinds of the items, by their numbers."""
    items: dict[int, Item] = {}
    for name, start, end in _boxes(io.BytesIO(content), len(content), 8 if content[:1] != b"\0" else 6, _MAX_ITEMS):
        # Version 2 numbers items with 16 bits, version 3 with 32; older ones have no kind.
        form = {b"\2": ">HH", b"\3": ">IH"}.get(content[start : min(start + 1, end)])
        if name != b"infe" or form is None:
            continue
        number, _ = _unpack(form, content, start + 4, end)
        rest = content[start + 4 + struct.calcsize(form) : end]
        kind, content_type = rest[:4], b""
        if kind == b"mime":
            _name, _, rest = rest[4:].partition(b"\0")
            content_type, _, encoding = rest.partition(b"\0")
            content_type = b"" if encoding.strip(b"\0") else content_type
        if number in items:
            raise HeifError(f"there are two items {number}")
        items[number] = Item(kind, content_type)
    return items


def _read_locations(content: bytes) -> dict[int, _Place]:
    """Construction method and extents (offset and size) of the items, by their numbers."""
    if len(content) < _MIN_LOCATIONS_BYTES:
        raise HeifError("the list of its items' places ends too early")
    version = content[0]
    widths = content[4] >> 4, content[4] & 15, content[5] >> 4, content[5] & 15 if version else 0
    if version > 2 or not {*widths} <= {0, 4, 8}:
        raise HeifError("the places of its items are told in an unknown form")
    offset_width, length_width, base_width, index_width = widths
    extent_width = index_width + offset_width + length_width
    number_width = 4 if version == 2 else 2
    place = 6

    def take(width: int) -> int:
        nonlocal place
        if place + width > len(content):
            raise HeifError("the list of its items' places ends too early")
        place += width
        return int.from_bytes(content[place - width : place], "big")

    places: dict[int, _Place] = {}
    extents_left = _MAX_ITEMS
    for _ in range(take(number_width)):
        number = take(number_width)
        method = take(2) & 15 if version else _IN_FILE
        take(2)
        base = take(base_width)
        count = take(2)
        extents_left -= count + 1
        if extents_left < 0 or (count > 1 and not extent_width):
            raise HeifError(f"its items lie in more than {_MAX_ITEMS} places")
        extents = []
        for _ in range(count):
            take(index_width)
            offset = take(offset_width)
            extents.append((base + offset, take(length_width)))
        places.setdefault(number, (method, extents))
    return places
