from __future__ import annotations

import pytest

from geosurge.errors import MessageTooLargeError
from geosurge.server.message_size import MAX_BYTES_BESIDES_IMAGE, MAX_REQUESTS, check_message_size
from geosurge.v1 import geolocation_pb2 as pb
from geosurge.v1 import index_pb2

LOCATE = "/geosurge.v1.GeolocationService/Locate"
LOCATE_STREAM = "/geosurge.v1.GeolocationService/LocateStream"
ACTIVATE = "/geosurge.v1.IndexService/ActivateVersion"

LARGE = 3 * MAX_BYTES_BESIDES_IMAGE
IMAGE = pb.LocateRequest(image=bytes(LARGE)).SerializeToString()
OPTIONS = pb.LocateRequest(options=pb.LocateOptions(region_tokens=["x"] * 1000, top_k=3)).SerializeToString()
ID = pb.LocateRequest(request_id="ü" * 100).SerializeToString()
# Fields 1000 to 1003, which no request has: a number, 8 bytes, 2 counted bytes, 4 bytes.
UNKNOWN = b"\xc0\x3e\xff\xff\x03" + b"\xc9\x3e12345678" + b"\xd2\x3e\x0212" + b"\xdd\x3e1234"
EMPTY_FIELD = b"\x22\x00"
REGIONS = pb.LocateRequest(options=pb.LocateOptions(region_tokens=[""] * MAX_BYTES_BESIDES_IMAGE)).SerializeToString()
GROUP = b"\x2b" + EMPTY_FIELD * MAX_BYTES_BESIDES_IMAGE + b"\x2c"

SMALL_BESIDES_IMAGE = {
    "an image": IMAGE,
    "two images": IMAGE + IMAGE,
    "an image before the rest": IMAGE + ID + OPTIONS,
    "an image after the rest": ID + OPTIONS + IMAGE,
    "fields of a newer client": UNKNOWN + IMAGE + UNKNOWN,
    "the longest embedding": pb.LocateRequest(embedding=pb.Embedding(values=[1.0] * 65_536)).SerializeToString(),
}
LARGE_BESIDES_IMAGE = {
    "regions": REGIONS,
    "regions and an image": REGIONS + IMAGE,
    "an image and regions": IMAGE + REGIONS,
    "an id": pb.LocateRequest(request_id="x" * LARGE).SerializeToString(),
    "an embedding": pb.LocateRequest(embedding=pb.Embedding(values=[1.0] * LARGE)).SerializeToString(),
    "endless fields": EMPTY_FIELD * LARGE,
    "endless images": b"\x12\x00" * LARGE,
    "a group": GROUP + IMAGE,
    "an image that is cut": REGIONS + IMAGE[:-1],
    "an image longer than the message": REGIONS + b"\x12\xff\xff\xff\x7f",
    # A length of 2**64, which is 0 to parsers.
    "an image whose length is lost": b"\x12" + b"\x80" * 9 + b"\x02" + REGIONS,
    "endless number": b"\xff" * LARGE,
    "zeros": bytes(LARGE),
}


def item(request: bytes) -> bytes:
    """The request as an item of a stream: the empty message's tag, and its length as five bytes."""
    length = bytes(len(request) >> shift & 0x7F | 0x80 for shift in (0, 7, 14, 21)) + bytes([len(request) >> 28])
    return b"\x0a" + length + request


def test_an_item_is_as_a_client_writes_it() -> None:
    assert list(pb.LocateStreamRequest.FromString(item(ID + OPTIONS)).requests) == [
        pb.LocateRequest.FromString(ID + OPTIONS)
    ]


@pytest.mark.parametrize("name", SMALL_BESIDES_IMAGE)
def test_an_image_may_be_large(name: str) -> None:
    request = SMALL_BESIDES_IMAGE[name]
    assert pb.LocateRequest.FromString(request)
    check_message_size(LOCATE, request)
    check_message_size(LOCATE_STREAM, item(request))
    check_message_size(LOCATE_STREAM, UNKNOWN + item(request) + UNKNOWN)


@pytest.mark.parametrize("name", LARGE_BESIDES_IMAGE)
def test_nothing_else_may_be_large(name: str) -> None:
    request = LARGE_BESIDES_IMAGE[name]
    with pytest.raises(MessageTooLargeError, match="besides its image, at most 1048576"):
        check_message_size(LOCATE, request)
    for several in (item(request), item(IMAGE) + item(request), item(request) + item(IMAGE), request):
        with pytest.raises(MessageTooLargeError):
            check_message_size(LOCATE_STREAM, several)


def test_a_message_of_a_stream_may_have_no_more_requests_than_can_be_parsed() -> None:
    check_message_size(LOCATE_STREAM, b"\x0a\x00" * MAX_REQUESTS)
    check_message_size(LOCATE_STREAM, UNKNOWN + item(ID) * MAX_REQUESTS)
    for small in (b"\x0a\x00", item(ID)):
        with pytest.raises(MessageTooLargeError, match="more than 4096 requests"):
            check_message_size(LOCATE_STREAM, small * (MAX_REQUESTS + 1))


def test_only_requests_that_hold_an_image_may_be_large() -> None:
    check_message_size(ACTIVATE, bytes(MAX_BYTES_BESIDES_IMAGE))
    for message in (IMAGE, index_pb2.ActivateVersionRequest(name="x" * LARGE).SerializeToString()):
        with pytest.raises(MessageTooLargeError, match=f"the request has {len(message)} bytes, at most 1048576"):
            check_message_size(ACTIVATE, message)
