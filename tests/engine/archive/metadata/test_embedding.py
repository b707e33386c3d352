from __future__ import annotations

import io
import struct

import pytest
from PIL import Image, ImageSequence
from support.metadata import ASCII, PIXELS, exif_block, gps, jpeg_segment, picture, with_png_chunk

from geosurge.archive.metadata.containers import ContainerError, container_format, read_at
from geosurge.archive.metadata.embedding import embed_exif, find_exif
from geosurge.errors import WriteUnsupportedError

BLOCK = exif_block({0x10F: (ASCII, b"Camera\0\0")})
LARGER = exif_block({0x10F: (ASCII, b"Another camera\0")}, gps_tags=gps(1, 2))
EMBEDDED = ("JPEG", "PNG", "WEBP")
formats = pytest.mark.parametrize("file_format", EMBEDDED)


def exif(data: bytes) -> bytes | None:
    stream = io.BytesIO(data)
    block = find_exif(stream, container_format(stream))
    return None if block is None else read_at(stream, block.data, block.size)


def embed(data: bytes, new: bytes | None) -> bytes:
    stream = io.BytesIO(data)
    file_format = container_format(stream)
    return embed_exif(file_format, data, find_exif(stream, file_format), new)


def frames(data: bytes) -> list[bytes]:
    with Image.open(io.BytesIO(data)) as image:
        return [frame.convert("RGBA").tobytes() for frame in ImageSequence.Iterator(image)]


@formats
def test_a_block_is_put_in_replaced_and_taken_out(file_format: str) -> None:
    data = picture(file_format)
    written = data
    for block in (BLOCK, LARGER, BLOCK, None):
        written = embed(written, block)
        assert exif(written) == block
        assert frames(written) == frames(data)
    if file_format != "WEBP":
        assert written == data
    assert embed(embed(written, BLOCK), None) == written


@formats
def test_another_reader_finds_the_block(file_format: str) -> None:
    with Image.open(io.BytesIO(embed(picture(file_format), LARGER))) as image:
        assert image.getexif()[0x10F] == "Another camera"
        assert image.getexif().get_ifd(0x8825)[1] == "N"


@pytest.mark.parametrize("prefix", [b"", b"Exif\0\0"])
@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_a_prefix_that_others_wrote_stays(file_format: str, prefix: bytes) -> None:
    data = embed(picture(file_format), prefix + BLOCK)
    assert exif(data) == BLOCK
    written = embed(data, LARGER)
    assert exif(written) == LARGER
    assert (b"Exif\0\0" in written) == bool(prefix)


def test_a_jpeg_keeps_every_byte_around_its_exif() -> None:
    data = picture("JPEG")
    assert embed(data, BLOCK) == data[:20] + jpeg_segment(0xE1, b"Exif\0\0" + BLOCK) + data[20:]
    no_jfif = data[:2] + data[20:]
    assert embed(no_jfif, BLOCK) == no_jfif[:2] + jpeg_segment(0xE1, b"Exif\0\0" + BLOCK) + no_jfif[2:]


def test_a_png_keeps_every_byte_around_its_exif() -> None:
    data = picture("PNG")
    assert embed(data, BLOCK) == with_png_chunk(data, b"eXIf", BLOCK)


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 50}, {"quality": 50, "xmp": b"<a/>"}])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("size", [(1, 1), (33, 17)])
def test_a_webp_of_any_kind_keeps_its_picture(options: dict[str, object], mode: str, size: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    Image.new(mode, size, (10, 200, 30, 100)[: len(mode)]).save(buffer, "WEBP", **options)
    data = buffer.getvalue()

    written = embed(data, LARGER)

    assert struct.unpack_from("<L", written, 4)[0] == len(written) - 8
    assert frames(written) == frames(data)
    with Image.open(io.BytesIO(written)) as image:
        assert image.size == size
        assert image.getexif().get_ifd(0x8825)[1] == "N"
        assert image.info.get("xmp") == options.get("xmp")
    assert frames(embed(written, None)) == frames(data)


def test_every_picture_of_a_multi_picture_jpeg_stays() -> None:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "MPO", save_all=True, append_images=[Image.fromarray(255 - PIXELS)])
    written = embed(buffer.getvalue(), LARGER)
    assert len(frames(written)) == 2
    assert frames(written) == frames(buffer.getvalue())


def test_exif_behind_the_list_of_a_multi_picture_jpeg_is_left_alone() -> None:
    data = picture("JPEG")
    behind = jpeg_segment(0xE2, b"MPF\0" + bytes(30)) + jpeg_segment(0xE1, b"Exif\0\0" + BLOCK)
    with pytest.raises(WriteUnsupportedError, match="multi-picture"):
        embed(data[:20] + behind + data[20:], LARGER)


def test_a_block_that_is_too_large_for_a_jpeg_is_refused() -> None:
    data = picture("JPEG")
    assert exif(embed(data, bytes(65527))) == bytes(65527)
    with pytest.raises(WriteUnsupportedError, match="65533 bytes at most"):
        embed(data, bytes(65528))


@pytest.mark.parametrize(
    "data",
    [
        picture("JPEG")[:100],
        picture("PNG")[:33],
        picture("WEBP")[:-20],
        b"RIFF\x04\0\0\0WEBP",
        b"RIFF\x0c\0\0\0WEBPODD \0\0\0\0",
        b"\x89PNG\r\n\x1a\n\0\0\0\0IEND\0\0\0\0",
    ],
)
def test_nothing_is_put_into_a_damaged_file(data: bytes) -> None:
    with pytest.raises(ContainerError):
        embed(data, BLOCK)
