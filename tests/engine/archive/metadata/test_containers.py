from __future__ import annotations

import io
import zlib

import pytest
from support.metadata import FORMATS, jpeg_segment, picture, with_png_chunk

from geosurge.archive.metadata.containers import (
    MAX_METADATA_BYTES,
    ContainerError,
    chunks,
    container_format,
    exif_block,
    xmp_packet,
)


def packets(data: bytes) -> list[bytes]:
    stream = io.BytesIO(data)
    file_format = container_format(stream)
    found = [xmp_packet(stream, file_format, chunk) for chunk in chunks(stream, file_format)]
    return [packet for packet in found if packet is not None]


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_format_is_known_by_its_first_bytes(file_format: str) -> None:
    assert container_format(io.BytesIO(picture(file_format))) == file_format


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\xff\xd8", b"RIFF\0\0\0\0WAVE", b"BM" + bytes(40)])
def test_other_files_have_no_format(data: bytes) -> None:
    assert container_format(io.BytesIO(data)) == ""


@pytest.mark.parametrize(("file_format", "start"), [("PNG", 8), ("WEBP", 12)])
def test_chunks_cover_the_file(file_format: str, start: int) -> None:
    data = picture(file_format)
    found = list(chunks(io.BytesIO(data), file_format))
    assert [chunk.start for chunk in found] == [start, *(chunk.end for chunk in found[:-1])]
    assert found[-1].end == len(data)


def test_a_jpeg_is_followed_to_its_pixels() -> None:
    data = picture("JPEG")
    found = list(chunks(io.BytesIO(data), "JPEG"))
    assert [chunk.start for chunk in found] == [2, *(chunk.end for chunk in found[:-1])]
    assert data[found[-1].start : found[-1].start + 2] == b"\xff\xda"


def test_fill_bytes_and_lone_markers_between_segments_are_passed_over() -> None:
    data = picture("JPEG")
    padded = data[:2] + b"\xff\xff\xff\x01\xff\xff" + jpeg_segment(0xE1, b"Exif\0\0II")[1:] + data[2:]
    stream = io.BytesIO(padded)
    found = [exif_block(stream, "JPEG", chunk) for chunk in chunks(stream, "JPEG")]
    assert [padded[place[0] : place[0] + place[1]] for place in found if place] == [b"II"]


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_a_file_cut_before_its_pixels_end_raises_only_its_own_error(file_format: str) -> None:
    data = picture(file_format)
    head = data.index(b"\xff\xda") if file_format == "JPEG" else len(data) - 13
    for length in [*range(12, 60), head]:
        with pytest.raises(ContainerError):
            walk(data[:length], file_format)


def walk(data: bytes, file_format: str) -> None:
    end = max(chunk.end for chunk in chunks(io.BytesIO(data), file_format))
    # Of the last chunk, only the header is looked at.
    if file_format != "JPEG" and end > len(data):
        raise ContainerError


def test_endless_markers_end() -> None:
    with pytest.raises(ContainerError, match="no JPEG marker"):
        list(chunks(io.BytesIO(b"\xff\xd8" + b"\xff" * 300_000), "JPEG"))


def test_too_many_chunks_are_damage() -> None:
    with pytest.raises(ContainerError, match="more than 200000"):
        list(chunks(io.BytesIO(b"\xff\xd8" + jpeg_segment(0xE0, b"") * 200_001), "JPEG"))


def test_compressed_text_is_unpacked_and_bombs_are_not() -> None:
    head = b"XML:com.adobe.xmp\0\1\0en\0Titel\0"
    small = with_png_chunk(picture("PNG"), b"iTXt", head + zlib.compress(b"<a/>"))
    bomb = with_png_chunk(picture("PNG"), b"iTXt", head + zlib.compress(bytes(MAX_METADATA_BYTES + 1)))
    damaged = with_png_chunk(picture("PNG"), b"iTXt", head + b"no zlib")
    cut = with_png_chunk(picture("PNG"), b"iTXt", b"XML:com.adobe.xmp\0")

    assert packets(small) == [b"<a/>"]
    assert packets(bomb) == packets(damaged) == packets(cut) == []


@pytest.mark.parametrize("keyword", [b"Comment\0\0\0\0\0", b"XML:com.adobe.xm"])
def test_other_text_is_no_xmp(keyword: bytes) -> None:
    assert packets(with_png_chunk(picture("PNG"), b"iTXt", keyword + b"<a/>")) == []
