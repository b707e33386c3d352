"""Boxes as the standard allows them, beyond what today's writers make; their files are read in `test_positions`."""

from __future__ import annotations

import io
import struct
import tracemalloc

import pytest
from support.metadata import READ_FORMATS, exif_block, gps, picture, xmp_packet

from geosurge.archive.metadata.containers import MAX_METADATA_BYTES, ContainerError, container_format
from geosurge.archive.metadata.exif import read_gps
from geosurge.archive.metadata.heif import exif_structure, xmp_packets

PACKET = xmp_packet("").encode()
STRUCTURE = exif_block(gps_tags=gps(1.5, -2.25))
EXIF_ITEM = struct.pack(">I", 6) + b"Exif\0\0" + STRUCTURE
FILE_TYPE = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


def box(name: bytes, content: bytes, *, wide: bool = False) -> bytes:
    if wide:
        return struct.pack(">I4sQ", 1, name, len(content) + 16) + content
    return struct.pack(">I4s", len(content) + 8, name) + content


def information(version: int, mime: bytes = b"application/rdf+xml\0") -> bytes:
    """The types of two items: 1 is EXIF, 2 is XMP."""
    form = ">B3sHH4s" if version == 2 else ">B3sIH4s"
    entries = [
        struct.pack(form, version, bytes(3), 1, 0, b"Exif") + b"\0",
        struct.pack(form, version, bytes(3), 2, 0, b"mime") + b"\0" + mime,
        struct.pack(">B3sHH", 0, bytes(3), 3, 0) + b"old\0",
    ]
    count = struct.pack(">I", len(entries)) if version == 3 else struct.pack(">H", len(entries))
    head = bytes([version == 3, 0, 0, 0]) + count
    return box(b"iinf", head + b"".join(box(b"infe", entry) for entry in entries))


def location(version: int, method: int, places: dict[int, list[tuple[int, int]]], base: int = 0) -> bytes:
    """Where the items are: offsets of eight bytes, lengths of four, a base of four."""
    number = ">I" if version == 2 else ">H"
    items = b""
    for item, extents in places.items():
        items += (
            struct.pack(number, item) + (struct.pack(">H", method) if version else b"") + struct.pack(">HI", 0, base)
        )
        items += struct.pack(">H", len(extents))
        for offset, size in extents:
            items += (b"\0\0" if version else b"") + struct.pack(">QI", offset, size)
    sizes = bytes([0x84, 0x42 if version else 0x40])
    return box(b"iloc", bytes([version, 0, 0, 0]) + sizes + struct.pack(number, len(places)) + items)


def in_file(version: int = 0, *, base: int = 0, wide: bool = False, before: bytes = b"") -> io.BytesIO:
    """Items in a box of their own, the EXIF in two parts, before the box that says so."""
    start = len(FILE_TYPE) + len(before) + 8 - base
    cut = start + 20
    end = start + len(EXIF_ITEM)
    places = {2: [(end, len(PACKET))], 1: [(start, 20), (cut, len(EXIF_ITEM) - 20)]}
    meta = bytes(4) + information(2) + location(version, 0, places, base)
    return io.BytesIO(FILE_TYPE + before + box(b"mdat", EXIF_ITEM + PACKET) + box(b"meta", meta, wide=wide))


def coordinate(file: io.BytesIO) -> tuple[float, float] | None:
    structure = exif_structure(file)
    gps_directory = None if structure is None else read_gps(io.BytesIO(structure))
    return None if gps_directory is None else gps_directory.coordinate


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("base", [0, 7])
def test_items_in_the_file_are_read_by_their_parts(version: int, base: int) -> None:
    assert coordinate(in_file(version, base=base)) == pytest.approx((1.5, -2.25))
    assert list(xmp_packets(in_file(version, base=base))) == [PACKET]


def test_boxes_of_64_bits_and_unknown_ones_are_read_over() -> None:
    assert coordinate(in_file(wide=True, before=box(b"free", bytes(99)) + box(b"wide", b"", wide=True))) is not None


@pytest.mark.parametrize("version", [2, 3])
def test_items_in_the_box_itself_are_read(version: int) -> None:
    places = {1: [(0, len(EXIF_ITEM))], 2: [(len(EXIF_ITEM), len(PACKET))]}
    meta = bytes(4) + information(version) + location(1, 1, places) + box(b"idat", EXIF_ITEM + PACKET)
    file = io.BytesIO(FILE_TYPE + box(b"meta", meta))
    assert coordinate(file) == pytest.approx((1.5, -2.25))
    assert list(xmp_packets(file)) == [PACKET]


@pytest.mark.parametrize("mime", [b"text/plain\0", b"application/rdf+xml\0deflate\0"])
def test_other_texts_are_no_xmp(mime: bytes) -> None:
    places = {2: [(0, len(PACKET))]}
    meta = bytes(4) + information(2, mime) + location(1, 1, places) + box(b"idat", PACKET)
    assert list(xmp_packets(io.BytesIO(FILE_TYPE + box(b"meta", meta)))) == []


def test_items_that_are_built_from_others_are_left_out() -> None:
    meta = bytes(4) + information(2) + location(1, 2, {1: [(0, 40)]})
    assert exif_structure(io.BytesIO(FILE_TYPE + box(b"meta", meta))) is None


@pytest.mark.parametrize(
    "meta",
    [
        box(b"meta", bytes(4) + information(2) + location(0, 0, {1: [(10**9, 40)]})),
        box(b"meta", bytes(4) + information(2) + location(0, 0, {1: [(0, 2**32 - 1)]})),
        box(b"meta", bytes(4) + information(2) + location(0, 0, {1: [(0, 1)] * 2000})),
        box(b"meta", bytes(4) + information(2) + location(3, 0, {1: [(0, 1)]})),
        box(b"meta", bytes(4) + information(2)[:-2]),
        box(b"meta", bytes(4) + b"\0\0\0\x0eiinf\2\0\0"),
        b"\0\0\0\x05meta",
        b"\xff\xff\xff\xffmeta",
        box(b"free", b"") * 2000 + box(b"meta", bytes(4)),
    ],
)
def test_what_cannot_be_followed_is_damage(meta: bytes) -> None:
    with pytest.raises(ContainerError):
        exif_structure(io.BytesIO(FILE_TYPE + meta))


def test_a_huge_box_is_not_read() -> None:
    huge = io.BytesIO(FILE_TYPE + struct.pack(">I4s", 2 * MAX_METADATA_BYTES, b"meta") + bytes(2 * MAX_METADATA_BYTES))
    tracemalloc.start()
    try:
        with pytest.raises(ContainerError, match="16 MiB"):
            exif_structure(huge)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("file_format", READ_FORMATS[-2:])
def test_pictures_without_metadata_have_none(file_format: str) -> None:
    file = io.BytesIO(picture(file_format))
    assert container_format(file) == "HEIF"
    assert exif_structure(file) is None
    assert list(xmp_packets(file)) == []
