"""Bytes to pixels, safely.

`decode_image` turns one encoded image into upright 8-bit RGB, or raises the `geosurge.errors.ImageError` that says why
not. Every limit that can be is checked before a pixel is decoded, and whatever Pillow raises ends as an `ImageError`: a
bad image costs one item and never a worker.

What is done to the pixels, in this order:

1. The first frame of an animation or a multi-page file is taken.
2. 16-bit grey is scaled to 8 bits (65535 becomes 255); Pillow keeps the high byte of 16-bit colour. Samples of 32 bits,
   integer or float, are refused: nothing in such a file says which value is white.
3. Transparency is composited on `BACKGROUND_RGB`.
4. CMYK, palette, grey and bilevel pictures become RGB. Embedded colour profiles are ignored: every picture is read as
   sRGB, and CMYK is converted by the naive formula. Four-component JPEG is read as inverted, the way Adobe writes it.
5. The EXIF (or XMP) orientation is applied, of HEIF its own instead; unreadable metadata counts as upright.

Nothing here touches Pillow's global state (``MAX_IMAGE_PIXELS``, ``LOAD_TRUNCATED_IMAGES``): every function is
thread-safe.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from geosurge.errors import (
    ImageEmptyError,
    ImageError,
    ImageFormatUnsupportedError,
    ImageNotDecodableError,
    ImagePlugInMissingError,
    ImageTooLargeError,
    ImageTooManyPixelsError,
    ImageTooSmallError,
    ImageTruncatedError,
    InputNotReadableError,
)
from geosurge.heif import HeifError, read_items
from geosurge.image_formats import announced_size, ends_early, recognise_format

IMAGE_FORMATS: Final = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP")
"""Formats that are decoded by default, by Pillow's names."""

OWN_FORMATS: Final = (*IMAGE_FORMATS, "HEIF")
"""Formats that can be decoded: also HEIF (.heic), where the extra ``heif`` is installed.

Its codec can be made to take minutes and gigabytes by a file of kilobytes, whatever is looked at before. It is for
one's own files, and for processes that may end without harm to others: never for a server.
"""

BACKGROUND_RGB: Final = (255, 255, 255)
"""Colour behind transparent pixels: white, the page that most pictures with transparency were made for."""


@dataclass(frozen=True)
class ImageLimits:
    """What is accepted as an image.

    Attributes:
        max_bytes: Encoded size at most.
        max_pixels: Width times height at most, as the header announces them. While it is decoded, turned upright and
            resized, a picture takes 8 to 14 bytes a pixel: up to 700 MB for 50 million. For TIFF and WebP, Pillow's own
            limit (179 million unless the process changed it) holds as well.
        min_side_px: Shorter side at least. Eight pixels are one block of a JPEG: anything smaller (tracking pixels,
            spacers, broken thumbnails) holds nothing that could be located and would still get a confident answer.
        formats: Accepted formats, out of `OWN_FORMATS`.
    """

    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    min_side_px: int = 8
    formats: tuple[str, ...] = IMAGE_FORMATS

    def __post_init__(self) -> None:
        if unknown := set(self.formats) - set(OWN_FORMATS):
            raise ValueError(f"unknown image formats {sorted(unknown)}; known are {', '.join(OWN_FORMATS)}")
        if min(self.max_bytes, self.max_pixels, self.min_side_px) < 1:
            raise ValueError(f"image limits must be at least 1, got {self}")


DEFAULT_LIMITS: Final = ImageLimits()

OWN_LIMITS: Final = ImageLimits(formats=OWN_FORMATS)
"""What is accepted of one's own files."""


def _open_heif(stream: io.BytesIO) -> ImageFile.ImageFile:
    from pillow_heif import HeifImageFile  # noqa: PLC0415 - an extra, and megabytes of codec that few runs need

    opener: Callable[[io.BytesIO], ImageFile.ImageFile] = HeifImageFile
    image = opener(stream)
    if not image.info["primary"]:
        # Another one of the file would be shown instead.
        raise SyntaxError("its primary picture is damaged")
    return image


# Plugin classes instead of Image.open: opening through them skips Pillow's decompression-bomb check, which warns or
# raises by a process-wide limit. The JPEG class reads the first picture of a multi-picture (MPO) file, as wanted.
_PLUGINS: Final[dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
    "TIFF": TiffImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
    "HEIF": _open_heif,
}

_TRANSPOSE_BY_ORIENTATION: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_EXIF_ORIENTATION: Final = 0x0112
_TIFF_PHOTOMETRIC: Final = 262
_TIFF_WHITE_IS_ZERO: Final = 0


def decode_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS, draft_side: int | None = None) -> Image.Image:
    """Decodes one encoded image.

    Args:
        data: The encoded image.
        limits: What is accepted.
        draft_side: Side, in pixels, that the picture will be resized to. JPEG is then decoded at an eighth, a quarter
            or half of its size, as long as both sides stay at least twice as long as this: several times faster, and
            the resized picture is nearly the same. It changes pixels, so it belongs to what identifies a preprocessing.
            Other formats ignore it.

    Returns:
        The picture in mode RGB, upright, without metadata.

    Raises:
        ImageEmptyError: There are no bytes.
        ImageTooLargeError: More bytes than ``limits.max_bytes``.
        ImageNotDecodableError: The bytes are not an image, or are a damaged one.
        ImageTruncatedError: The file ends before its pixels do.
        ImageFormatUnsupportedError: An image, but not of an accepted format or kind of sample.
        ImagePlugInMissingError: HEIF, and its plug-in is not installed.
        ImageTooManyPixelsError: The header announces more pixels than ``limits.max_pixels``.
        ImageTooSmallError: A side is shorter than ``limits.min_side_px``.
    """
    if not data:
        raise ImageEmptyError("the image has 0 bytes; send the encoded file")
    _check_byte_count(len(data), limits)
    file_format = _accepted_format(data, limits)
    if file_format == "HEIF":
        _check_heif(data, limits)
    if announced := announced_size(data, file_format):
        _check_pixel_count(announced, limits)
    try:
        with _PLUGINS[file_format](io.BytesIO(data)) as image:
            _check_pixel_count(image.size, limits)
            _check_sides(image.size, limits)
            if draft_side is not None and file_format == "JPEG":
                image.draft(None, (2 * draft_side, 2 * draft_side))
            image.load()
            return _upright_rgb(image)
    except ImageError:
        raise
    except ImportError as error:
        raise ImagePlugInMissingError(
            f"{file_format} needs a plug-in where it is decoded ({error}); pip install 'geosurge[heif]', or convert "
            f"the image to one of {', '.join(IMAGE_FORMATS)}"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageTooManyPixelsError(f"the {file_format} announces too many pixels: {error}") from error
    except Exception as error:
        # Pillow and its codecs raise OSError, SyntaxError, ValueError, struct.error, zlib.error, MemoryError and more.
        if ends_early(data, file_format) or "truncated" in str(error).lower():
            raise _truncated(data, file_format) from error
        raise ImageNotDecodableError(
            f"the {file_format} is damaged and cannot be decoded ({type(error).__name__}: {error})"
        ) from error


def normalise_image(image: Image.Image, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Brings an opened Pillow image into the form that `decode_image` returns.

    The argument's pixels are loaded but not changed.

    Args:
        image: Any image; its pixels may not have been decoded yet.
        limits: What is accepted; bytes and formats are not checked.

    Returns:
        A new picture in mode RGB, upright, without metadata.

    Raises:
        ImageError: As `decode_image`.
    """
    _check_pixel_count(image.size, limits)
    _check_sides(image.size, limits)
    try:
        image.load()
        return _upright_rgb(image)
    except ImageError:
        raise
    except Exception as error:
        if "truncated" in str(error).lower():
            raise ImageTruncatedError("the image ends before its pixels do; open the whole file") from error
        raise ImageNotDecodableError(f"the image cannot be decoded ({type(error).__name__}: {error})") from error


def read_image_bytes(path: str | os.PathLike[str], limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """Reads an image file, never more of it than one byte over the limit.

    Args:
        path: The file.
        limits: Its ``max_bytes`` is applied.

    Returns:
        The content of the file.

    Raises:
        InputNotReadableError: The file is missing or cannot be read.
        ImageTooLargeError: The file is over the byte limit.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(limits.max_bytes + 1)
            byte_count = len(data) if len(data) <= limits.max_bytes else max(len(data), path.stat().st_size)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise InputNotReadableError(f"cannot read {path}: {reason}") from error
    _check_byte_count(byte_count, limits)
    return data


def _accepted_format(data: bytes, limits: ImageLimits) -> str:
    name = recognise_format(data)
    # Nobody converts to what is read in some places only.
    accepted = ", ".join(each for each in limits.formats if each in IMAGE_FORMATS)
    if name is None:
        raise ImageNotDecodableError(
            f"the {len(data)} bytes are not an image: no known signature; send one of {accepted}"
        )
    if name not in limits.formats:
        raise ImageFormatUnsupportedError(f"{name} is not accepted; convert the image to one of {accepted}")
    return name


def _check_heif(data: bytes, limits: ImageLimits) -> None:
    """Refuses a file that is not all there, of which the codec leaves black what is missing, and a canvas too large."""
    try:
        items = read_items(io.BytesIO(data))
        canvas, is_whole = items.canvas(), items.is_whole()
    except HeifError as error:
        if ends_early(data, "HEIF"):
            raise _truncated(data, "HEIF") from error
        raise ImageNotDecodableError(f"the HEIF is damaged and cannot be decoded ({error})") from error
    if not is_whole:
        raise _truncated(data, "HEIF")
    if canvas is not None:
        _check_pixel_count(canvas, limits)


def _truncated(data: bytes, file_format: str) -> ImageTruncatedError:
    return ImageTruncatedError(
        f"the {file_format} ends before its pixels do ({len(data)} bytes received); send the whole file"
    )


def _check_byte_count(byte_count: int, limits: ImageLimits) -> None:
    if byte_count > limits.max_bytes:
        raise ImageTooLargeError(
            f"the image has {byte_count} bytes, the limit is {limits.max_bytes}; "
            "send a smaller or more compressed picture"
        )


def _check_pixel_count(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise ImageTooManyPixelsError(
            f"the image announces {width} x {height} = {width * height} pixels, the limit is {limits.max_pixels}; "
            "scale it down"
        )


def _check_sides(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if min(width, height) < limits.min_side_px:
        raise ImageTooSmallError(
            f"the image has {width} x {height} pixels, each side must have at least {limits.min_side_px}: "
            "there is nothing in it to locate"
        )


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Returns a new, loaded RGB picture without metadata, turned as the metadata of ``image`` says."""
    transpose = _TRANSPOSE_BY_ORIENTATION.get(_orientation(image))
    picture = _to_rgb(image)
    if transpose is not None:
        picture = picture.transpose(transpose)
    # An orientation left in the metadata would be applied again by the next reader.
    picture.info.clear()
    return picture


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - a picture with broken metadata is still a picture
        return 1
    return orientation if isinstance(orientation, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _sixteen_bit_to_rgb(image)
    if image.mode in {"I", "F", "LAB", "HSV"}:
        raise ImageFormatUnsupportedError(
            f"the image has samples of Pillow mode {image.mode}, for which white is not defined; "
            "convert it to 8-bit or 16-bit grey or RGB"
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        picture = Image.new("RGB", image.size, BACKGROUND_RGB)
        picture.paste(rgba, mask=rgba)
        return picture
    return image.convert("RGB")


def _sixteen_bit_to_rgb(image: Image.Image) -> Image.Image:
    samples = np.asarray(image.convert("I")).astype(np.uint32)
    grey = ((samples * 255 + 32767) // 65535).astype(np.uint8)
    if isinstance(image, TiffImageFile) and image.tag_v2.get(_TIFF_PHOTOMETRIC) == _TIFF_WHITE_IS_ZERO:
        grey = 255 - grey
    return Image.fromarray(grey).convert("RGB")
