"""Put an EXIF block into a JPEG, PNG or WebP file, next to pixels that stay as they are.

EXIF in JPEG: Exif 2.32 (CIPA DC-008-2019), 4.5.4; in PNG: PNG 3rd edition, 11.3.5.3; in WebP: WebP Container
Specification, Extended File Format. Files of several pictures in one JPEG: CIPA DC-007.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import replace
from typing import BinaryIO, Final

from geosurge.archive.metadata.containers import (
    EXIF_PREFIX,
    MAX_METADATA_BYTES,
    Chunk,
    ContainerError,
    chunks,
    exif_block,
)
from geosurge.errors import WriteUnsupportedError

_MAX_JPEG_SEGMENT: Final = 65533

_WEBP_EXIF_FLAG: Final = 0x08
_WEBP_ALPHA_FLAG: Final = 0x10
_WEBP_BEFORE_EXIF: Final = (b"VP8X", b"ICCP", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L")


def find_exif(stream: BinaryIO, file_format: str) -> Chunk | None:
    """The chunk of a JPEG, PNG or WebP file that holds EXIF, with the place of the TIFF structure as its content.

    Returns:
        The first such chunk; `None` if there is none.

    Raises:
        ContainerError: The file is damaged before it, or claims more than `containers.MAX_METADATA_BYTES` of EXIF.
    """
    for chunk in chunks(stream, file_format):
        if (place := exif_block(stream, file_format, chunk)) is not None:
            if place[1] > MAX_METADATA_BYTES:
                raise ContainerError(
                    f"the EXIF claims {place[1]} bytes, the limit is {MAX_METADATA_BYTES // 2**20} MiB"
                )
            return replace(chunk, data=place[0], size=place[1])
    return None


def embed_exif(file_format: str, data: bytes, block: Chunk | None, new: bytes | None) -> bytes:
    """The file with another EXIF block.

    Args:
        file_format: ``"JPEG"``, ``"PNG"`` or ``"WEBP"``.
        data: The file.
        block: As of `find_exif`: what is replaced.
        new: The TIFF structure; `None` takes the old one out.

    Returns:
        The file: all else in it is as it was, but for what a WebP's header says about its chunks.

    Raises:
        ContainerError: The file is damaged.
        WriteUnsupportedError: There is no room, or no place, for the block.
    """
    return _SPLICE[file_format](data, block, new)


def _splice_jpeg(data: bytes, block: Chunk | None, new: bytes | None) -> bytes:
    walked = list(chunks(io.BytesIO(data), "JPEG"))
    if block is not None:
        start, end = block.start, block.end
    else:
        # JFIF's own segment has to be the first.
        start = end = walked[0].end if walked[0].name == b"\xe0" else walked[0].start
    if any(_is_picture_list(data, chunk) and chunk.start < start for chunk in walked):
        raise WriteUnsupportedError(
            "the other pictures of this multi-picture file are found by their distance from a segment before the EXIF,"
            " so that no EXIF can be added; write XMP sidecars instead"
        )
    if new is None:
        return data[:start] + data[end:]
    content = EXIF_PREFIX + new
    if len(content) > _MAX_JPEG_SEGMENT:
        raise WriteUnsupportedError(
            f"the EXIF of a JPEG has {_MAX_JPEG_SEGMENT} bytes at most, and with the position it would have"
            f" {len(content)}; write XMP sidecars instead"
        )
    return data[:start] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + data[end:]


def _is_picture_list(data: bytes, chunk: Chunk) -> bool:
    return chunk.name == b"\xe2" and data[chunk.data : chunk.data + 4] == b"MPF\0"


def _splice_png(data: bytes, block: Chunk | None, new: bytes | None) -> bytes:
    if block is not None:
        start, end = block.start, block.end
        prefix = data[block.start + 8 : block.data]
    else:
        first = next((chunk for chunk in chunks(io.BytesIO(data), "PNG") if chunk.name == b"IDAT"), None)
        if first is None:
            raise ContainerError("the PNG has no pixels")
        start = end = first.start
        prefix = b""
    if new is None:
        return data[:start] + data[end:]
    body = b"eXIf" + prefix + new
    return data[:start] + struct.pack(">L", len(body) - 4) + body + struct.pack(">L", zlib.crc32(body)) + data[end:]


def _splice_webp(data: bytes, block: Chunk | None, new: bytes | None) -> bytes:
    walked = list(chunks(io.BytesIO(data), "WEBP"))
    if not walked or walked[-1].end > len(data):
        raise ContainerError("the WebP has no chunks, or ends before the last of them does")
    end_of_file = walked[-1].end
    parts = []
    if walked[0].name != b"VP8X":
        parts.append(_webp_header(data, walked[0]))
    place = max((n for n, chunk in enumerate(walked) if chunk.name in _WEBP_BEFORE_EXIF), default=0)
    for number, chunk in enumerate(walked):
        if chunk.name == b"VP8X":
            flags = data[chunk.data] | _WEBP_EXIF_FLAG if new is not None else data[chunk.data] & ~_WEBP_EXIF_FLAG
            parts.append(data[chunk.start : chunk.data] + bytes([flags]) + data[chunk.data + 1 : chunk.end])
        elif block is None or chunk.start != block.start:
            parts.append(data[chunk.start : chunk.end])
        elif new is not None:
            parts.append(_riff_chunk(b"EXIF", data[chunk.data : block.data] + new))
        if block is None and new is not None and number == place:
            parts.append(_riff_chunk(b"EXIF", new))
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<L", len(body)) + body + data[end_of_file:]


def _webp_header(data: bytes, picture: Chunk) -> bytes:
    """The header that a WebP of one chunk needs before it can hold anything else."""
    content = data[picture.data : picture.data + picture.size]
    flags = _WEBP_EXIF_FLAG
    if picture.name == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<2H", content, 6))
    elif picture.name == b"VP8L":
        (bits,) = struct.unpack_from("<L", content, 1)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        flags |= _WEBP_ALPHA_FLAG if bits >> 28 & 1 else 0
    else:
        raise ContainerError(f"the WebP starts with a chunk {picture.name!r}")
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return _riff_chunk(b"VP8X", bytes([flags, 0, 0, 0]) + sides)


def _riff_chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<L", len(content)) + content + b"\0" * (len(content) % 2)


_SPLICE: Final = {"JPEG": _splice_jpeg, "PNG": _splice_png, "WEBP": _splice_webp}
