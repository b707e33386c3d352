"""Directories of TIFF structures: of TIFF files, and of the EXIF blocks inside other files, which are the same.

Only what is asked for is read, so that a file of any size costs a few seeks. Offsets come from the file and may point
anywhere: whatever does not fit the file raises `TiffError`.
"""

from __future__ import annotations

import io
import math
import struct
from dataclasses import dataclass
from typing import BinaryIO, Final

_FORMAT_BY_KIND: Final = {1: "B", 3: "H", 4: "L", 6: "b", 7: "B", 8: "h", 9: "l", 11: "f", 12: "d", 13: "L", 16: "Q"}
_ASCII: Final = 2
_RATIONAL: Final = 5
_SIGNED_RATIONAL: Final = 10
_SIZE_BY_KIND: Final = {_ASCII: 1, _RATIONAL: 8, _SIGNED_RATIONAL: 8, 17: 8, 18: 8} | {
    kind: struct.calcsize(f"<{letter}") for kind, letter in _FORMAT_BY_KIND.items()
}
_MAX_ENTRIES: Final = 65535


class TiffError(ValueError):
    """The bytes are no TIFF structure, or a damaged one."""


@dataclass(frozen=True)
class Entry:
    """One entry of a directory.

    Attributes:
        tag: What it is.
        kind: TIFF type of its values.
        count: Number of values.
        field: The bytes where the value is, if it fits there, and otherwise its offset.
    """

    tag: int
    kind: int
    count: int
    field: bytes


@dataclass(frozen=True)
class Directory:
    """One directory (IFD), with the offset of the one that follows it (0 for none)."""

    offset: int
    entries: tuple[Entry, ...]
    next_offset: int

    def find(self, tag: int) -> Entry | None:
        """The first entry of a tag."""
        return next((entry for entry in self.entries if entry.tag == tag), None)


@dataclass(frozen=True)
class Tiff:
    """An open TIFF structure.

    Attributes:
        stream: The file, or the EXIF block; offsets count from its start.
        order: ``"<"`` or ``">"``.
        is_big: BigTIFF, with offsets of eight bytes.
        first_offset: Where the first directory is.
    """

    stream: BinaryIO
    order: str
    is_big: bool
    first_offset: int

    @property
    def header_field_offset(self) -> int:
        """Where the header keeps the offset of the first directory."""
        return 8 if self.is_big else 4

    @property
    def field_size(self) -> int:
        """Bytes of an offset, and of the value field of an entry."""
        return 8 if self.is_big else 4

    @property
    def count_size(self) -> int:
        """Bytes of the number of entries at the start of a directory."""
        return 8 if self.is_big else 2

    @property
    def entry_size(self) -> int:
        """Bytes of one entry."""
        return 4 + 2 * self.field_size

    def pack_offset(self, offset: int) -> bytes:
        """An offset as bytes."""
        return struct.pack(f"{self.order}{'Q' if self.is_big else 'L'}", offset)

    def unpack_offset(self, field: bytes) -> int:
        """Bytes as an offset."""
        return int.from_bytes(field[: self.field_size], "little" if self.order == "<" else "big")

    def pack_directory(self, entries: tuple[Entry, ...], next_offset: int) -> bytes:
        """A directory as bytes."""
        count = struct.pack(f"{self.order}{'Q' if self.is_big else 'H'}", len(entries))
        head = f"{self.order}HH{'Q' if self.is_big else 'L'}"
        body = b"".join(struct.pack(head, entry.tag, entry.kind, entry.count) + entry.field for entry in entries)
        return count + body + self.pack_offset(next_offset)

    def read_directory(self, offset: int) -> Directory:
        """The directory at an offset.

        Raises:
            TiffError: There is none, or it ends outside the file.
        """
        if offset < self.header_field_offset + self.field_size:
            raise TiffError(f"there is no directory at {offset}: the header is there")
        count = int.from_bytes(self._read(offset, self.count_size), "little" if self.order == "<" else "big")
        if count > _MAX_ENTRIES:
            raise TiffError(f"the directory at {offset} claims {count} entries")
        data = self._read(offset + self.count_size, count * self.entry_size + self.field_size)
        head = f"{self.order}HH{'Q' if self.is_big else 'L'}"
        entries = []
        for start in range(0, count * self.entry_size, self.entry_size):
            tag, kind, values = struct.unpack_from(head, data, start)
            entries.append(Entry(tag, kind, values, data[start + 4 + self.field_size : start + self.entry_size]))
        return Directory(offset, tuple(entries), self.unpack_offset(data[-self.field_size :]))

    def read_value(self, entry: Entry, max_bytes: int) -> bytes:
        """The bytes of an entry's values.

        Raises:
            TiffError: Their type is unknown, they are more than `max_bytes`, or outside the file.
        """
        size = _SIZE_BY_KIND.get(entry.kind, 0) * entry.count
        if size == 0 or size > max_bytes:
            raise TiffError(f"tag {entry.tag} has {entry.count} values of type {entry.kind}")
        return entry.field[:size] if size <= self.field_size else self._read(self.unpack_offset(entry.field), size)

    def read_numbers(self, entry: Entry, max_bytes: int) -> tuple[float, ...]:
        """An entry's values; a ratio of zero to zero is NaN, of anything else to zero infinite.

        Raises:
            TiffError: As `read_value`; or the values are not numbers.
        """
        data = self.read_value(entry, max_bytes)
        if entry.kind in (_RATIONAL, _SIGNED_RATIONAL):
            letter = "L" if entry.kind == _RATIONAL else "l"
            parts = struct.unpack(f"{self.order}{2 * entry.count}{letter}", data)
            return tuple(_ratio(*pair) for pair in zip(parts[::2], parts[1::2], strict=True))
        if entry.kind not in _FORMAT_BY_KIND:
            raise TiffError(f"tag {entry.tag} of type {entry.kind} holds no numbers")
        return tuple(map(float, struct.unpack(f"{self.order}{entry.count}{_FORMAT_BY_KIND[entry.kind]}", data)))

    def _read(self, offset: int, size: int) -> bytes:
        # Streams take no offset beyond a signed 64-bit number, which BigTIFF can hold.
        if offset >= 2**63:
            raise TiffError(f"offset {offset} is outside the file")
        self.stream.seek(offset)
        data = self.stream.read(size)
        if len(data) < size:
            raise TiffError(f"{size} bytes at {offset} are outside the file")
        return data


def open_tiff(stream: BinaryIO | bytes) -> Tiff:
    """Reads the header of a TIFF structure.

    Raises:
        TiffError: It is none.
    """
    if isinstance(stream, bytes):
        stream = io.BytesIO(stream)
    stream.seek(0)
    header = stream.read(16)
    order = {b"II": "<", b"MM": ">"}.get(header[:2])
    if order is None or len(header) < 8:
        raise TiffError("there is no TIFF header")
    version = struct.unpack_from(f"{order}H", header, 2)[0]
    if version == 42:
        return Tiff(stream, order, False, struct.unpack_from(f"{order}L", header, 4)[0])
    if version == 43 and len(header) == 16 and struct.unpack_from(f"{order}HH", header, 4) == (8, 0):
        return Tiff(stream, order, True, struct.unpack_from(f"{order}Q", header, 8)[0])
    raise TiffError(f"TIFF version {version} is unknown")


def _ratio(numerator: int, denominator: int) -> float:
    if denominator:
        return numerator / denominator
    return math.copysign(math.inf, numerator) if numerator else math.nan
