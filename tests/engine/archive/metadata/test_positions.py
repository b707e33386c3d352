from __future__ import annotations

import io
import os
import random
import tracemalloc
import zlib
from pathlib import Path

import pytest
from support import exiftool
from support.metadata import (
    BYTE,
    GUESS,
    RATIONAL,
    READ_FORMATS,
    Field,
    exif_block,
    first_position,
    gps,
    jpeg_segment,
    picture,
    with_png_chunk,
    xmp_packet,
)

from geosurge.archive.metadata.containers import MAX_METADATA_BYTES
from geosurge.archive.metadata.exif import add_guess
from geosurge.archive.metadata.positions import read_claims, sidecar_paths
from geosurge.archive.metadata.sidecars import add_guess as add_guess_to_sidecar
from geosurge.archive.rows import Position
from geosurge.errors import InputNotReadableError, SidecarInvalidError

XMP_HEAD = b"http://ns.adobe.com/xap/1.0/\0"


def here(latitude: str, longitude: str) -> str:
    return xmp_packet("", f'exif:GPSLatitude="{latitude}" exif:GPSLongitude="{longitude}"')


def with_xmp(file_format: str, packet: bytes, **options: object) -> bytes:
    if file_format == "PNG":
        return with_png_chunk(picture("PNG"), b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet)
    if file_format == "TIFF":
        return picture("TIFF", tiffinfo={700: packet})
    return picture(file_format, xmp=packet, **options)


def read(data: bytes, *sidecars: Path) -> Position | None:
    return first_position(io.BytesIO(data), sidecars)


def with_gps(**changes: Field | None) -> bytes:
    return picture("JPEG", exif=b"Exif\0\0" + exif_block(gps_tags=gps(1, 2, **changes)))


def sidecar(folder: Path, text: str | bytes, name: str = "a.jpg.xmp") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_positions_that_exiftool_writes_are_read(tmp_path: Path) -> None:
    chance = random.Random(5)
    places = [(90.0, 180.0), (-90.0, -180.0), (1e-5, -1e-5), (0.0, 12.5), (-12.5, 0.0)]
    places += [(chance.uniform(-90, 90), chance.uniform(-180, 180)) for _ in range(60)]
    expected: dict[Path, Position] = {}
    tags: dict[Path, dict[str, object]] = {}
    for number, (latitude, longitude) in enumerate(places):
        file_format = READ_FORMATS[number % len(READ_FORMATS)]
        path = tmp_path / f"{number}.{file_format.lower()}"
        path.write_bytes(picture(file_format))
        group = "XMP-exif" if number % 3 == 0 else "GPS"
        tags[path] = {f"{group}:GPSLatitude": latitude, f"{group}:GPSLongitude": longitude}
        if group == "GPS":
            letters = {"GPS:GPSLatitudeRef": "NS"[latitude < 0], "GPS:GPSLongitudeRef": "EW"[longitude < 0]}
            tags[path] = {**tags[path], **letters, "GPS:GPSLatitude": abs(latitude), "GPS:GPSLongitude": abs(longitude)}
        expected[path] = Position(latitude, longitude, "xmp" if number % 3 == 0 else "exif")
    exiftool.write_tags(tags, tmp_path)

    for path, position in expected.items():
        with path.open("rb") as image:
            found = first_position(image)
        assert found is not None
        assert found.source == position.source
        assert (found.latitude_deg, found.longitude_deg) == pytest.approx(
            (position.latitude_deg, position.longitude_deg), abs=1e-6
        )


@pytest.mark.parametrize("file_format", READ_FORMATS)
def test_xmp_is_read_in_every_container(file_format: str) -> None:
    assert read(with_xmp(file_format, here("1,30.0N", "2,0.0W").encode())) == Position(1.5, -2.0, "xmp")


def test_compressed_xmp_is_read() -> None:
    text = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(here("1,30.0N", "2,0.0W").encode())
    assert read(with_png_chunk(picture("PNG"), b"iTXt", text)) == Position(1.5, -2.0, "xmp")


def test_metadata_behind_the_pixels_is_read() -> None:
    data = picture("PNG")
    end = len(data) - 12
    chunk = with_png_chunk(data, b"eXIf", exif_block(gps_tags=gps(1, 2)))[33 : 33 + len(data)]
    length = int.from_bytes(chunk[:4], "big") + 12
    assert read(data[:end] + chunk[:length] + data[end:]) == Position(1.0, 2.0, "exif")


def test_the_first_picture_of_a_multi_picture_jpeg_counts() -> None:
    assert read(with_gps() + picture("JPEG", exif=b"Exif\0\0" + exif_block(gps_tags=gps(8, 9)))) == Position(
        1.0, 2.0, "exif"
    )


def test_exif_comes_before_xmp_and_xmp_before_sidecars(tmp_path: Path) -> None:
    both = with_gps()
    both = both[:2] + jpeg_segment(0xE1, XMP_HEAD + here("3,0.0N", "4,0.0E").encode()) + both[2:]
    only_xmp = with_xmp("JPEG", here("3,0.0N", "4,0.0E").encode())
    beside = [sidecar(tmp_path, here("5,0.0N", "6,0.0E")), sidecar(tmp_path, here("7,0.0N", "8,0.0E"), "a.xmp")]

    assert read(both, *beside) == Position(1.0, 2.0, "exif")
    assert read(only_xmp, *beside) == Position(3.0, 4.0, "xmp")
    assert read(picture("JPEG"), *beside) == Position(5.0, 6.0, "sidecar")
    assert [claim.position.latitude_deg for claim in read_claims(io.BytesIO(both), beside)] == [1, 3, 5, 7]


def test_a_guess_is_told_from_the_truth(tmp_path: Path) -> None:
    beside = [
        sidecar(tmp_path, add_guess_to_sidecar(None, GUESS)),
        sidecar(tmp_path, here("5,0.0N", "6,0.0E"), "b.xmp"),
    ]
    data = add_guess(picture("JPEG"), GUESS)
    assert [claim.run_id for claim in read_claims(io.BytesIO(data), beside)] == ["run-1", "run-1", ""]


@pytest.mark.parametrize(
    "changes",
    [
        {"latitude": (RATIONAL, [(0, 1)]), "longitude": (RATIONAL, [(0, 1)])},
        {"latitude": (RATIONAL, [(91, 1)])},
        {"longitude": (RATIONAL, [(181, 1)])},
        {"latitude": (RATIONAL, [(90, 1), (1, 100)])},
        {"latitude": (RATIONAL, [(1, 0), (0, 1), (0, 1)])},
        {"latitude": (RATIONAL, [(0, 0)] * 3), "longitude": (RATIONAL, [(0, 0)] * 3)},
        {"latitude_ref": None},
        {"latitude": (BYTE, [])},
    ],
)
def test_what_is_no_position_counts_as_absent(changes: dict[str, Field | None]) -> None:
    assert read(with_gps(**changes)) is None


@pytest.mark.parametrize(
    ("latitude", "longitude"),
    [("0,0.0N", "0,0.0E"), ("NaN", "1"), ("91,0.0N", "0,1.0E"), ("1,0.0N", ""), ("-0", "0.0")],
)
def test_what_is_no_position_in_xmp_counts_as_absent(latitude: str, longitude: str) -> None:
    assert read(with_xmp("JPEG", here(latitude, longitude).encode())) is None


def test_zero_alone_is_a_coordinate() -> None:
    assert read(with_xmp("JPEG", here("0,0.0N", "0,0.6W").encode())) == Position(0.0, -0.01, "xmp")


def test_damaged_metadata_hides_none_behind_it(tmp_path: Path) -> None:
    broken = picture("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff", xmp=b"<not><xml>")
    assert read(broken) is None
    assert read(broken, sidecar(tmp_path, here("5,0.0N", "6,0.0E"))) == Position(5.0, 6.0, "sidecar")


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"\xff\xd8\xff", b"GIF89a", b"II*\0", b"\x89PNG\r\n\x1a\n", b"no picture"]
)
def test_what_is_no_picture_has_no_position(data: bytes) -> None:
    assert read(data) is None


@pytest.mark.parametrize("file_format", READ_FORMATS)
def test_damage_anywhere_never_raises(file_format: str) -> None:
    chance = random.Random(file_format)
    packet = here("5,0.0N", "6,0.0E").encode()
    # Into these two nothing is written by the engine.
    boxed = file_format in ("HEIF", "AVIF")
    sound = (
        with_xmp(file_format, packet, exif=b"Exif\0\0" + exif_block(gps_tags=gps(1, 2)))
        if boxed
        else add_guess(with_xmp(file_format, packet), GUESS)
    )
    for _ in range(300):
        data = bytearray(sound)
        for _ in range(chance.choice([1, 3, 30])):
            data[chance.randrange(len(data))] = chance.choice([0, 255, chance.randrange(256)])
        found = read(bytes(data[: chance.choice([len(data), chance.randrange(len(data))])]))
        assert found is None or (abs(found.latitude_deg) <= 90 and abs(found.longitude_deg) <= 180)


@pytest.mark.parametrize("file_format", READ_FORMATS)
def test_little_of_a_huge_file_is_read(file_format: str, tmp_path: Path) -> None:
    path = tmp_path / "huge"
    path.write_bytes(picture(file_format))
    os.truncate(path, 4 * 2**30)
    tracemalloc.start()
    try:
        with path.open("rb") as image:
            assert first_position(image) is None
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xd8\xff\xe0 a picture",
        b"<html>",
        b"<html/>",
        b"\0" * 1000,
        here("5,0.0N", "6,0.0E").encode()[:-30],
        b'<!DOCTYPE a [<!ENTITY e "5,0.0N">]>' + here("5,0.0N", "6,0.0E").encode(),
    ],
)
def test_a_sidecar_that_is_no_xmp_leaves_the_question_open(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(SidecarInvalidError, match=r"a\.jpg\.xmp.*repair or remove"):
        read(picture("JPEG"), sidecar(tmp_path, content))
    assert read(with_gps(), tmp_path / "a.jpg.xmp") == Position(1.0, 2.0, "exif")


def test_a_huge_sidecar_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = sidecar(tmp_path, here("5,0.0N", "6,0.0E"))
    os.truncate(path, 100_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(SidecarInvalidError, match="larger than 16 MiB"):
            read(picture("JPEG"), path)
        assert tracemalloc.get_traced_memory()[1] < 2.5 * MAX_METADATA_BYTES
    finally:
        tracemalloc.stop()


def test_a_sidecar_that_vanished_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputNotReadableError, match=r"gone\.xmp"):
        read(picture("JPEG"), tmp_path / "gone.xmp")


@pytest.mark.parametrize("name", ["photo.jpg", "photo", "photo.tar.jpg", "é.jpg", os.fsdecode(b"\xff\xfe.jpg")])
def test_sidecars_are_found_by_either_name(name: str, tmp_path: Path) -> None:
    photo = tmp_path / name
    assert sidecar_paths(photo) == []
    expected = {photo.with_name(f"{photo.name}.xmp"): None, photo.with_name(f"{photo.stem}.XMP"): None}
    for path in [*expected, tmp_path / "other.xmp", tmp_path / "photo.xmp.bak"]:
        path.touch()
    assert sidecar_paths(photo) == list(expected)


def test_only_files_are_sidecars(tmp_path: Path) -> None:
    (tmp_path / "a.jpg.xmp").mkdir()
    os.mkfifo(tmp_path / "a.xmp")
    (tmp_path / "a.XMP").symlink_to("a.xmp")
    assert sidecar_paths(tmp_path / "a.jpg") == []
    assert sidecar_paths(tmp_path / ("a" * 250 + ".jpg")) == []
    assert sidecar_paths(tmp_path / "missing" / "a.jpg") == []


@pytest.mark.parametrize(("target", "why"), [("nowhere.xmp", "No such file"), ("a.jpg.xmp", "symbolic links")])
def test_a_link_that_leads_nowhere_is_a_sidecar_that_cannot_be_read(target: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg.xmp"
    path.symlink_to(target)
    assert sidecar_paths(tmp_path / "a.jpg") == [path]
    with pytest.raises(InputNotReadableError, match=rf"a\.jpg\.xmp.*{why}.*it is a link: mend it or remove it"):
        read(picture("JPEG"), path)


def test_one_sidecar_of_two_names_counts_once(tmp_path: Path) -> None:
    path = sidecar(tmp_path, "")
    (tmp_path / "a.XMP").hardlink_to(path)
    assert sidecar_paths(tmp_path / "a.jpg") == [path]
