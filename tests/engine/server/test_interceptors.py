from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2
from grpc._cython.cygrpc import ExecuteBatchError
from support.servers import embedding, encoded_image

from geosurge.errors import CredentialsMissingError, ImageEmptyError, StreamLimitError
from geosurge.server.app import Server
from geosurge.server.failures import PrivatePaths
from geosurge.server.interceptors import CallInterceptor, current_call
from geosurge.server.logs import add_call
from geosurge.server.metrics import Metrics
from geosurge.v1 import geolocation_pb2 as pb
from geosurge.v1 import geolocation_pb2_grpc
from geosurge.wire import status_to_error

Live = tuple[Server, grpc.aio.Channel]

LOCATE = "/geosurge.v1.GeolocationService/Locate"
LOCATE_STREAM = "/geosurge.v1.GeolocationService/LocateStream"


LOGGED = ("message", "method", "code", "request_id", "index_version", "items", "failed_items")

Handler = Callable[[AsyncIterator[bytes], Any], Awaitable[None]]


@asynccontextmanager
async def answering(
    handler: Handler, *others: grpc.aio.ServerInterceptor
) -> AsyncIterator[tuple[Metrics, grpc.aio.Channel]]:
    """A gRPC server whose LocateStream is a function of raw messages, what it has counted, and a channel to it."""
    metrics = Metrics()
    server = grpc.aio.server(interceptors=[CallInterceptor(asyncio.Event(), metrics, PrivatePaths({})), *others])
    method = grpc.stream_stream_rpc_method_handler(handler, lambda data: data, lambda data: data)
    service, name = LOCATE_STREAM[1:].split("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {name: method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield metrics, channel
    finally:
        await server.stop(None)


class Refusing(grpc.aio.ServerInterceptor):
    """Stands for one that asks for credentials."""

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        async def refuse(_requests: Any, _context: Any) -> None:
            raise CredentialsMissingError("the call has no token")

        return grpc.stream_stream_rpc_method_handler(refuse)


def counted(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(f"geosurge_{name}", labels) or 0.0


def calls_in(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [vars(record) for record in caplog.records if record.name == "geosurge.server.interceptors"]


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
    good = pb.LocateStreamRequest(requests=[pb.LocateRequest(request_id="a", image=encoded_image(1))])
    call = live[1].stream_stream(LOCATE_STREAM)(iter([good.SerializeToString(), b"\xff"]))
    assert pb.LocateStreamResponse.FromString(await call.read()).results[0].response.request_id == "a"
    with pytest.raises(grpc.aio.AioRpcError):
        await call.read()


async def test_what_is_too_large_to_be_parsed_is_refused_and_items_before_it_are_answered(live: Live) -> None:
    large = pb.LocateRequest(request_id="a", options=pb.LocateOptions(region_tokens=[""] * 530_000))
    good = pb.LocateStreamRequest(requests=[pb.LocateRequest(request_id="a", image=encoded_image(1))])
    with pytest.raises(grpc.aio.AioRpcError) as unary:
        await live[1].unary_unary(LOCATE)(large.SerializeToString())
    items = [good.SerializeToString(), pb.LocateStreamRequest(requests=[large]).SerializeToString()]
    call = live[1].stream_stream(LOCATE_STREAM)(iter(items))
    assert pb.LocateStreamResponse.FromString(await call.read()).results[0].response.request_id == "a"
    with pytest.raises(grpc.aio.AioRpcError) as stream:
        await call.read()
    with pytest.raises(grpc.aio.AioRpcError) as other:
        await live[1].unary_unary("/geosurge.v1.CellService/GetCell")(bytes(1_100_000))
    for failure in (unary.value, stream.value, other.value):
        assert failure.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error_of(failure).reason == "MESSAGE_TOO_LARGE"  # type: ignore[attr-defined]


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
    assert any(record.__dict__.get("error_id") == error_id and record.exc_info for record in caplog.records)
    [call] = calls_in(caplog)
    assert (call["code"], call["levelname"]) == ("INTERNAL", "ERROR")


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
                yield pb.LocateStreamRequest(requests=[pb.LocateRequest(image=image)])

        _ = [message async for message in stub.LocateStream(send())]
        await asyncio.sleep(0.05)
    good, bad, stream = calls_in(caplog)
    assert (good["method"], good["code"], good["levelname"]) == (LOCATE, "OK", "INFO")
    assert (good["request_id"], good["index_version"]) == ("line\nbreak", "tiny")
    assert good["duration_ms"] > 0
    assert "items" not in good
    assert (bad["method"], bad["code"], bad["request_id"]) == (LOCATE, "INVALID_ARGUMENT", "bad")
    assert (stream["method"], stream["code"], stream["index_version"]) == (LOCATE_STREAM, "OK", "tiny")
    assert (stream["items"], stream["failed_items"]) == (3, 1)
    place = response.location
    written = [str(value) for call in (good, bad, stream) for key, value in call.items() if key in LOGGED]
    for value in (place.latitude_deg, place.longitude_deg, response.path[0].token, "0.25"):
        assert not [text for text in written if str(value)[:7] in text]


async def test_a_message_longer_than_trailers_may_be_still_arrives(live: Live) -> None:
    stub: Any = geolocation_pb2_grpc.GeolocationServiceStub(live[1])
    options = pb.LocateOptions(region_tokens=["ü" * 50_000])
    query = pb.Embedding(values=embedding(0).tolist())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Locate(pb.LocateRequest(request_id="ü" * 4000, embedding=query, options=options))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error_of(caught.value).reason == "REGION_CELL_UNKNOWN"  # type: ignore[attr-defined]
    assert "tokens of its cells come with every answer's path" in caught.value.details()


async def test_a_call_is_counted_before_its_caller_knows_how_it_ended() -> None:
    async def refuse(requests: AsyncIterator[bytes], context: Any) -> None:
        raise StreamLimitError("too many")

    async with answering(refuse) as (metrics, channel):
        for number in range(1, 4):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.stream_stream(LOCATE_STREAM)(iter([b""])).read()
            code = caught.value.code().name
            assert counted(metrics, "calls_total", method=LOCATE_STREAM, code=code) == number
            assert counted(metrics, "call_seconds_count", method=LOCATE_STREAM) == number
            assert counted(metrics, "refusals_total", reason=StreamLimitError.reason) == number


async def test_what_a_later_interceptor_refuses_is_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    async def never(requests: AsyncIterator[bytes], context: Any) -> None:
        raise AssertionError

    unknown = "/geosurge.v1.Nonsense/" + "x" * 500
    async with answering(never, Refusing()) as (metrics, channel):
        with caplog.at_level(logging.INFO):
            for method in (LOCATE, LOCATE_STREAM, unknown):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary(method)(b"")
                assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
                assert error_of(caught.value).reason == "CREDENTIALS_MISSING"  # type: ignore[attr-defined]
    for method in (LOCATE, LOCATE_STREAM, "other"):
        assert counted(metrics, "calls_total", method=method, code="UNAUTHENTICATED") == 1
    assert counted(metrics, "refusals_total", reason="CREDENTIALS_MISSING") == 3
    assert [call["method"] for call in calls_in(caplog)] == [LOCATE, LOCATE_STREAM, unknown[:200]]


async def test_an_item_is_counted_when_it_fails_and_not_when_its_stream_ends(caplog: pytest.LogCaptureFixture) -> None:
    async def answer(requests: AsyncIterator[bytes], context: Any) -> None:
        async for request in requests:
            current_call().item_failed(ImageEmptyError.reason)
            await context.write(request)

    async with answering(answer) as (metrics, channel):
        call = channel.stream_stream(LOCATE_STREAM)()
        with caplog.at_level(logging.INFO):
            for number in range(1, 4):
                await call.write(b"")
                await call.read()
                assert counted(metrics, "failed_items_total", reason="IMAGE_EMPTY") == number
            assert counted(metrics, "calls_total", method=LOCATE_STREAM, code="OK") == 0
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
    assert counted(metrics, "calls_total", method=LOCATE_STREAM, code="OK") == 1
    assert counted(metrics, "refusals_total", reason="IMAGE_EMPTY") == 0


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ('Failed "execute_batch": (<SendMessageOperation>,)', "CANCELLED"),
        ("Failed grpc_call_start_batch: 8 with grpc_call_error value: 'TOO_MANY_OPERATIONS'", "INTERNAL"),
    ],
)
async def test_an_answer_that_nobody_waits_for_is_no_failure_of_the_engine(
    message: str, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(requests: AsyncIterator[bytes], context: Any) -> None:
        raise ExceptionGroup("unhandled errors in a TaskGroup", [ExecuteBatchError(message)])

    async with answering(fail) as (metrics, channel):
        with caplog.at_level(logging.INFO), pytest.raises((grpc.aio.AioRpcError, asyncio.TimeoutError)):
            await asyncio.wait_for(channel.stream_stream(LOCATE_STREAM)(iter([b""])).read(), 1)
    assert counted(metrics, "calls_total", method=LOCATE_STREAM, code=code) == 1
    assert calls_in(caplog)[0]["code"] == code
    assert bool([record for record in caplog.records if record.exc_info]) == (code == "INTERNAL")


async def test_a_record_says_of_which_call_it_is(caplog: pytest.LogCaptureFixture) -> None:
    async def answer(requests: AsyncIterator[bytes], context: Any) -> None:
        current_call().request_id = "my id"
        current_call().index_version = "tiny"
        await asyncio.to_thread(logging.getLogger("geosurge.test").warning, "something")
        await context.write(b"")

    caplog.handler.addFilter(add_call)
    try:
        async with answering(answer) as (_, channel):
            await channel.stream_stream(LOCATE_STREAM)(iter([b""])).read()
    finally:
        caplog.handler.removeFilter(add_call)
    [record] = [vars(record) for record in caplog.records if record.name == "geosurge.test"]
    assert (record["request_id"], record["index_version"]) == ("my id", "tiny")
