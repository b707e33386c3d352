from __future__ import annotations

from geosurge.client.streams import split_requests
from geosurge.server.message_size import check_message_size
from geosurge.v1 import geolocation_pb2


def test_small_requests_share_a_message_and_a_large_image_has_one_for_itself() -> None:
    sizes = [1500] * 40 + [2_000_000] + [1500] * 50 + [100_000, 100_000]
    requests = [geolocation_pb2.LocateRequest(image=bytes(size)) for size in sizes]
    messages = list(split_requests(requests))
    assert [request for message in messages for request in message.requests] == requests
    assert [len(message.requests) for message in messages] == [40, 1, 43, 7, 1, 1]
    for message in messages:
        check_message_size("/geosurge.v1.GeolocationService/LocateStream", message.SerializeToString())
