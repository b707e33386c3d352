"""The GPS directory of EXIF: read it, add a guess to it, take the guess out again.

Nothing that is in the file moves. What is added goes to the end of the EXIF block (of a TIFF: of the file), and only
the two numbers that lead there are changed; so maker notes, whose offsets only the maker's programs understand, stay
valid, and pixels are not touched. JPEG, PNG, WebP and TIFF (with BigTIFF) can be written.

Tags and their forms: Exif 2.32 (CIPA DC-008-2019), 4.6.6.
"""

from __future__ import annotations

import io
import math
import struct
from dataclasses import dataclass
from typing import BinaryIO, Final

from geosurge.archive.metadata import heif
from geosurge.archive.metadata.containers import ContainerError, container_format, read_at
from geosurge.archive.metadata.embedding import embed_exif, find_exif
from geosurge.archive.metadata.guess import GPS_VERSION, MAP_DATUM, Guess
from geosurge.archive.metadata.tiff import Directory, Entry, Tiff, TiffError, open_tiff
from geosurge.errors import ExifInvalidError, FileChangedError, WriteUnsupportedError

_WRITABLE: Final = ("JPEG", "PNG", "WEBP", "TIFF")

_GPS_POINTER: Final = 0x8825
_VERSION, _LATITUDE_REF, _LATITUDE, _LONGITUDE_REF, _LONGITUDE = 0, 1, 2, 3, 4
_DATUM, _METHOD, _ERROR = 0x12, 0x1B, 0x1F
_WRITTEN: Final = (_VERSION, _LATITUDE_REF, _LATITUDE, _LONGITUDE_REF, _LONGITUDE, _DATUM, _METHOD, _ERROR)

_BYTE, _ASCII, _LONG, _RATIONAL, _UNDEFINED, _IFD, _LONG8, _IFD8 = 1, 2, 4, 5, 7, 13, 16, 18
_ASCII_CHARSET: Final = b"ASCII\0\0\0"
_UNICODE_CHARSET: Final = b"UNICODE\0"

_MAX_GPS_BYTES: Final = 4096
_SECONDS_DENOMINATOR: Final = 10_000_000
"""Seconds are written to 1e-7, which is 3e-11 degrees; their numerator still fits 32 bits."""

_EMPTY_BLOCK: Final = b"II*\0\x08\0\0\0\0\0\0\0\0\0"
"""A TIFF structure whose one directory has no entries."""


@dataclass(frozen=True)
class Gps:
    """What the GPS directory says.

    Attributes:
        coordinate: Latitude and longitude in degrees as far as they can be read, whatever their range.
        error_m: GPSHPositioningError.
        method: Text of GPSProcessingMethod.
    """

    coordinate: tuple[float, float] | None
    error_m: float | None
    method: str


def read_gps(stream: BinaryIO) -> Gps | None:
    """Reads the GPS directory of a TIFF structure.

    A part of a coordinate that is zero to zero was not recorded and counts as zero, unless it is the degrees. A value
    without its letter (N, S, E, W) has no known hemisphere, and one with a negative sign contradicts N and E: neither
    is a coordinate.

    Args:
        stream: A TIFF file, or an EXIF block without its ``Exif`` prefix.

    Returns:
        What it says; `None` if there is no GPS directory, or none that can be read.
    """
    try:
        tiff = open_tiff(stream)
        directory = _gps_directory(tiff, tiff.read_directory(tiff.first_offset))
    except TiffError:
        return None
    if directory is None:
        return None
    latitude = _coordinate(tiff, directory, _LATITUDE, _LATITUDE_REF, "NS")
    longitude = _coordinate(tiff, directory, _LONGITUDE, _LONGITUDE_REF, "EW")
    error = _numbers(tiff, directory.find(_ERROR))
    return Gps(
        coordinate=None if latitude is None or longitude is None else (latitude, longitude),
        error_m=error[0] if error else None,
        method=_text(_value(tiff, directory.find(_METHOD))),
    )


def exif_stream(image: BinaryIO) -> BinaryIO | None:
    """The TIFF structure that holds a picture's EXIF: of a TIFF the file itself; `None` if there is none.

    Raises:
        ContainerError: The file is damaged before its EXIF, or this is larger than `containers.MAX_METADATA_BYTES`.
    """
    file_format = container_format(image)
    if file_format == "TIFF":
        return image
    if file_format == "HEIF":
        structure = heif.exif_structure(image)
        return None if structure is None else io.BytesIO(structure)
    block = find_exif(image, file_format) if file_format else None
    return None if block is None else io.BytesIO(read_at(image, block.data, block.size))


def add_guess(data: bytes, guess: Guess) -> bytes:
    """The picture with a guess in its EXIF; every other tag, and every pixel, is as it was.

    Args:
        data: The picture, in which no valid position is.
        guess: What is written.

    Raises:
        WriteUnsupportedError: The file is of another format than JPEG, PNG, WebP and TIFF, or has no room for more.
        ExifInvalidError: The file or its EXIF is damaged.
    """
    stream = io.BytesIO(data)
    file_format = container_format(stream)
    if file_format not in _WRITABLE:
        raise WriteUnsupportedError("EXIF is written to JPEG, PNG, WebP and TIFF only; write XMP sidecars instead")
    try:
        if file_format == "TIFF":
            return _extend(data, guess)
        block = find_exif(stream, file_format)
        old = _EMPTY_BLOCK if block is None else data[block.data : block.data + block.size]
        return embed_exif(file_format, data, block, _extend(old, guess))
    except (TiffError, ContainerError, struct.error) as error:
        raise ExifInvalidError(
            f"the picture or its EXIF is damaged, so nothing is added to it: {error}; write XMP sidecars instead"
        ) from error


def remove_guess(data: bytes, guess: Guess) -> bytes:
    """The picture without what `add_guess` wrote, whatever else was changed since.

    Returns:
        The picture; `data` itself if nothing of the guess is in it.

    Raises:
        FileChangedError: The position is another one by now, or the picture can no longer be read.
    """
    stream = io.BytesIO(data)
    file_format = container_format(stream)
    try:
        if file_format not in _WRITABLE:
            return data
        block = None if file_format == "TIFF" else find_exif(stream, file_format)
        if file_format != "TIFF" and block is None:
            return data
        old = data if block is None else data[block.data : block.data + block.size]
        gps = read_gps(io.BytesIO(old))
        if gps is None or (gps.method != guess.method and not _is_at(gps, guess)):
            return data
        if gps.method != guess.method or not _is_at(gps, guess):
            raise FileChangedError(
                f"the EXIF position is not the one that run {guess.run_id} wrote any more; it stays as it is"
            )
        new, is_empty = _shrink(old)
        if block is None:
            return new
        return embed_exif(file_format, data, block, None if is_empty else new)
    except (TiffError, ContainerError, struct.error) as error:
        raise FileChangedError(f"the picture was damaged since its position was written: {error}") from error


def _is_at(gps: Gps, guess: Guess) -> bool:
    return gps.coordinate is not None and guess.is_at(*gps.coordinate)


def _gps_directory(tiff: Tiff, first: Directory) -> Directory | None:
    pointer = first.find(_GPS_POINTER)
    if pointer is None:
        return None
    if pointer.kind not in (_LONG, _IFD, _LONG8, _IFD8) or pointer.count != 1:
        raise TiffError("the GPS pointer is no offset")
    # In BigTIFF, an offset of four bytes stands at the start of a field of eight.
    width = 4 if pointer.kind in (_LONG, _IFD) else 8
    return tiff.read_directory(int.from_bytes(pointer.field[:width], "little" if tiff.order == "<" else "big"))


def _value(tiff: Tiff, entry: Entry | None) -> bytes:
    if entry is None:
        return b""
    try:
        return tiff.read_value(entry, _MAX_GPS_BYTES)
    except TiffError:
        return b""


def _numbers(tiff: Tiff, entry: Entry | None) -> tuple[float, ...]:
    if entry is None:
        return ()
    try:
        return tiff.read_numbers(entry, _MAX_GPS_BYTES)
    except TiffError:
        return ()


def _coordinate(tiff: Tiff, directory: Directory, tag: int, letter_tag: int, letters: str) -> float | None:
    numbers = _numbers(tiff, directory.find(tag))[:3]
    letter = _value(tiff, directory.find(letter_tag))[:1].decode("latin-1").upper()
    if not numbers or not letter or letter not in letters or math.isnan(numbers[0]):
        return None
    parts = [0.0 if math.isnan(number) else number for number in numbers]
    if letter == letters[0] and min(parts) < 0:
        return None
    degrees = math.fsum(abs(part) / 60.0**power for power, part in enumerate(parts))
    return -degrees if letter == letters[1] else degrees


def _text(value: bytes) -> str:
    charset, text = value[:8], value[8:]
    if charset == _UNICODE_CHARSET:
        # The byte order is the writer's choice; the zeros of ASCII text tell which it was.
        codec = "utf-16-be" if text[:1] == b"\0" else "utf-16-le"
        return text.decode(codec, "replace").rstrip("\0 ")
    return (text if charset == _ASCII_CHARSET else value).decode("ascii", "replace").rstrip("\0 ")


def _sexagesimal(tiff: Tiff, degrees: float) -> bytes:
    units = round(abs(degrees) * 3600 * _SECONDS_DENOMINATOR)
    minutes, seconds = divmod(units, 60 * _SECONDS_DENOMINATOR)
    whole, minutes = divmod(minutes, 60)
    return struct.pack(f"{tiff.order}6L", whole, 1, minutes, 1, seconds, _SECONDS_DENOMINATOR)


def _values(tiff: Tiff, guess: Guess) -> dict[int, tuple[int, int, bytes]]:
    """Tag to type, count and bytes of all that is written."""
    south, west = guess.latitude_deg < 0, guess.longitude_deg < 0
    datum = MAP_DATUM.encode() + b"\0"
    method = _ASCII_CHARSET + guess.method.encode("ascii")
    return {
        _VERSION: (_BYTE, 4, bytes(GPS_VERSION)),
        _LATITUDE_REF: (_ASCII, 2, b"S\0" if south else b"N\0"),
        _LATITUDE: (_RATIONAL, 3, _sexagesimal(tiff, guess.latitude_deg)),
        _LONGITUDE_REF: (_ASCII, 2, b"W\0" if west else b"E\0"),
        _LONGITUDE: (_RATIONAL, 3, _sexagesimal(tiff, guess.longitude_deg)),
        _DATUM: (_ASCII, len(datum), datum),
        _METHOD: (_UNDEFINED, len(method), method),
        _ERROR: (_RATIONAL, 1, struct.pack(f"{tiff.order}2L", guess.error_m, 1)),
    }


def _extend(block: bytes, guess: Guess) -> bytes:
    """A TIFF structure with a new GPS directory at its end, which keeps the entries of an old one."""
    tiff = open_tiff(block)
    first = tiff.read_directory(tiff.first_offset)
    old = _gps_directory(tiff, first)
    new = bytearray(block)
    entries = {entry.tag: entry for entry in old.entries if entry.tag not in _WRITTEN} if old else {}
    for tag, (kind, count, value) in _values(tiff, guess).items():
        field = value.ljust(tiff.field_size, b"\0")
        entries[tag] = Entry(tag, kind, count, field if len(value) <= tiff.field_size else _append(tiff, new, value))
    directory = tiff.pack_directory(tuple(entries[tag] for tag in sorted(entries)), old.next_offset if old else 0)
    field = _append(tiff, new, directory)
    pointer = Entry(_GPS_POINTER, _LONG8 if tiff.is_big else _LONG, 1, field)
    kept = tuple(entry for entry in first.entries if entry.tag != _GPS_POINTER)
    if old is not None:
        # As many entries as before: the directory stays where it is.
        position = next(n for n, entry in enumerate(first.entries) if entry.tag == _GPS_POINTER)
        _patch(new, first.offset, tiff.pack_directory(_with(first.entries, position, pointer), first.next_offset))
    else:
        ordered = tuple(sorted((*kept, pointer), key=lambda entry: entry.tag))
        _patch(new, tiff.header_field_offset, _append(tiff, new, tiff.pack_directory(ordered, first.next_offset)))
    return bytes(new)


def _shrink(block: bytes) -> tuple[bytes, bool]:
    """A TIFF structure without the tags that `_extend` writes, and whether nothing else is in it."""
    tiff = open_tiff(block)
    first = tiff.read_directory(tiff.first_offset)
    directory = _gps_directory(tiff, first)
    if directory is None:
        return block, False
    new = bytearray(block)
    rest = tuple(entry for entry in directory.entries if entry.tag not in _WRITTEN)
    if rest:
        # Other tags need the version as much as the guess did.
        rest = tuple(entry for entry in directory.entries if entry.tag not in _WRITTEN or entry.tag == _VERSION)
        _shorten(tiff, new, directory, rest)
        return bytes(new), False
    _shorten(tiff, new, directory, ())
    kept = tuple(entry for entry in first.entries if entry.tag != _GPS_POINTER)
    _shorten(tiff, new, first, kept)
    return bytes(new), not kept and first.next_offset == 0


def _shorten(tiff: Tiff, new: bytearray, directory: Directory, entries: tuple[Entry, ...]) -> None:
    """Leaves some entries of a directory where it is, and zeros after them."""
    packed = tiff.pack_directory(entries, directory.next_offset)
    _patch(new, directory.offset, packed.ljust(len(tiff.pack_directory(directory.entries, 0)), b"\0"))


def _with(entries: tuple[Entry, ...], position: int, entry: Entry) -> tuple[Entry, ...]:
    return (*entries[:position], entry, *entries[position + 1 :])


def _patch(new: bytearray, offset: int, value: bytes) -> None:
    new[offset : offset + len(value)] = value


def _append(tiff: Tiff, new: bytearray, value: bytes) -> bytes:
    """Puts a value at the next even place at the end; its offset as bytes."""
    new.extend(b"\0" * (len(new) % 2))
    if not tiff.is_big and len(new) + len(value) >= 2**32:
        raise WriteUnsupportedError("the TIFF is 4 GiB long, so that nothing can be added; write XMP sidecars instead")
    offset = len(new)
    new.extend(value)
    return tiff.pack_offset(offset)
