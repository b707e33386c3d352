"""What the bytes of an image file say before anything is decoded: its format, its size, and whether it ends early."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

_SIGNATURES: Final[tuple[tuple[int, bytes, str], ...]] = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (8, b"WEBP", "WEBP"),
    (0, b"GIF87a", "GIF"),
    (0, b"GIF89a", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\x00\x00\x00\x0cJXL \r\n\x87\n", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (8, b"CR\x02\x00", "Canon CR2"),
    (0, b"II\x2a\x00", "TIFF"),
    (0, b"MM\x00\x2a", "TIFF"),
    (0, b"II\x2b\x00", "TIFF"),
    (0, b"MM\x00\x2b", "TIFF"),
    (0, b"FUJIFILMCCD-RAW", "Fujifilm RAF"),
    (0, b"8BPS", "Photoshop"),
    (0, b"%PDF-", "PDF"),
    (0, b"%!PS", "PostScript"),
    (0, b"\x00\x00\x01\x00", "ICO"),
    (0, b"\x00\x00\x02\x00", "CUR"),
    (0, b"icns", "ICNS"),
    (0, b"qoif", "QOI"),
    (0, b"DDS ", "DDS"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"P1\n", "PBM"),
    (0, b"P2\n", "PGM"),
    (0, b"P3\n", "PPM"),
    (0, b"P4\n", "PBM"),
    (0, b"P5\n", "PGM"),
    (0, b"P6\n", "PPM"),
    (0, b"P7\n", "PAM"),
    (0, b"Pf\n", "PFM"),
    (0, b"PF\n", "PFM"),
    (0, b"<svg", "SVG"),
    (0, b"\x1a\x45\xdf\xa3", "Matroska video"),
)

_FORMAT_BY_BRAND: Final = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), "HEIF"),
    **dict.fromkeys((b"mif1", b"mif2", b"msf1"), "HEIF"),
    b"crx ": "Canon CR3",
}
"""Formats of ISO base media; the brands that name a codec go before those of any picture (ISO/IEC 23008-12)."""

_TIFF_TYPE_BYTES: Final = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
_MAX_HEIF_BOXES: Final = 1000


def recognise_format(data: bytes) -> str | None:
    """The format of a file: those that are decoded by Pillow's names; None if it is none that is known."""
    for offset, signature, name in _SIGNATURES:
        if data.startswith(signature, offset):
            return name
    if data.startswith(b"ftyp", 4):
        return _recognise_media(data)
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith((b"<?xml", b"<!DOCTYPE svg")) and b"<svg" in head:
        return "SVG"
    return None


def _recognise_media(data: bytes) -> str:
    """Tells pictures in ISO base media from videos, by the brands at the start."""
    end = min(int.from_bytes(data[:4], "big"), 1024)
    brands = [data[8:12], *(data[place : place + 4] for place in range(16, end, 4))]
    # A picture's own brand may come after those that any picture has.
    known = [brand for brand in _FORMAT_BY_BRAND if brand in brands]
    return _FORMAT_BY_BRAND[known[0]] if known else "MP4 video"


def announced_size(data: bytes, file_format: str) -> tuple[int, int] | None:
    """Reads width and height where Pillow's plugin allocates, or fails for want of pixels, before it tells them."""
    if file_format == "PNG" and len(data) >= 24:
        width, height = struct.unpack_from(">II", data, 16)
        return width, height
    if file_format == "GIF" and len(data) >= 10:
        width, height = struct.unpack_from("<HH", data, 6)
        return width, height
    if file_format == "WEBP" and len(data) >= 30:
        chunk = data[12:16]
        if chunk == b"VP8X":
            return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
        if chunk == b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        if chunk == b"VP8 ":
            width, height = struct.unpack_from("<HH", data, 26)
            return width & 0x3FFF, height & 0x3FFF
    return None


def ends_early(data: bytes, file_format: str) -> bool:
    """Tells whether the container's own book-keeping points past the end of the data.

    It only chooses between two reasons for a file that cannot be decoded; it never refuses one that can be.
    """
    return not _IS_COMPLETE[file_format](data)


def _jpeg_is_complete(data: bytes) -> bool:
    # A trailer may follow the end-of-image marker; a thumbnail's own marker lies near the start.
    return b"\xff\xd9" in data[-max(len(data) // 4, 2) :]


def _gif_is_complete(data: bytes) -> bool:
    return data.rstrip(b"\x00").endswith(b";")


def _webp_is_complete(data: bytes) -> bool:
    return len(data) >= 12 and int.from_bytes(data[4:8], "little") + 8 <= len(data)


def _bmp_is_complete(data: bytes) -> bool:
    return len(data) >= 26 and int.from_bytes(data[2:6], "little") <= len(data)


def _png_is_complete(data: bytes) -> bool:
    offset = 8
    while offset + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, offset)
        offset += length + 12
        if kind == b"IEND":
            return True
    return False


def _heif_is_complete(data: bytes) -> bool:
    offset, has_pixels = 0, False
    for _ in range(_MAX_HEIF_BOXES):
        if offset + 8 > len(data):
            break
        size, name = struct.unpack_from(">I4s", data, offset)
        has_pixels |= name == b"mdat"
        if size == 1 and offset + 16 <= len(data):
            (size,) = struct.unpack_from(">Q", data, offset + 8)
        # The last box may leave its size open.
        offset = len(data) if size == 0 else offset + max(size, 8)
    return offset <= len(data) and has_pixels


def _tiff_is_complete(data: bytes) -> bool:
    order = "<" if data[:2] == b"II" else ">"
    if len(data) < 8:
        return False
    (directory,) = struct.unpack_from(f"{order}I", data, 4)
    if directory + 2 > len(data):
        return False
    (entry_count,) = struct.unpack_from(f"{order}H", data, directory)
    if directory + 2 + 12 * entry_count + 4 > len(data):
        return False
    for entry in range(entry_count):
        _, kind, count, offset = struct.unpack_from(f"{order}HHII", data, directory + 2 + 12 * entry)
        byte_count = count * _TIFF_TYPE_BYTES.get(kind, 0)
        if byte_count > 4 and offset + byte_count > len(data):
            return False
    return True


_IS_COMPLETE: Final[dict[str, Callable[[bytes], bool]]] = {
    "JPEG": _jpeg_is_complete,
    "PNG": _png_is_complete,
    "WEBP": _webp_is_complete,
    "TIFF": _tiff_is_complete,
    "GIF": _gif_is_complete,
    "BMP": _bmp_is_complete,
    "HEIF": _heif_is_complete,
}
