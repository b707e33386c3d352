"""Where EXIF and XMP may lie in a HEIF; the files of today's writers are read in `test_positions`."""

from __future__ import annotations

import io
import struct

import pytest
from support.heif import FILE_TYPE, box, information, locations, meta
from support.metadata import READ_FORMATS, exif_block, gps, picture, xmp_packet

from geosurge.archive.metadata.containers import MAX_METADATA_BYTES, ContainerError, container_format
from geosurge.archive.metadata.exif import read_gps
from geosurge.archive.metadata.heif import exif_structure, xmp_packets

PACKET = xmp_packet("").encode()
STRUCTURE = exif_block(gps_tags=gps(1.5, -2.25))
XMP = b"mimeapplication/rdf+xml\0"


def heif(*items: tuple[bytes, bytes]) -> io.BytesIO:
    """A file of items of these kinds and contents, numbered from 1."""
    places, stored = {}, b""
    for number, (_, content) in enumerate(items, 1):
        places[number] = [(len(stored), len(content))]
        stored += content
    kinds = {number: kind for number, (kind, _) in enumerate(items, 1)}
    about = [information(kinds), locations(places, 1, method=1), box(b"idat", stored)]
    return io.BytesIO(FILE_TYPE + meta(*about))


def coordinate(file: io.BytesIO) -> tuple[float, float] | None:
    structure = exif_structure(file)
    found = None if structure is None else read_gps(io.BytesIO(structure))
    return None if found is None else found.coordinate


@pytest.mark.parametrize(
    "before",
    [struct.pack(">I", 6) + b"Exif\0\0", struct.pack(">I", 0), struct.pack(">I", 0) + b"Exif\0\0", b"Exif\0\0", b""],
)
def test_exif_is_found_however_its_start_is_told(before: bytes) -> None:
    assert coordinate(heif((b"Exif", before + STRUCTURE))) == pytest.approx((1.5, -2.25))


def test_what_is_broken_hides_nothing_else() -> None:
    sound = (b"Exif", bytes(4) + STRUCTURE)
    assert coordinate(heif((b"Exif", b"\0\0\0\x06broken"), (b"Exif", b""), sound)) is not None
    places = locations({1: [(10**12, 40)], 2: [(0, MAX_METADATA_BYTES + 1)], 3: [(0, len(sound[1]))]}, 1, method=1)
    about = [information({1: b"Exif", 2: XMP, 3: b"Exif"}), places, box(b"idat", sound[1])]
    file = io.BytesIO(FILE_TYPE + meta(*about))
    assert coordinate(file) is not None
    assert list(xmp_packets(file)) == []


def test_boxes_that_only_a_picture_needs_may_be_broken() -> None:
    content = bytes(4) + STRUCTURE
    about = [information({1: b"Exif"}), locations({1: [(0, len(content))]}, 1, method=1), box(b"idat", content)]
    file = io.BytesIO(FILE_TYPE + meta(*about, box(b"iref", b"\0"), box(b"iprp", b"broken"), box(b"pitm", b"")))
    assert coordinate(file) is not None


def test_every_xmp_packet_is_read_once() -> None:
    file = heif((XMP, PACKET), (b"mimetext/plain\0", PACKET), (XMP + b"deflate\0", PACKET), (XMP, b"another"))
    assert list(xmp_packets(file)) == [PACKET, b"another"]


def test_items_are_read_up_to_a_size_in_all() -> None:
    half = 100 * b" " + bytes(MAX_METADATA_BYTES // 2)
    about = [information({1: XMP, 2: XMP, 3: XMP}), box(b"idat", b"")]
    places = {number: [(24 + 8, len(half))] for number in (1, 2, 3)}
    file = io.BytesIO(FILE_TYPE + box(b"mdat", half) + meta(*about, locations(places)))
    assert list(xmp_packets(file)) == [half]


def test_a_damaged_file_is_told() -> None:
    with pytest.raises(ContainerError):
        exif_structure(io.BytesIO(FILE_TYPE + b"\0\0\0\x05meta"))


@pytest.mark.parametrize("file_format", READ_FORMATS[-2:])
def test_pictures_without_metadata_have_none(file_format: str) -> None:
    file = io.BytesIO(picture(file_format))
    assert container_format(file) == "HEIF"
    assert exif_structure(file) is None
    assert list(xmp_packets(file)) == []
