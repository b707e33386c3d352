from __future__ import annotations

import io
import os
import random
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence
from support import exiftool
from support.metadata import (
    ASCII,
    BYTE,
    DOUBLE,
    FORMATS,
    GUESS,
    LONG,
    PIXELS,
    RATIONAL,
    SHORT,
    SRATIONAL,
    UNDEFINED,
    Field,
    exif_block,
    gps,
    picture,
    with_png_chunk,
)

from geosurge.archive.metadata.containers import ContainerError
from geosurge.archive.metadata.exif import add_guess, exif_stream, read_gps, remove_guess
from geosurge.archive.metadata.tiff import open_tiff
from geosurge.errors import ExifInvalidError, FileChangedError, InputError, WriteUnsupportedError

MAKER_NOTE = b"UNKNOWN MAKER\0" + bytes(range(256))
PLAIN: dict[int, Field] = {0x10F: (ASCII, b"Camera\0\0"), 0x112: (SHORT, [1])}
CAMERA = PLAIN | {0x927C: (UNDEFINED, MAKER_NOTE)}
ALTITUDE: dict[int, Field] = {5: (BYTE, [0]), 6: (RATIONAL, [(35, 1)])}


def coordinate(block: bytes) -> tuple[float, float] | None:
    found = read_gps(io.BytesIO(block))
    return None if found is None else found.coordinate


def picture_coordinate(data: bytes) -> tuple[float, float] | None:
    stream = exif_stream(io.BytesIO(data))
    found = None if stream is None else read_gps(stream)
    return None if found is None else found.coordinate


def frames(data: bytes) -> list[bytes]:
    with Image.open(io.BytesIO(data)) as image:
        return [frame.convert("RGBA").tobytes() for frame in ImageSequence.Iterator(image)]


def with_exif(file_format: str, block: bytes) -> bytes:
    if file_format == "PNG":
        return with_png_chunk(picture("PNG"), b"eXIf", block)
    return picture(file_format, exif=b"Exif\0\0" + block)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("place", [(48.8583, 2.2945), (-33.8568, 151.2153), (40.6892, -74.0445), (-22.9519, -43.2105)])
def test_positions_are_read_in_every_hemisphere(place: tuple[float, float], order: str) -> None:
    assert coordinate(exif_block(gps_tags=gps(*place), order=order)) == pytest.approx(place, abs=1e-7)


@pytest.mark.parametrize(
    ("latitude", "letter", "degrees"),
    [
        ((RATIONAL, [(485, 10)]), b"N\0", 48.5),
        ((RATIONAL, [(48, 1), (305, 10)]), b"n\0", 48 + 30.5 / 60),
        ((RATIONAL, [(48, 1), (30, 1), (0, 0)]), b"North\0", 48.5),
        ((RATIONAL, [(48, 1), (0, 0), (0, 0)]), b"S\0", -48.0),
        ((SRATIONAL, [(-48, 1), (30, 1), (0, 1)]), b"S\0", -48.5),
        ((DOUBLE, [48.0, 30.0, 0.0]), b"S\0", -48.5),
    ],
)
def test_unusual_forms_of_a_latitude_are_read(latitude: Field, letter: bytes, degrees: float) -> None:
    block = exif_block(gps_tags=gps(1, 2, latitude=latitude, latitude_ref=(ASCII, letter)))
    assert coordinate(block) == pytest.approx((degrees, 2), abs=1e-9)


@pytest.mark.parametrize(
    "changes",
    [
        {"latitude": None},
        {"latitude_ref": None},
        {"latitude_ref": (ASCII, b"\0\0")},
        {"latitude_ref": (ASCII, b"E\0")},
        {"latitude_ref": (ASCII, b"?\0")},
        {"latitude": (RATIONAL, [(0, 0), (0, 0), (0, 0)])},
        {"latitude": (DOUBLE, [float("nan"), 0.0, 0.0])},
        {"latitude": (SRATIONAL, [(-48, 1), (30, 1), (0, 1)]), "latitude_ref": (ASCII, b"N\0")},
        {"latitude": (SRATIONAL, [(-48, 1), (30, 1), (0, 1)]), "latitude_ref": None},
        {"latitude": (ASCII, b"48.5\0")},
        {"latitude": (99, b"????????")},
        {"latitude": (RATIONAL, bytes(8 * 5000))},
    ],
)
def test_what_is_no_latitude_is_no_coordinate(changes: dict[str, Field | None]) -> None:
    assert coordinate(exif_block(gps_tags=gps(1, 2, **changes))) is None


def test_an_infinite_latitude_stays_outside_every_range() -> None:
    found = coordinate(exif_block(gps_tags=gps(1, 2, latitude=(RATIONAL, [(1, 0), (0, 1), (0, 1)]))))
    assert found is not None
    assert found[0] == float("inf")


@pytest.mark.parametrize("charset", [b"ASCII\0\0\0", b"UNICODE\0", b""])
@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
def test_the_processing_method_is_read_in_every_charset(charset: bytes, codec: str) -> None:
    text = "GPS fix".encode(codec if charset.startswith(b"UNICODE") else "ascii")
    found = read_gps(io.BytesIO(exif_block(gps_tags={0x1B: (UNDEFINED, charset + text + b"\0\0")})))
    assert found is not None
    assert found.method == "GPS fix"


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        b"II*\0\0\0\0\0",
        exif_block({0x8825: (LONG, [2**32 - 1])}),
        exif_block({0x8825: (LONG, [2])}),
        exif_block({0x8825: (ASCII, b"GPS\0")}),
        exif_block({0x8825: (LONG, [8, 9])}),
        exif_block(CAMERA),
    ],
)
def test_a_block_without_a_gps_directory_says_nothing(block: bytes) -> None:
    assert read_gps(io.BytesIO(block)) is None


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("old", [None, exif_block(CAMERA), exif_block(CAMERA, CAMERA, gps_tags=gps(0, 0), order=">")])
def test_a_guess_is_added_and_no_pixel_changes(file_format: str, old: bytes | None) -> None:
    if file_format == "TIFF":
        data = picture("TIFF") if old is None else picture("TIFF", compression="tiff_lzw")
    else:
        data = picture(file_format) if old is None else with_exif(file_format, old)

    written = add_guess(data, GUESS)

    assert picture_coordinate(written) == pytest.approx((GUESS.latitude_deg, GUESS.longitude_deg), abs=1e-9)
    assert frames(written) == frames(data)
    assert add_guess(data, GUESS) == written


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("gps_tags", [None, gps(0, 0) | ALTITUDE])
def test_nothing_in_the_block_moves(order: str, gps_tags: dict[int, Field] | None) -> None:
    old = exif_block(CAMERA, CAMERA, gps_tags=gps_tags, order=order)
    data = with_exif("JPEG", old)

    stream = exif_stream(io.BytesIO(add_guess(data, GUESS)))

    assert stream is not None
    new = stream.read()
    assert new.index(MAKER_NOTE) == old.index(MAKER_NOTE)
    changed = [place for place in range(len(old)) if old[place] != new[place]]
    # The header's offset of the first directory, or the first directory's offset of the GPS directory.
    assert len(changed) <= 4
    tiff = open_tiff(new)
    first = tiff.read_directory(tiff.first_offset)
    assert [entry.tag for entry in first.entries] == [0x10F, 0x112, 0x8825, 0x927C]
    assert len(tiff.read_directory(first.next_offset).entries) == len(CAMERA)


def test_the_pixels_of_a_jpeg_stay_byte_by_byte() -> None:
    data = with_exif("JPEG", exif_block(CAMERA))
    written = add_guess(data, GUESS)
    assert written[written.index(b"\xff\xda") :] == data[data.index(b"\xff\xda") :]
    assert written[:20] == data[:20], "JFIF's segment comes first"


def test_other_tags_survive_for_another_reader(tmp_path: Path) -> None:
    block = exif_block(PLAIN, gps_tags=gps(0, 0) | ALTITUDE)
    names = {file_format: tmp_path / f"a.{file_format.lower()}" for file_format in ("JPEG", "PNG", "WEBP")}
    for file_format, path in names.items():
        path.write_bytes(add_guess(with_exif(file_format, block), GUESS))

    for tags in exiftool.read_tags(names.values()).values():
        assert tags["EXIF:Make"] == "Camera"
        assert tags["EXIF:GPSAltitude"] == 35
        assert tags["EXIF:GPSHPositioningError"] == 12346
        assert tags["EXIF:GPSProcessingMethod"] == GUESS.method
        assert tags["EXIF:GPSMapDatum"] == "WGS-84"
        assert tags["EXIF:GPSVersionID"] == "2 3 0 0"
        assert exiftool.position(tags) == pytest.approx((GUESS.latitude_deg, GUESS.longitude_deg), abs=1e-8)
        assert "ExifTool:Warning" not in tags


@pytest.mark.parametrize("file_format", ["WEBP", "PNG", "TIFF"])
def test_every_frame_stays(file_format: str) -> None:
    buffer = io.BytesIO()
    others = [Image.fromarray(255 - PIXELS), Image.fromarray(np.flip(PIXELS).copy())]
    Image.fromarray(PIXELS).save(buffer, file_format, save_all=True, append_images=others)
    written = add_guess(buffer.getvalue(), GUESS)
    assert len(frames(written)) == 3
    assert frames(written) == frames(buffer.getvalue())


@pytest.mark.parametrize("big", [False, True])
def test_a_tiff_only_grows(big: bool) -> None:
    data = picture("TIFF", big_tiff=big)
    written = add_guess(data, GUESS)
    assert picture_coordinate(written) == pytest.approx((GUESS.latitude_deg, GUESS.longitude_deg), abs=1e-9)
    assert frames(written) == frames(data)
    width = 8 if big else 4
    assert written[16 if big else 8 : len(data)] == data[16 if big else 8 :]
    assert written[:width] == data[:width]
    # A second guess, as after a correction, replaces the first.
    other = add_guess(written, replace(GUESS, latitude_deg=1.5))
    assert picture_coordinate(other) == pytest.approx((1.5, GUESS.longitude_deg), abs=1e-9)


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"BM", b"no picture"])
def test_other_files_hold_no_exif(data: bytes) -> None:
    with pytest.raises(WriteUnsupportedError, match="sidecars"):
        add_guess(data, GUESS)


@pytest.mark.parametrize(
    "data",
    [
        with_exif("JPEG", b"II*\0\xff\xff\xff\xff"),
        with_exif("JPEG", b"garbage"),
        with_exif("JPEG", exif_block({0x8825: (LONG, [2**32 - 1])})),
        with_exif("PNG", b""),
        with_exif("WEBP", b"MM\0*\0\0\0\1"),
        picture("JPEG")[:100],
        picture("PNG")[:60],
        picture("WEBP")[:-20],
        b"RIFF\x04\0\0\0WEBP",
        b"RIFF\x0c\0\0\0WEBPODD \0\0\0\0",
        picture("TIFF")[:60],
    ],
)
def test_nothing_is_added_to_a_damaged_picture(data: bytes) -> None:
    with pytest.raises(ExifInvalidError, match="sidecars"):
        add_guess(data, GUESS)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_a_block_that_is_too_large_is_not_read(file_format: str, tmp_path: Path) -> None:
    size = 200 * 2**20
    heads = {
        "PNG": picture("PNG")[:33] + struct.pack(">L", size) + b"eXIf",
        "WEBP": b"RIFF" + struct.pack("<L", size + 12) + b"WEBPEXIF" + struct.pack("<L", size),
    }
    path = tmp_path / "sparse"
    path.write_bytes(heads[file_format])
    os.truncate(path, size + 100)
    tracemalloc.start()
    with path.open("rb") as file, pytest.raises(ContainerError, match="16 MiB"):
        exif_stream(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("file_format", FORMATS)
def test_damage_anywhere_raises_only_what_is_meant(file_format: str) -> None:
    chance = random.Random(file_format)
    whole = picture("TIFF") if file_format == "TIFF" else with_exif(file_format, exif_block(CAMERA, gps_tags=gps(0, 0)))
    sound = add_guess(whole, GUESS)
    written = 0
    for _ in range(400):
        data = bytearray(sound)
        for _ in range(chance.choice([1, 2, 8])):
            data[chance.randrange(len(data))] = chance.choice([0, 255, chance.randrange(256)])
        damaged = bytes(data[: chance.choice([len(data), chance.randrange(len(data))])])
        for change in (add_guess, remove_guess):
            try:
                written += change(damaged, GUESS) != damaged
            except InputError:
                continue
    assert written > 200


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_guess_is_removed_after_another_program_changed_the_file(file_format: str, tmp_path: Path) -> None:
    path = tmp_path / "a.picture"
    block = exif_block(PLAIN, gps_tags=gps(0, 0) | ALTITUDE)
    data = picture("TIFF") if file_format == "TIFF" else with_exif(file_format, block)
    path.write_bytes(add_guess(data, GUESS))
    exiftool.change_tags([path], "-Artist=Somebody", "-GPSImgDirection=90", "-GPSImgDirectionRef=T")
    assert path.read_bytes() != add_guess(data, GUESS)

    path.write_bytes(remove_guess(path.read_bytes(), GUESS))

    tags = exiftool.read_tags([path])[path]
    kept = {name.removeprefix("EXIF:GPS") for name in tags if name.startswith("EXIF:GPS")}
    altitude = set() if file_format == "TIFF" else {"Altitude", "AltitudeRef"}
    assert kept == {"VersionID", "ImgDirection", "ImgDirectionRef"} | altitude
    assert tags["EXIF:Artist"] == "Somebody"
    assert frames(path.read_bytes()) == frames(data)


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_guess_in_a_picture_without_exif_leaves_no_directory_behind(file_format: str) -> None:
    data = picture(file_format)
    rest = remove_guess(add_guess(data, GUESS), GUESS)
    stream = exif_stream(io.BytesIO(rest))
    assert (stream is None) == (file_format != "TIFF")
    assert picture_coordinate(rest) is None
    assert frames(rest) == frames(data)
    assert remove_guess(rest, GUESS) == rest


@pytest.mark.parametrize("data", [picture("JPEG"), with_exif("JPEG", exif_block(CAMERA)), b"GIF89a"])
def test_where_no_guess_is_there_is_none_to_remove(data: bytes) -> None:
    assert remove_guess(data, GUESS) == data


def test_a_corrected_position_is_not_removed() -> None:
    corrected = add_guess(picture("JPEG"), replace(GUESS, latitude_deg=-33.9))
    with pytest.raises(FileChangedError, match="run-1"):
        remove_guess(corrected, GUESS)


def test_the_same_position_of_somebody_else_is_not_removed() -> None:
    data = with_exif("JPEG", exif_block(gps_tags=gps(GUESS.latitude_deg, GUESS.longitude_deg)))
    with pytest.raises(FileChangedError, match="stays as it is"):
        remove_guess(data, GUESS)
