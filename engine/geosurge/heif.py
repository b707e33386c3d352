"""The items of a HEIF or AVIF file, told from its ``meta`` box: pictures, their tiles, EXIF and XMP.

A picture is an item that is coded, or a grid of items that are; alpha, depth and gain maps are auxiliary items of it.
Boxes are of ISO/IEC 14496-12, 8.11 (``pitm``, ``iinf``, ``iloc``, ``iref``, ``idat``) and ISO/IEC 23008-12, 6.5 and 9.3
(``ipco``, ``ipma``, ``ispe``). Nothing is decoded, and of the file only that box and what is asked for is read.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, Final

MAX_META_BYTES: Final = 16 * 2**20
"""The box is read up to this size; more is damage, or an attack."""

_MAX_BOXES: Final = 1000
_MAX_ITEMS: Final = 65_535
_MAX_DECODED_ITEMS: Final = 4000
_IN_FILE, _IN_BOX = 0, 1
_MAX_PADDING_BYTES: Final = 64
_MIN_GRID_BYTES, _MAX_GRID_BYTES = 8, 12
_CODED: Final = (b"hvc1", b"hev1")


class HeifError(ValueError):
    """The file is damaged: its boxes cannot be followed, or hold more than any picture needs."""


@dataclass(frozen=True)
class Item:
    """One item of a file.

    Attributes:
        kind: Four letters: ``hvc1``, ``grid``, ``Exif``, ``mime``.
        content_type: Of an item of kind ``mime``; empty if its content is packed.
    """

    kind: bytes
    content_type: bytes = b""


@dataclass(frozen=True)
class StillPicture:
    """What decoding the primary item takes.

    Attributes:
        size: Width and height of the picture before it is turned.
        decoded_pixels: Pixels of all items that are decoded for it: each tile as often as the grid names it, and what
            is auxiliary to it.
        is_whole: Whether the bytes of all of them are there.
        foreign_kind: Kind of the picture, or of a tile, if it is not HEVC; otherwise empty.
    """

    size: tuple[int, int]
    decoded_pixels: int
    is_whole: bool
    foreign_kind: bytes


@dataclass
class Items:
    """The items of a file.

    Attributes:
        primary: Number of the item that is the picture; ``None`` if the file has none, as a video has not.
        items: All items, by their numbers.
    """

    _file: BinaryIO
    _file_size: int
    _box: bytes = b""
    primary: int | None = None
    items: dict[int, Item] = field(default_factory=dict)
    _places: dict[int, tuple[int, list[tuple[int, int]]]] = field(default_factory=dict)
    _tiles: dict[int, list[int]] = field(default_factory=dict)
    _auxiliaries: dict[int, list[int]] = field(default_factory=dict)
    _sizes: dict[int, tuple[int, int]] = field(default_factory=dict)

    def content(self, number: int, max_bytes: int) -> bytes:
        """The bytes of an item.

        Raises:
            HeifError: They are not there, or more than that.
            OSError: The system cannot read them.
        """
        method, extents = self._places.get(number, (_IN_FILE, []))
        if method not in (_IN_FILE, _IN_BOX):
            raise HeifError(f"item {number} is made of others")
        source, source_size = (self._file, self._file_size) if method == _IN_FILE else self._idat()
        # No length means: up to the end.
        known = [(offset, size or max(0, source_size - offset)) for offset, size in extents]
        if sum(size for _, size in known) > max_bytes:
            raise HeifError(f"item {number} claims more than {max_bytes} bytes")
        return b"".join(_read_at(source, source_size, offset, size) for offset, size in known)

    def still_picture(self) -> StillPicture:
        """What decoding the primary item takes.

        Raises:
            HeifError: There is none, or the file does not tell.
        """
        if self.primary is None or self.primary not in self.items:
            raise HeifError("it holds no picture")
        tiles = self._parts(self.primary)
        foreign = next((kind for kind in map(self._kind, tiles) if kind not in _CODED), b"")
        # Which of them are alpha, and so decoded, is not asked.
        beside = [*self._auxiliaries.get(self.primary, [])]
        beside += [number for tile in tiles if tile != self.primary for number in self._auxiliaries.get(tile, [])]
        decoded = tiles + [part for number in beside for part in self._parts(number)]
        if len(decoded) > _MAX_DECODED_ITEMS:
            raise HeifError(f"its picture has more than {_MAX_DECODED_ITEMS} parts")
        areas = [width * height for width, height in map(self._size, tiles)]
        areas += [width * height for width, height in map(self._size_if_told, decoded[len(tiles) :])]
        # A grid tells the size of its canvas, whatever the picture's own property says.
        canvases = [self._grid_size(number) for number in (self.primary, *beside) if self._kind(number) == b"grid"]
        return StillPicture(
            size=max([self._size(self.primary), *canvases], key=lambda size: size[0] * size[1]),
            decoded_pixels=sum(areas),
            is_whole=all(self._is_there(number) for number in {self.primary, *decoded}),
            foreign_kind=foreign,
        )

    def _parts(self, number: int) -> list[int]:
        """What is decoded for an item: the tiles of a grid, or itself."""
        return self._tiles.get(number, []) if self._kind(number) == b"grid" else [number]

    def _idat(self) -> tuple[BinaryIO, int]:
        for name, start, end in _boxes(io.BytesIO(self._box), len(self._box), 4):
            if name == b"idat":
                return io.BytesIO(self._box[start:end]), end - start
        raise HeifError("there is no idat")

    def _kind(self, number: int) -> bytes:
        item = self.items.get(number)
        if item is None:
            raise HeifError(f"item {number} is missing")
        return item.kind

    def _size(self, number: int) -> tuple[int, int]:
        if number not in self._sizes:
            raise HeifError(f"the size of item {number} is not told")
        return self._sizes[number]

    def _size_if_told(self, number: int) -> tuple[int, int]:
        return self._sizes.get(number, (0, 0))

    def _grid_size(self, number: int) -> tuple[int, int]:
        """Width and height of the canvas of a grid (ISO/IEC 23008-12, 6.6.2.3.2)."""
        content = self.content(number, _MAX_GRID_BYTES)
        is_wide = bool(content[1:2]) and bool(content[1] & 1)
        if len(content) < (_MAX_GRID_BYTES if is_wide else _MIN_GRID_BYTES):
            raise HeifError("its grid does not say how large it is")
        width, height = struct.unpack_from(">II" if is_wide else ">HH", content, 4)
        return width, height

    def _is_there(self, number: int) -> bool:
        """Whether the bytes of an item are there and have been written: a download may leave zeros for them."""
        method, extents = self._places.get(number, (_IN_FILE, []))
        if method != _IN_FILE or self._kind(number) not in _CODED:
            return method == _IN_BOX or bool(extents)
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
    items = Items(file, file_size)
    try:
        for name, start, end in _boxes(file, file_size, 0):
            if name == b"meta":
                if end - start > MAX_META_BYTES:
                    raise HeifError(f"the box of items has more than {MAX_META_BYTES // 2**20} MiB")
                items._box = _read_at(file, file_size, start, end - start)
                _read_meta(items)
                break
    except (struct.error, IndexError) as error:
        raise HeifError(f"a box ends before its fields do: {error}") from error
    return items


def _read_meta(items: Items) -> None:
    box = items._box
    # Version and flags stand before the boxes in it.
    for name, start, end in _boxes(io.BytesIO(box), len(box), 4):
        content = box[start:end]
        if name == b"pitm":
            items.primary = int.from_bytes(content[4:8] if content[0] else content[4:6], "big")
        elif name == b"iinf":
            items.items = dict(_read_information(content))
        elif name == b"iloc":
            items._places = _read_locations(content)
        elif name == b"iref":
            items._tiles, items._auxiliaries = _read_references(content)
        elif name == b"iprp":
            items._sizes = _read_sizes(content)


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


def _read_information(content: bytes) -> Iterator[tuple[int, Item]]:
    """Kinds of the items, by their numbers."""
    entries = io.BytesIO(content)
    for name, start, end in _boxes(entries, len(content), 8 if content[0] else 6, _MAX_ITEMS):
        # Version 2 numbers items with 16 bits, version 3 with 32; older ones have no kind.
        form = {2: ">HH4s", 3: ">IH4s"}.get(content[start])
        if name != b"infe" or form is None:
            continue
        number, _, kind = struct.unpack_from(form, content, start + 4)
        content_type = b""
        if kind == b"mime":
            _name, _, rest = content[start + 4 + struct.calcsize(form) : end].partition(b"\0")
            content_type, _, encoding = rest.partition(b"\0")
            content_type = b"" if encoding.strip(b"\0") else content_type
        yield number, Item(kind, content_type)


def _read_locations(content: bytes) -> dict[int, tuple[int, list[tuple[int, int]]]]:
    """Construction method and extents (offset and size) of the items, by their numbers."""
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

    places: dict[int, tuple[int, list[tuple[int, int]]]] = {}
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


def _read_references(content: bytes) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Tiles of the grids, and what is auxiliary to items, by their numbers."""
    tiles: dict[int, list[int]] = {}
    auxiliaries: dict[int, list[int]] = {}
    width, form = (4, "I") if content[0] else (2, "H")
    for name, start, end in _boxes(io.BytesIO(content), len(content), 4, _MAX_ITEMS):
        numbers = [int(n) for n in struct.unpack_from(f">{form}H", content, start)]
        source, count = numbers
        if start + width + 2 + count * width > end:
            raise HeifError("a reference names fewer items than it says")
        targets = struct.unpack_from(f">{count}{form}", content, start + width + 2)
        if name == b"dimg":
            tiles.setdefault(source, []).extend(targets)
        elif name == b"auxl":
            for target in targets:
                auxiliaries.setdefault(target, []).append(source)
    return tiles, auxiliaries


def _read_sizes(content: bytes) -> dict[int, tuple[int, int]]:
    """Widths and heights of the items, by their numbers; of several the largest."""
    properties: list[tuple[int, int] | None] = [None]
    associations: list[bytes] = []
    for name, start, end in _boxes(io.BytesIO(content), len(content), 0):
        if name == b"ipco":
            inner = io.BytesIO(content[start:end])
            for kind, first, last in _boxes(inner, end - start, 0, _MAX_ITEMS):
                is_size = kind == b"ispe" and last - first >= 12
                properties.append(struct.unpack_from(">II", content, start + first + 4) if is_size else None)
        elif name == b"ipma":
            associations.append(content[start:end])
    sizes: dict[int, tuple[int, int]] = {}
    for box in associations:
        wide_number, wide_index = box[0] > 0, box[3] & 1
        (entry_count,) = struct.unpack_from(">I", box, 4)
        place = 8
        for _ in range(min(entry_count, _MAX_ITEMS)):
            (number,) = struct.unpack_from(">I" if wide_number else ">H", box, place)
            place += 4 if wide_number else 2
            count = box[place]
            indices = struct.unpack_from(f">{count}{'H' if wide_index else 'B'}", box, place + 1)
            place += 1 + count * (2 if wide_index else 1)
            for index in indices:
                # The highest bit says whether a reader has to understand the property.
                at = index & (0x7FFF if wide_index else 0x7F)
                found = properties[at] if at < len(properties) else None
                if found is not None:
                    known = sizes.get(number, (0, 0))
                    sizes[number] = max(known, found, key=lambda side: side[0] * side[1])
    return sizes
