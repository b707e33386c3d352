from __future__ import annotations

import io
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from geosurge.errors import (
    ImageEmptyError,
    ImageError,
    ImageFormatUnsupportedError,
    ImageNotDecodableError,
    ImageTooLargeError,
    ImageTooManyPixelsError,
    ImageTooSmallError,
    ImageTruncatedError,
    InputNotReadableError,
)
from geosurge.images import (
    BACKGROUND_RGB,
    OWN_FORMATS,
    OWN_LIMITS,
    ImageLimits,
    decode_image,
    normalise_image,
    read_image_bytes,
)
from geosurge.settings import ServerSettings

HEIGHT, WIDTH = 48, 64
ROWS, COLUMNS = np.mgrid[:HEIGHT, :WIDTH]
PLAIN: NDArray[np.uint8] = np.stack([COLUMNS * 3 + 20, ROWS * 4 + 10, 200 - COLUMNS - ROWS], axis=-1).astype(np.uint8)
GREY: NDArray[np.uint8] = PLAIN[..., 0]


def encode(picture: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> NDArray[np.int64]:
    picture = decode_image(data, OWN_LIMITS)
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(np.int64)


def difference(data: bytes, expected: NDArray[np.integer] = PLAIN) -> float:
    found = pixels(data)
    assert found.shape == expected.shape
    return float(np.abs(found - expected.astype(np.int64)).mean())


def as_grey(grey: NDArray[np.integer]) -> NDArray[np.integer]:
    return np.repeat(grey[..., None], 3, axis=-1)


def png(width: int, height: int, depth: int, colour_type: int, raw: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def sixteen_bit_png(samples: NDArray[np.uint16], colour_type: int) -> bytes:
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in samples)
    return png(samples.shape[1], samples.shape[0], 16, colour_type, rows)


def sixteen_bit_tiff(samples: NDArray[np.uint16], order: str, photometric: int) -> bytes:
    height, width = samples.shape[:2]
    channels = samples.shape[2] if samples.ndim == 3 else 1
    body = samples.astype(f"{order}u2").tobytes()
    tags = {256: width, 257: height, 258: 16, 259: 1, 262: photometric, 277: channels, 278: height, 279: len(body)}
    tags[273] = 8 + 2 + 12 * (len(tags) + 1) + 4 + 6
    entries = b""
    for tag, value in sorted(tags.items()):
        if tag == 258 and channels == 3:
            entries += struct.pack(f"{order}HHII", tag, 3, 3, tags[273] - 6)
        elif tag == 279:
            entries += struct.pack(f"{order}HHII", tag, 4, 1, value)
        else:
            entries += struct.pack(f"{order}HHIHxx", tag, 3, 1, value)
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8)
    return (
        head + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + struct.pack(f"{order}3H", 16, 16, 16) + body
    )


def valid_files() -> dict[str, bytes]:
    plain = Image.fromarray(PLAIN)
    return {
        "jpeg": encode(plain, "JPEG", quality=95),
        "progressive jpeg": encode(plain, "JPEG", quality=95, progressive=True),
        "png": encode(plain, "PNG"),
        "lossy webp": encode(plain, "WEBP", quality=95),
        "lossless webp": encode(plain, "WEBP", lossless=True),
        "gif": encode(plain, "GIF"),
        "bmp": encode(plain, "BMP"),
        "tiff": encode(plain, "TIFF"),
        "lzw tiff": encode(plain, "TIFF", compression="tiff_lzw"),
        "deflate tiff": encode(plain, "TIFF", compression="tiff_adobe_deflate"),
        "jpeg tiff": encode(plain, "TIFF", compression="jpeg", quality=95),
        "heif": encode(plain, "HEIF", quality=95),
    }


FILES = valid_files()


@pytest.mark.parametrize("name", FILES)
def test_every_accepted_format_decodes_to_the_plain_picture(name: str) -> None:
    assert difference(FILES[name]) < 5.0


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", ImageEmptyError),
        (b"a letter, not a picture", ImageNotDecodableError),
        (bytes(4096), ImageNotDecodableError),
        (b"<?xml version='1.0'?><html></html>", ImageNotDecodableError),
        (b"\xff\xd8\xff" + bytes(200) + b"\xff\xd9", ImageNotDecodableError),
        (b"\x00\x00\x00\x18ftypheic" + bytes(12) + b"\x00\x00\x00\x08mdat", ImageNotDecodableError),
        (b"\x00\x00\x00\x18ftypavif" + bytes(64), ImageFormatUnsupportedError),
        (b"\x00\x00\x00\x18ftypisom" + bytes(64), ImageFormatUnsupportedError),
        (b"\x00\x00\x00\x18ftypcrx " + bytes(64), ImageFormatUnsupportedError),
        (b"%PDF-1.7\n", ImageFormatUnsupportedError),
        (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", ImageFormatUnsupportedError),
        (encode(Image.fromarray(PLAIN), "PPM"), ImageFormatUnsupportedError),
        (encode(Image.fromarray(PLAIN), "ICO"), ImageFormatUnsupportedError),
        (encode(Image.fromarray(PLAIN), "JPEG2000"), ImageFormatUnsupportedError),
        (encode(Image.new("RGB", (1, 1)), "PNG"), ImageTooSmallError),
        (encode(Image.new("RGB", (640, 7)), "JPEG"), ImageTooSmallError),
        (FILES["jpeg"][:-300], ImageTruncatedError),
        (FILES["heif"][:-30], ImageTruncatedError),
    ],
)
def test_each_kind_of_bad_input_has_its_own_error(data: bytes, error: type[ImageError]) -> None:
    with pytest.raises(error) as caught:
        decode_image(data, OWN_LIMITS)
    assert type(caught.value) is error


WITHOUT_PLUG_IN = """
import sys
sys.modules["pillow_heif"] = None
from geosurge.images import OWN_LIMITS, decode_image
decode_image(sys.stdin.buffer.read(), OWN_LIMITS)
"""


def test_heic_without_its_plug_in_says_which_one_it_needs() -> None:
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_PLUG_IN], input=FILES["heif"], capture_output=True, check=False, timeout=120
    )
    last = run.stderr.decode().splitlines()[-1]
    assert last.startswith("geosurge.errors.ImagePlugInMissingError: HEIF needs a plug-in where it is decoded")
    assert last.endswith("pip install 'geosurge[heif]', or convert the image to one of JPEG, PNG, WEBP, TIFF, GIF, BMP")


def test_a_plug_in_that_does_not_work_is_not_the_pictures_fault() -> None:
    code = WITHOUT_PLUG_IN.replace('"pillow_heif"', '"_pillow_heif"')
    run = subprocess.run(
        [sys.executable, "-c", code], input=FILES["heif"], capture_output=True, check=False, timeout=120
    )
    assert "ImagePlugInMissingError" in run.stderr.decode().splitlines()[-1]


@pytest.mark.parametrize(
    ("major", "others", "file_format"),
    [
        (b"heic", b"mif1heic", "HEIF"),
        (b"mif1", b"mif1heic", "HEIF"),
        (b"mif1", b"miafavif", "AVIF"),
        (b"mif1", b"", "HEIF"),
        (b"isom", b"mp41mp42", "MP4 video"),
    ],
)
def test_pictures_in_media_files_are_told_by_any_of_their_brands(major: bytes, others: bytes, file_format: str) -> None:
    head = struct.pack(">I", 16 + len(others)) + b"ftyp" + major + bytes(4) + others
    with pytest.raises(ImageFormatUnsupportedError, match=f"^{file_format} is not accepted"):
        decode_image(head + bytes(64), ImageLimits(formats=("JPEG",)))


def heif(picture: NDArray[np.uint8], **options: object) -> bytes:
    return encode(Image.fromarray(picture), "HEIF", **options)


def patched(data: bytes, box: bytes, offset: int, form: str, *values: int) -> bytes:
    """The file with other numbers in the first box of a name."""
    changed = bytearray(data)
    struct.pack_into(form, changed, data.index(box) + 4 + offset, *values)
    return bytes(changed)


TILED = heif(np.tile(PLAIN, (4, 4, 1)), quality=95, tile_size=64)
"""Of three times four tiles, as phones write them; the canvas is 256 x 192."""


def test_a_heif_of_tiles_is_one_picture() -> None:
    assert b"grid" in TILED
    assert difference(TILED, np.tile(PLAIN, (4, 4, 1))) < 5.0


def test_a_heif_that_announces_too_much_is_refused() -> None:
    canvas = TILED.replace(struct.pack(">HH", 256, 192), struct.pack(">HH", 12_000, 12_000))
    assert canvas != TILED
    with pytest.raises(ImageTooManyPixelsError, match="12000 x 12000"):
        decode_image(canvas, OWN_LIMITS)
    # Without tiles it is the codec that compares.
    with pytest.raises(ImageNotDecodableError, match="size signaled"):
        decode_image(patched(FILES["heif"], b"ispe", 4, ">II", 12_000, 12_000), OWN_LIMITS)


def test_a_heif_of_more_pixels_than_it_announces_is_refused() -> None:
    data = heif(np.zeros((4000, 4000, 3), np.uint8), quality=10)
    with pytest.raises(ImageNotDecodableError, match="limit exceeded"):
        decode_image(patched(data, b"ispe", 4, ">II", 100, 100), OWN_LIMITS)


@pytest.mark.parametrize("part", [0.4, 0.7, 0.95])
def test_a_heif_without_its_last_tiles_is_not_a_picture_that_is_partly_black(part: float) -> None:
    end = int(part * len(TILED))
    for data in (TILED[:end], TILED[:end] + bytes(len(TILED) - end)):
        with pytest.raises(ImageTruncatedError):
            decode_image(data, OWN_LIMITS)


def test_a_heif_whose_picture_is_damaged_does_not_show_another() -> None:
    pictures = pillow_heif.HeifFile()
    for grey in (0, 255):
        pictures.add_from_pillow(Image.new("RGB", (64, 48), (grey, grey, grey)))
    buffer = io.BytesIO()
    pictures.save(buffer, primary_index=0)
    data = buffer.getvalue()
    assert difference(data, np.zeros_like(PLAIN)) < 5.0
    # The codec's parameters of the first one, which is the picture.
    with pytest.raises(ImageNotDecodableError):
        decode_image(data.replace(b"hvcC", b"hvcX", 1), OWN_LIMITS)


def test_heif_is_for_ones_own_files() -> None:
    with pytest.raises(ImageFormatUnsupportedError, match=r"^HEIF is not accepted; convert .* JPEG"):
        decode_image(FILES["heif"])


def test_a_turned_heif_is_turned_once() -> None:
    picture = Image.fromarray(PLAIN)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.info["exif"] = exif.tobytes()
    data = encode(picture, "HEIF", quality=95)
    assert b"irot" in data
    assert difference(data, np.rot90(PLAIN, -1)) < 5.0


def test_transparency_in_a_heif_shows_the_page() -> None:
    alpha = np.zeros((HEIGHT, WIDTH, 1), np.uint8)
    data = heif(np.concatenate([PLAIN, alpha], axis=-1), quality=95)
    assert difference(data, np.full_like(PLAIN, 255)) < 5.0


def test_ten_bit_heif_is_read_as_eight() -> None:
    samples = PLAIN.astype(np.uint16) * 257
    buffer = io.BytesIO()
    pillow_heif.encode("RGB;16", (WIDTH, HEIGHT), samples.tobytes(), buffer, quality=95)
    assert b"hvc1" in buffer.getvalue()
    assert difference(buffer.getvalue()) < 5.0


def test_a_png_that_ends_after_its_header_is_refused_by_its_size() -> None:
    header = struct.pack(">I4sIIBBBBB", 13, b"IHDR", 20_000, 20_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", zlib.crc32(header[4:]))
    with pytest.raises(ImageTooManyPixelsError, match="20000 x 20000"):
        decode_image(data)


def test_a_format_taken_off_the_list_is_refused_by_name() -> None:
    with pytest.raises(ImageFormatUnsupportedError, match=r"TIFF is not accepted.*JPEG, PNG"):
        decode_image(FILES["tiff"], ImageLimits(formats=("JPEG", "PNG")))


def test_the_byte_limit_is_inclusive() -> None:
    data = FILES["jpeg"]
    decode_image(data, ImageLimits(max_bytes=len(data)))
    with pytest.raises(ImageTooLargeError, match=str(len(data))):
        decode_image(data, ImageLimits(max_bytes=len(data) - 1))


def test_the_pixel_and_side_limits_are_inclusive() -> None:
    decode_image(FILES["png"], ImageLimits(max_pixels=HEIGHT * WIDTH, min_side_px=HEIGHT))
    with pytest.raises(ImageTooManyPixelsError, match="64 x 48"):
        decode_image(FILES["png"], ImageLimits(max_pixels=HEIGHT * WIDTH - 1))
    with pytest.raises(ImageTooSmallError, match="64 x 48"):
        decode_image(FILES["png"], ImageLimits(min_side_px=HEIGHT + 1))


def test_servers_and_callers_share_one_default_limit_of_pixels() -> None:
    with pytest.raises(ImageTooManyPixelsError, match="the limit is 50000000"):
        decode_image(announce("png", 8_000, 6_251))
    assert ServerSettings().max_image_pixels == ImageLimits().max_pixels


def test_limits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="PCX"):
        ImageLimits(formats=("JPEG", "PCX"))
    with pytest.raises(ValueError, match="at least 1"):
        ImageLimits(max_bytes=0)


def announce(name: str, width: int, height: int) -> bytes:
    """Returns a small file of the format whose header announces another size."""
    data = bytearray(FILES[name])
    if name == "jpeg":
        frame = data.index(b"\xff\xc0")
        struct.pack_into(">HH", data, frame + 5, height, width)
    elif name == "png":
        struct.pack_into(">II", data, 16, width, height)
        struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    elif name == "gif":
        struct.pack_into("<HH", data, 6, width, height)
    elif name == "bmp":
        struct.pack_into("<ii", data, 18, width, height)
    elif name == "tiff":
        (directory,) = struct.unpack_from("<I", data, 4)
        for entry in range(struct.unpack_from("<H", data, directory)[0]):
            offset = directory + 2 + 12 * entry
            tag = struct.unpack_from("<H", data, offset)[0]
            if tag in {256, 257}:
                struct.pack_into("<HHII", data, offset, tag, 4, 1, width if tag == 256 else height)
    elif name == "lossy webp":
        struct.pack_into("<HH", data, 26, width, height)
    elif name == "lossless webp":
        struct.pack_into("<I", data, 21, (width - 1) | (height - 1) << 14)
    return bytes(data)


@pytest.mark.parametrize("name", ["jpeg", "png", "gif", "bmp", "tiff"])
def test_a_header_of_400_megapixels_is_refused_before_decoding(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageTooManyPixelsError, match="20000 x 20000 = 400000000 pixels"):
            decode_image(announce(name, 20_000, 20_000))


@pytest.mark.parametrize("name", ["lossy webp", "lossless webp"])
def test_a_header_of_the_largest_webp_is_refused_before_decoding(name: str) -> None:
    with pytest.raises(ImageTooManyPixelsError, match="16383 x 16383"):
        decode_image(announce(name, 16_383, 16_383))


def test_an_extended_webp_header_is_refused_before_decoding() -> None:
    side = (20_000 - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<II", 10, 0) + side + side
    with pytest.raises(ImageTooManyPixelsError, match="20000 x 20000"):
        decode_image(b"RIFF" + struct.pack("<I", len(body)) + body)


@pytest.mark.parametrize("name", ["jpeg", "png", "gif", "bmp"])
def test_pillows_own_pixel_limit_is_not_in_force(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(FILES[name], OWN_LIMITS).size == (WIDTH, HEIGHT)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_refused_or_complete(name: str) -> None:
    data = FILES[name]
    whole = pixels(data)
    ends = range(16, len(data), max(1, len(data) // 400))
    refused = 0
    for end in ends:
        try:
            found = pixels(data[:end])
        except ImageTruncatedError:
            refused += 1
        else:
            assert np.array_equal(found, whole), f"cut at {end} of {len(data)}: part of the picture was made up"
    assert refused > 0.8 * len(ends)


def test_cmyk_jpeg_decodes_to_the_plain_picture() -> None:
    data = encode(Image.fromarray(PLAIN).convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert difference(data) < 3.0


def test_cmyk_jpeg_is_stored_inverted_as_adobe_does() -> None:
    data = encode(Image.new("CMYK", (16, 16), (0, 0, 0, 255)), "JPEG")
    assert b"Adobe" in data
    assert pixels(data).max() < 10


def test_cmyk_tiff_decodes_to_the_plain_picture() -> None:
    assert difference(encode(Image.fromarray(PLAIN).convert("CMYK"), "TIFF")) < 1.0


@pytest.mark.parametrize("bits", ["spread", "low byte differs"])
def test_sixteen_bit_grey_is_scaled_not_clipped(bits: str) -> None:
    wide = GREY.astype(np.uint16) * 257 + (0 if bits == "spread" else 100)
    expected = as_grey(np.round(wide / 257.0).astype(np.uint8))
    assert difference(sixteen_bit_png(wide, 0), expected) == 0.0
    for order in "<>":
        assert difference(sixteen_bit_tiff(wide, order, 1), expected) == 0.0
    assert difference(sixteen_bit_tiff(65535 - wide, "<", 0), expected) == 0.0


def test_sixteen_bit_white_is_white() -> None:
    white = np.full((16, 16), 65535, np.uint16)
    assert pixels(sixteen_bit_png(white, 0)).min() == 255


def test_sixteen_bit_colour_decodes_to_the_plain_picture() -> None:
    wide = PLAIN.astype(np.uint16) * 257
    assert difference(sixteen_bit_png(wide, 2)) == 0.0
    for order in "<>":
        assert difference(sixteen_bit_tiff(wide, order, 2)) == 0.0


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_thirty_two_bit_samples_are_refused_with_the_reason(dtype: type) -> None:
    with pytest.raises(ImageFormatUnsupportedError, match="white is not defined"):
        decode_image(encode(Image.fromarray(GREY.astype(dtype)), "TIFF"))


def test_grey_and_bilevel_pictures() -> None:
    assert difference(encode(Image.fromarray(GREY), "JPEG", quality=95), as_grey(GREY)) < 1.0
    bilevel = np.where(GREY > 100, 255, 0).astype(np.uint8)
    for file_format in ("PNG", "TIFF", "BMP", "GIF"):
        assert difference(encode(Image.fromarray(bilevel).convert("1"), file_format), as_grey(bilevel)) == 0.0


ALPHA = np.where(COLUMNS < 20, 0, np.where(COLUMNS < 40, 128, 255)).astype(np.uint8)
COMPOSITE = np.round((PLAIN * (ALPHA[..., None] / 255.0)) + np.array(BACKGROUND_RGB) * (1 - ALPHA[..., None] / 255.0))


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_composited_on_the_background(file_format: str) -> None:
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    data = encode(Image.fromarray(np.dstack([PLAIN, ALPHA])), file_format, **options)
    assert difference(data, COMPOSITE) < 0.6


def test_grey_with_alpha_is_composited_on_the_background() -> None:
    data = encode(Image.fromarray(np.dstack([GREY, ALPHA])), "PNG")
    weight = ALPHA / 255.0
    assert difference(data, as_grey(np.round(GREY * weight + 255 * (1 - weight)))) < 0.6


def palette_picture() -> tuple[Image.Image, NDArray[np.uint8]]:
    picture = Image.fromarray(PLAIN).quantize(16)
    return picture, np.asarray(picture)


def test_palette_with_alpha_is_composited_on_the_background() -> None:
    picture, indices = palette_picture()
    alphas = bytes([0, 128] + [255] * 14)
    weight = (np.frombuffer(alphas, np.uint8)[indices] / 255.0)[..., None]
    expected = np.round(np.asarray(picture.convert("RGB")) * weight + 255 * (1 - weight))
    assert difference(encode(picture, "PNG", transparency=alphas), expected) < 0.6


def test_one_transparent_colour_becomes_the_background() -> None:
    picture, indices = palette_picture()
    expected = np.asarray(picture.convert("RGB")).copy()
    expected[indices == 3] = BACKGROUND_RGB
    assert (indices == 3).any()
    for file_format in ("GIF", "PNG"):
        assert difference(encode(picture, file_format, transparency=3), expected) == 0.0
    keyed = np.asarray(Image.fromarray(PLAIN)).copy()
    keyed[5:9, 5:9] = (1, 2, 3)
    expected = keyed.copy()
    expected[5:9, 5:9] = BACKGROUND_RGB
    assert difference(encode(Image.fromarray(keyed), "PNG", transparency=(1, 2, 3)), expected) == 0.0


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_yields_its_first_frame(file_format: str) -> None:
    picture, _ = palette_picture()
    first = picture.convert("RGB")
    others = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("magenta", "black")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(first, file_format, save_all=True, append_images=others, **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    assert difference(data, np.asarray(first)) == 0.0


def test_a_multi_picture_jpeg_yields_its_first_picture() -> None:
    other = Image.new("RGB", (WIDTH, HEIGHT), (250, 0, 250))
    data = encode(Image.fromarray(PLAIN), "MPO", quality=95, save_all=True, append_images=[other])
    assert difference(data) < 2.0


STORED: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    # The table of EXIF 2.32, 4.6.5.1.3: which side of the scene the stored row 0 and column 0 show.
    1: lambda scene: scene,  # top, left
    2: lambda scene: scene[:, ::-1],  # top, right
    3: lambda scene: scene[::-1, ::-1],  # bottom, right
    4: lambda scene: scene[::-1],  # bottom, left
    5: lambda scene: scene.transpose(1, 0, 2),  # left, top
    6: lambda scene: scene[:, ::-1].transpose(1, 0, 2),  # right, top
    7: lambda scene: scene[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
    8: lambda scene: scene[::-1].transpose(1, 0, 2),  # left, bottom
}


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_exif_orientation_is_turned_upright(orientation: int, file_format: str) -> None:
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](PLAIN)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, object] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(file_format, {})
    data = encode(stored, file_format, exif=exif, **options)
    assert difference(data) < (2.0 if file_format == "JPEG" else 1e-9)
    assert not decode_image(data, OWN_LIMITS).getexif()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("block", [b"Exif\x00\x00garbage", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"Exif\x00\x00"])
def test_broken_metadata_leaves_the_picture_upright(block: bytes) -> None:
    assert difference(encode(Image.fromarray(PLAIN), "JPEG", quality=95, exif=block)) < 2.0


def test_an_embedded_colour_profile_is_ignored() -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    assert difference(encode(Image.fromarray(PLAIN), "PNG", icc_profile=profile)) == 0.0


def test_draft_keeps_both_sides_at_twice_the_target() -> None:
    rows, columns = np.mgrid[:400, :1000]
    smooth = Image.fromarray(np.stack([columns // 5, rows // 2, (rows + columns) // 8], -1).astype(np.uint8))
    data = encode(smooth, "JPEG", quality=95)
    full = decode_image(data)
    assert full.size == (1000, 400)
    for side, expected in [
        (25, (125, 50)),
        (26, (250, 100)),
        (100, (500, 200)),
        (101, (1000, 400)),
        (900, (1000, 400)),
    ]:
        draft = decode_image(data, draft_side=side)
        assert draft.size == expected
        small = np.asarray(full.resize((50, 50), Image.Resampling.BOX)).astype(int)
        assert np.abs(np.asarray(draft.resize((50, 50), Image.Resampling.BOX)).astype(int) - small).mean() < 1.0


def test_draft_comes_before_the_orientation_and_after_the_limits() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.new("RGB", (400, 200)), "JPEG", exif=exif)
    assert decode_image(data, draft_side=25).size == (50, 100)
    with pytest.raises(ImageTooManyPixelsError):
        decode_image(data, ImageLimits(max_pixels=50_000), draft_side=25)


def test_normalise_image_agrees_with_decode_image() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray(np.dstack([PLAIN, ALPHA])), "PNG", exif=exif)
    opened = Image.open(io.BytesIO(data))
    assert np.array_equal(np.asarray(normalise_image(opened)), pixels(data))
    assert opened.mode == "RGBA"


def test_normalise_image_refuses_what_decode_image_refuses() -> None:
    with pytest.raises(ImageTruncatedError):
        normalise_image(Image.open(io.BytesIO(FILES["jpeg"][:-300])))
    with pytest.raises(ImageTooSmallError):
        normalise_image(Image.new("RGB", (1, 1)))
    with pytest.raises(ImageTooManyPixelsError):
        normalise_image(Image.new("RGB", (20, 20)), ImageLimits(max_pixels=399))


def test_read_image_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(FILES["jpeg"])
    assert read_image_bytes(path) == FILES["jpeg"]
    with pytest.raises(ImageTooLargeError, match=str(len(FILES["jpeg"]))):
        read_image_bytes(path, ImageLimits(max_bytes=100))
    with pytest.raises(InputNotReadableError, match=r"missing\.jpg"):
        read_image_bytes(tmp_path / "missing.jpg")
    with pytest.raises(InputNotReadableError):
        read_image_bytes(tmp_path)
    with pytest.raises(InputNotReadableError):
        read_image_bytes("a\x00b.jpg")


def test_decoding_is_the_same_from_many_threads() -> None:
    expected = {name: pixels(data) for name, data in FILES.items()}
    with ThreadPoolExecutor(8) as pool:
        for name, found in pool.map(lambda name: (name, pixels(FILES[name])), list(FILES) * 20):
            assert np.array_equal(found, expected[name])


MAGIC = [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\x00", b"MM\x00*", b"RIFF\0\0\0\0WEBPVP8X"]


def decodes_or_raises_an_image_error(data: bytes) -> None:
    try:
        picture = decode_image(data, ImageLimits(max_pixels=1_000_000, formats=OWN_FORMATS))
    except ImageError:
        return
    else:
        assert picture.mode == "RGB"
        assert picture.size[0] * picture.size[1] <= 1_000_000


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=300, deadline=None)
@given(prefix=st.sampled_from(MAGIC), tail=st.binary(max_size=600))
def test_random_bytes_never_raise_anything_else(prefix: bytes, tail: bytes) -> None:
    decodes_or_raises_an_image_error(prefix + tail)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=600, deadline=None)
@given(
    name=st.sampled_from(sorted(FILES)),
    changes=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255), st.booleans()), max_size=8),
    end=st.none() | st.integers(0, 2**20),
)
def test_mutated_files_never_raise_anything_else(
    name: str, changes: list[tuple[int, int, bool]], end: int | None
) -> None:
    data = bytearray(FILES[name])
    for position, value, in_header in changes:
        data[position % (min(len(data), 160) if in_header else len(data))] = value
    decodes_or_raises_an_image_error(bytes(data if end is None else data[: end % len(data)]))


def test_every_listed_format_is_exercised_here() -> None:
    covered = {Image.open(io.BytesIO(data)).format for data in FILES.values()}
    assert covered == set(OWN_FORMATS)
