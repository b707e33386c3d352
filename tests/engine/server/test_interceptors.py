from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2
from support.servers import embedding, encoded_image

from geosurge.server.app import Server
from geosurge.v1 import geolocation_pb2 as pb
from geosurge.v1 import geolocation_pb2_grpc
from geosurge.wire import status_to_error

Live = tuple[Server, grpc.aio.Channel]

LOCATE = "/geosurge.v1.GeolocationService/Locate"
LOCATE_STREAM = "/geosurge.v1.GeolocationService/LocateStream"


def error_of(failure: grpc.aio.AioRpcError) -> Exception:
    details = dict(failure.trailing_metadata())["grpc-status-details-bin"]
    return status_to_error(status_pb2.Status.FromString(details))


async def test_what_is_no_message_is_refused_as_input(live: Live) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as unary:
        await live[1].unary_unary(LOCATE)(b"\xff\xff\xff")
    call = live[1].stream_stream(LOCATE_STREAM)(iter([b"\xff\xff\xff"]))
    with pytest.raises(grpc.aio.AioRpcError) as stream:
        await call.read()
    for failure in (unary.value, stream.value):
        assert failure.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert error_of(failure).reason == "INPUT_INVALID"  # type: ignore[attr-defined]


async def test_items_before_a_malformed_one_are_answered(live: Live) -> None:
    good = pb.LocateStreamRequest(request=pb.LocateRequest(request_id="a", image=encoded_image(1)))
    call = live[1].stream_stream(LOCATE_STREAM)(iter([good.SerializeToString(), b"\xff"]))
    assert pb.LocateStreamResponse.FromString(await call.read()).response.request_id == "a"
    with pytest.raises(grpc.aio.AioRpcError):
        await call.read()


async def test_an_unexpected_failure_is_internal_and_keeps_its_trace_on_the_server(
    live: Live, caplog: pytest.LogCaptureFixture
) -> None:
    server, channel = live
    del server._versions.active.locator.manifest
    with caplog.at_level(logging.INFO), pytest.raises(grpc.aio.AioRpcError) as caught:
        await geolocation_pb2_grpc.GeolocationServiceStub(channel).GetInfo(pb.GetInfoRequest())
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    wire = caught.value.debug_error_string() + str(caught.value.trailing_metadata())
    assert "Traceback" not in wire
    assert "manifest" not in wire
    error_id = caught.value.details().rsplit(" ", 1)[1]
    assert any(error_id in record.message and record.exc_info for record in caplog.records)
    assert "code=INTERNAL" in caplog.text


async def test_a_call_is_logged_without_what_it_showed_or_where_it_was(
    live: Live, caplog: pytest.LogCaptureFixture
) -> None:
    stub: Any = geolocation_pb2_grpc.GeolocationServiceStub(live[1])
    with caplog.at_level(logging.INFO):
        response = await stub.Locate(pb.LocateRequest(request_id="line\nbreak", image=encoded_image(1)))
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Locate(pb.LocateRequest(request_id="bad", embedding=pb.Embedding(values=[0.25])))

        async def send() -> AsyncIterator[pb.LocateStreamRequest]:
            for image in (encoded_image(1), b"", encoded_image(2)):
                yield pb.LocateStreamRequest(request=pb.LocateRequest(image=image))

        _ = [item async for item in stub.LocateStream(send())]
        await asyncio.sleep(0.05)
    lines = [record.getMessage() for record in caplog.records if record.name == "geosurge.server.interceptors"]
    assert [line.split(" duration_ms")[0] for line in lines] == [
        f"call method={LOCATE} code=OK",
        f"call method={LOCATE} code=INVALID_ARGUMENT",
        f"call method={LOCATE_STREAM} code=OK",
    ]
    assert r"request_id='line\nbreak' index_version=tiny" in lines[0]
    assert "items=3 failed_items=1" in lines[2]
    place = response.location
    for value in (place.latitude_deg, place.longitude_deg, response.path[0].token, "0.25"):
        assert str(value)[:7] not in "".join(line.split("request_id")[1] for line in lines)


async def test_a_message_longer_than_trailers_may_be_still_arrives(live: Live) -> None:
    stub: Any = geolocation_pb2_grpc.GeolocationServiceStub(live[1])
    options = pb.LocateOptions(region_tokens=["ü" * 50_000])
    query = pb.Embedding(values=embedding(0).tolist())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Locate(pb.LocateRequest(request_id="ü" * 4000, embedding=query, options=options))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error_of(caught.value).reason == "REGION_CELL_UNKNOWN"  # type: ignore[attr-defined]
    assert "tokens of its cells come with every answer's path" in caught.value.details()
