"""EXIF and XMP of HEIF and AVIF pictures: items of the file (ISO/IEC 23008-12, A.2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, Final

from geosurge.archive.metadata.containers import EXIF_PREFIX, MAX_METADATA_BYTES, ContainerError
from geosurge.heif import HeifError, Items, read_items

_TIFF_STARTS: Final = (b"II*\0", b"MM\0*")
_XMP_TYPE: Final = b"application/rdf+xml"


def exif_structure(stream: BinaryIO) -> bytes | None:
    """The TIFF structure of a picture's EXIF; ``None`` if there is none.

    Raises:
        ContainerError: The file is damaged.
    """
    items = _items(stream)
    for content in _contents(items, (number for number, item in items.items.items() if item.kind == b"Exif")):
        # Where the structure starts is told by the first four bytes; not every writer puts them there.
        for start in (4 + int.from_bytes(content[:4], "big"), 0, 4):
            structure = content[start:].removeprefix(EXIF_PREFIX)
            if structure.startswith(_TIFF_STARTS):
                return structure
    return None


def xmp_packets(stream: BinaryIO) -> Iterator[bytes]:
    """The XMP packets of a picture.

    Raises:
        ContainerError: The file is damaged.
    """
    items = _items(stream)
    yield from _contents(items, (number for number, item in items.items.items() if item.content_type == _XMP_TYPE))


def _items(stream: BinaryIO) -> Items:
    try:
        return read_items(stream)
    except HeifError as error:
        raise ContainerError(str(error)) from error


def _contents(items: Items, numbers: Iterator[int]) -> Iterator[bytes]:
    """Contents of items, as long as all together are not too large; those that are not there are passed over."""
    left = MAX_METADATA_BYTES
    for number in numbers:
        try:
            content = items.content(number, left)
        except HeifError:
            continue
        left -= len(content)
        yield content
