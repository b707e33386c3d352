"""How large a request may be, decided before it is parsed.

The transport has to let the largest image through, and that many bytes of anything else take seconds to parse: forty
megabytes of empty strings become twenty million of them. Only an image may therefore be large. What a request holds
besides it is measured without being parsed: its top-level fields are skipped from tag to tag.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Final

from geosurge.errors import MessageTooLargeError
from geosurge.v1 import geolocation_pb2

MAX_BYTES_BESIDES_IMAGE: Final = 1 << 20
"""Largest message, less the image in it: four times the longest embedding."""

MAX_REQUESTS: Final = 4096
"""Requests that one message of a stream may have: small ones cost much more memory parsed than as bytes."""

_MAX_FIELDS: Final = 32
"""Fields of a message that are looked at for images: a request has four, a message of a stream one for each request."""

# A tag is the number of a field and, in its three last bits, how its content is written.
_VARINT, _COUNTED_BYTES = 0, 2
_FIXED_SIZES: Final = {1: 8, 5: 4}
_IMAGE: Final = geolocation_pb2.LocateRequest.IMAGE_FIELD_NUMBER << 3 | _COUNTED_BYTES
_REQUEST: Final = geolocation_pb2.LocateStreamRequest.REQUESTS_FIELD_NUMBER << 3 | _COUNTED_BYTES
_STREAM: Final = "/geosurge.v1.GeolocationService/LocateStream"
_TAGS_TO_IMAGE: Final = {"/geosurge.v1.GeolocationService/Locate": (_IMAGE,), _STREAM: (_REQUEST, _IMAGE)}


def check_message_size(method: str, message: bytes) -> None:
    """Refuses a request that is too large to be parsed.

    Args:
        method: Full name of the method, ``/package.Service/Method``.
        message: The request as it came.

    Raises:
        MessageTooLargeError: It has more than `MAX_BYTES_BESIDES_IMAGE`, not counting the image, or more than
            `MAX_REQUESTS`.
    """
    # A request has two bytes at least.
    if method == _STREAM and len(message) > 2 * MAX_REQUESTS:
        requests = sum(tag == _REQUEST for tag, _, _ in islice(_fields(message, 0, len(message)), MAX_REQUESTS + 1))
        if requests > MAX_REQUESTS:
            raise MessageTooLargeError(f"the message has more than {MAX_REQUESTS} requests; send them in several")
    if len(message) <= MAX_BYTES_BESIDES_IMAGE:
        return
    tags = _TAGS_TO_IMAGE.get(method)
    image_size = 0 if tags is None else _content_size(message, 0, len(message), tags)
    if len(message) - image_size > MAX_BYTES_BESIDES_IMAGE:
        raise MessageTooLargeError(
            f"the request has {len(message) - image_size} bytes{'' if tags is None else ' besides its image'}, at most "
            f"{MAX_BYTES_BESIDES_IMAGE} are allowed"
        )


def _content_size(message: bytes, start: int, end: int, tags: tuple[int, ...]) -> int:
    """Bytes of the fields that a path of tags leads to; of what cannot be told apart, none."""
    if not tags:
        return end - start
    fields = islice(_fields(message, start, end), _MAX_FIELDS)
    return sum(_content_size(message, begin, stop, tags[1:]) for tag, begin, stop in fields if tag == tags[0])


def _fields(message: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Tag, start and end of the content of each field, up to the first thing that is none; groups are not known."""
    while start < end:
        try:
            tag, start = _varint(message, start)
            kind = tag & 7
            if kind == _COUNTED_BYTES:
                size, start = _varint(message, start)
                stop = start + size
            elif kind == _VARINT:
                _, stop = _varint(message, start)
            elif kind in _FIXED_SIZES:
                stop = start + _FIXED_SIZES[kind]
            else:
                return
        except ValueError:
            return
        stop = min(stop, end)
        yield tag, start, stop
        start = stop


def _varint(message: bytes, start: int) -> tuple[int, int]:
    """A number and where it ends. As in parsers it has ten bytes at most, and what is beyond 64 bits is lost."""
    value = 0
    for place, byte in enumerate(message[start : start + 10]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value % (1 << 64), start + place + 1
    raise ValueError
