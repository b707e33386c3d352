"""Where a picture says that it was taken: in its EXIF, in the XMP inside it, or in a sidecar.

A position counts only if it is one: (0, 0), which devices write when they know nothing, values that are no numbers or
outside the globe, and values without their hemisphere count as absent. EXIF is read from JPEG, PNG (eXIf), WebP, HEIF,
AVIF, TIFF and raw files built like TIFF; XMP from the same, without JPEG's extended packets, whose parts hold what is
too large for the first one. No pixel is decoded, and no more than `containers.MAX_METADATA_BYTES` of metadata is ever
read.
"""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from geosurge.archive.metadata import heif, xmp
from geosurge.archive.metadata.containers import (
    MAX_METADATA_BYTES,
    ContainerError,
    chunks,
    container_format,
    xmp_packet,
)
from geosurge.archive.metadata.exif import exif_stream, read_gps
from geosurge.archive.metadata.guess import method_run_id
from geosurge.archive.metadata.tiff import TiffError, open_tiff
from geosurge.archive.rows import Position
from geosurge.errors import InputNotReadableError, SidecarInvalidError

_SUFFIXES: Final = (".xmp", ".XMP", ".Xmp")
_TIFF_XMP: Final = 700


@dataclass(frozen=True)
class Claim:
    """A position, and who says so.

    Attributes:
        position: The position.
        run_id: Run of this engine that wrote it as a guess; empty for anybody else's, which may be the truth.
    """

    position: Position
    run_id: str


def read_claims(image: BinaryIO, sidecars: Sequence[Path]) -> Iterator[Claim]:
    """Every position that a picture has: in its EXIF first, then in the XMP inside it, then in the sidecars.

    A damaged picture may have none.

    Args:
        image: The picture, seekable.
        sidecars: As of `sidecar_paths`.

    Raises:
        SidecarInvalidError: A sidecar is not XMP, or larger than `containers.MAX_METADATA_BYTES`: whether it holds a
            position cannot be known.
        InputNotReadableError: The system cannot read a sidecar.
        OSError: The system cannot read the picture.
    """
    yield from exif_claims(image)
    for packet in _embedded_packets(image):
        try:
            yield from xmp_claims(packet, "xmp")
        except xmp.XmpError:
            continue
    for path in sidecars:
        packet = read_sidecar(path)
        try:
            yield from xmp_claims(packet, "sidecar")
        except xmp.XmpError as error:
            raise SidecarInvalidError(f"sidecar {path.name!r} cannot be read: {error}; repair or remove it") from error


def exif_claims(image: BinaryIO) -> Iterator[Claim]:
    """The position in a picture's EXIF, if it has one."""
    try:
        stream = exif_stream(image)
    except ContainerError:
        return
    gps = None if stream is None else read_gps(stream)
    if gps is not None and gps.coordinate is not None:
        yield from _claim(gps.coordinate, "exif", method_run_id(gps.method))


def xmp_claims(packet: bytes, source: str) -> Iterator[Claim]:
    """The position in an XMP packet, if it has one.

    Raises:
        xmp.XmpError: It is no XMP packet.
    """
    found = xmp.properties(xmp.parse_xmp(packet))
    latitude = xmp.read_coordinate(found.get(xmp.LATITUDE, ""), "NS")
    longitude = xmp.read_coordinate(found.get(xmp.LONGITUDE, ""), "EW")
    if latitude is not None and longitude is not None:
        yield from _claim((latitude, longitude), source, method_run_id(found.get(xmp.METHOD, "")))


def sidecar_paths(picture: Path) -> list[Path]:
    """The sidecars of a picture that exist: ``photo.jpg.xmp`` before ``photo.xmp``, for a picture ``photo.jpg``.

    Endings are found as ``.xmp``, ``.XMP`` and ``.Xmp``: looking for a few names costs the same in any folder, which
    listing does not. A link counts even if what it leads to is not there: somebody has a sidecar, which `read_sidecar`
    then cannot read.
    """
    found: dict[tuple[int, int], Path] = {}
    for stem in dict.fromkeys((picture.name, picture.stem)):
        for suffix in _SUFFIXES:
            path = picture.with_name(stem + suffix)
            try:
                status = path.lstat()
            except OSError:
                continue
            if stat.S_ISLNK(status.st_mode):
                with contextlib.suppress(OSError):
                    status = path.stat()
            if stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
                # Where case does not matter, the three names are one file.
                found.setdefault((status.st_dev, status.st_ino), path)
    return list(found.values())


def read_sidecar(path: Path) -> bytes:
    """The bytes of a sidecar.

    Raises:
        SidecarInvalidError: It is too large to be one.
        InputNotReadableError: The system cannot read it.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_METADATA_BYTES + 1)
    except OSError as error:
        advice = "; it is a link: mend it or remove it" if path.is_symlink() else ""
        raise InputNotReadableError(f"sidecar {path.name!r} cannot be read: {error.strerror}{advice}") from error
    if len(data) > MAX_METADATA_BYTES:
        raise SidecarInvalidError(
            f"sidecar {path.name!r} is larger than {MAX_METADATA_BYTES // 2**20} MiB, which no sidecar is; remove it"
        )
    return data


def _claim(coordinate: tuple[float, float], source: str, run_id: str) -> Iterator[Claim]:
    latitude, longitude = coordinate
    # Comparisons with NaN are false: what is no number is not in range.
    if -90 <= latitude <= 90 and -180 <= longitude <= 180 and coordinate != (0.0, 0.0):
        yield Claim(Position(latitude, longitude, source), run_id)


def _embedded_packets(image: BinaryIO) -> Iterator[bytes]:
    file_format = container_format(image)
    if file_format == "TIFF":
        yield from _tiff_packet(image)
    elif file_format == "HEIF":
        with contextlib.suppress(ContainerError):
            yield from heif.xmp_packets(image)
    elif file_format:
        try:
            for chunk in chunks(image, file_format):
                if packet := xmp_packet(image, file_format, chunk):
                    yield packet
        except ContainerError:
            return


def _tiff_packet(image: BinaryIO) -> Iterator[bytes]:
    try:
        tiff = open_tiff(image)
        entry = tiff.read_directory(tiff.first_offset).find(_TIFF_XMP)
        if entry is not None:
            yield tiff.read_value(entry, MAX_METADATA_BYTES)
    except TiffError:
        return
