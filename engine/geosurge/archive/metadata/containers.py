"""The chunks of picture files: JPEG segments, PNG chunks and WebP (RIFF) chunks, and which of them hold EXIF and XMP.

A walk reads a few bytes a chunk and seeks over the rest; of a JPEG it ends where the pixels begin.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final

MAX_METADATA_BYTES: Final = 16 * 2**20
"""EXIF or XMP is read up to this size; more is damage, or an attack."""

EXIF_PREFIX: Final = b"Exif\0\0"
START_OF_SCAN: Final = b"\xda"

_JPEG_XMP: Final = b"http://ns.adobe.com/xap/1.0/\0"
_PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_PNG_XMP: Final = b"XML:com.adobe.xmp\0"
_JPEG_START: Final = b"\xff\xd8"
# Markers that stand alone, without a length.
_JPEG_LONE: Final = frozenset([0x01, *range(0xD0, 0xD8)])
_MAX_CHUNKS: Final = 200_000


class ContainerError(ValueError):
    """The file is damaged: its chunks cannot be followed to the end."""


@dataclass(frozen=True)
class Chunk:
    """A stretch of a file with a name.

    Attributes:
        name: Marker of a JPEG segment (one byte), or the four letters of a PNG or WebP chunk.
        start: Where it starts, its own header included.
        data: Where its content starts.
        size: Bytes of content.
        end: Where the next chunk starts.
    """

    name: bytes
    start: int
    data: int
    size: int
    end: int


def container_format(stream: BinaryIO) -> str:
    """``"JPEG"``, ``"PNG"``, ``"WEBP"``, ``"TIFF"`` or ``"HEIF"`` (AVIF as well); empty for any other file."""
    stream.seek(0)
    header = stream.read(12)
    if header.startswith(_JPEG_START + b"\xff"):
        return "JPEG"
    if header.startswith(_PNG_SIGNATURE):
        return "PNG"
    if header.startswith(b"RIFF") and header[8:] == b"WEBP":
        return "WEBP"
    if header[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    # Videos begin with this box as well, and have no box with items.
    if header[4:8] == b"ftyp":
        return "HEIF"
    return ""


def chunks(stream: BinaryIO, file_format: str) -> Iterator[Chunk]:
    """The chunks of a JPEG (up to and with the start of its pixels), PNG or WebP file, in order.

    Raises:
        ContainerError: The file is damaged; everything before the damage has been given.
    """
    walk = {"JPEG": _jpeg_chunks, "PNG": _png_chunks, "WEBP": _webp_chunks}[file_format]
    for number, chunk in enumerate(walk(stream)):
        if number >= _MAX_CHUNKS:
            raise ContainerError(f"there are more than {_MAX_CHUNKS} chunks")
        yield chunk


def exif_block(stream: BinaryIO, file_format: str, chunk: Chunk) -> tuple[int, int] | None:
    """Where the TIFF structure of EXIF is, if the chunk holds it: offset and size."""
    if (file_format, chunk.name) not in (("JPEG", b"\xe1"), ("PNG", b"eXIf"), ("WEBP", b"EXIF")):
        return None
    head = read_at(stream, chunk.data, min(chunk.size, len(EXIF_PREFIX)))
    # Not every writer ends the prefix with two zeros, and not every one leaves it out of PNG and WebP.
    if head.startswith(EXIF_PREFIX[:5]):
        return chunk.data + len(EXIF_PREFIX), max(0, chunk.size - len(EXIF_PREFIX))
    return None if file_format == "JPEG" else (chunk.data, chunk.size)


def xmp_packet(stream: BinaryIO, file_format: str, chunk: Chunk) -> bytes | None:
    """The XMP packet that the chunk holds, if it does and is not too large."""
    if chunk.size > MAX_METADATA_BYTES:
        return None
    if (file_format, chunk.name) == ("WEBP", b"XMP "):
        return read_at(stream, chunk.data, chunk.size)
    prefix = {("JPEG", b"\xe1"): _JPEG_XMP, ("PNG", b"iTXt"): _PNG_XMP}.get((file_format, chunk.name))
    if prefix is None or read_at(stream, chunk.data, min(chunk.size, len(prefix))) != prefix:
        return None
    content = read_at(stream, chunk.data + len(prefix), chunk.size - len(prefix))
    return content if file_format == "JPEG" else _international_text(content)


def read_at(stream: BinaryIO, offset: int, size: int) -> bytes:
    """Bytes of a file.

    Raises:
        ContainerError: The file ends before them.
    """
    stream.seek(offset)
    data = stream.read(size)
    if len(data) < size:
        raise ContainerError(f"the file ends before byte {offset + size}")
    return data


def _jpeg_chunks(stream: BinaryIO) -> Iterator[Chunk]:
    offset = len(_JPEG_START)
    while True:
        start = offset
        if read_at(stream, offset, 1) != b"\xff":
            raise ContainerError(f"there is no JPEG marker at byte {offset}")
        # Any number of 0xFF may stand before a marker.
        while (marker := read_at(stream, offset + 1, 1)[0]) == 0xFF:
            offset += 1
            if offset - start > _MAX_CHUNKS:
                raise ContainerError(f"there is no JPEG marker after byte {start}")
        if marker in _JPEG_LONE:
            offset += 2
            continue
        if marker in (0x00, 0xD8, 0xD9):
            raise ContainerError(f"marker {marker:02x} at byte {offset} is out of place")
        (size,) = struct.unpack(">H", read_at(stream, offset + 2, 2))
        if size < 2:
            raise ContainerError(f"the segment at byte {offset} is shorter than its length")
        end = offset + 2 + size
        yield Chunk(bytes([marker]), start, offset + 4, size - 2, end)
        if marker == START_OF_SCAN[0]:
            return
        offset = end


def _png_chunks(stream: BinaryIO) -> Iterator[Chunk]:
    offset = len(_PNG_SIGNATURE)
    name = b""
    while name != b"IEND":
        size, name = struct.unpack(">L4s", read_at(stream, offset, 8))
        end = offset + 12 + size
        yield Chunk(name, offset, offset + 8, size, end)
        offset = end


def _webp_chunks(stream: BinaryIO) -> Iterator[Chunk]:
    (size,) = struct.unpack("<L", read_at(stream, 4, 4))
    offset, last = 12, 8 + size
    while offset + 8 <= last:
        name, size = struct.unpack("<4sL", read_at(stream, offset, 8))
        end = offset + 8 + size + size % 2
        yield Chunk(name, offset, offset + 8, size, end)
        offset = end


def _international_text(content: bytes) -> bytes | None:
    """The text of an iTXt chunk after its keyword, unpacked if it is compressed."""
    if len(content) < 2:
        return None
    is_compressed = content[0] == 1
    _language, _, rest = content[2:].partition(b"\0")
    _keyword, _, text = rest.partition(b"\0")
    if not is_compressed:
        return text
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(text, MAX_METADATA_BYTES)
    except zlib.error:
        return None
    return None if unpacker.unconsumed_tail else text
