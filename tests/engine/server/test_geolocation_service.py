from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from support.bad_requests import BAD_REQUESTS, INVALID, MAX_IMAGE_BYTES, with_options
from support.bundles import make_bundle
from support.processes import results
from support.refusals import error_of, refused
from support.servers import encoded_image, running, settings_for

from geosurge.errors import BundleCorruptError
from geosurge.location import LocateOptions
from geosurge.locator import Locator
from geosurge.server.app import Server
from geosurge.v1 import geolocation_pb2 as pb
from geosurge.v1 import geolocation_pb2_grpc
from geosurge.wire import location_to_response

Live = tuple[Server, grpc.aio.Channel]


def good(request_id: str = "") -> pb.LocateRequest:
    return pb.LocateRequest(request_id=request_id, image=encoded_image(1))


def geolocation(channel: grpc.aio.Channel) -> Any:
    return geolocation_pb2_grpc.GeolocationServiceStub(channel)


async def stream(channel: grpc.aio.Channel, requests: Iterable[pb.LocateRequest]) -> list[pb.LocateResult]:
    async def send() -> AsyncIterator[pb.LocateStreamRequest]:
        for request in requests:
            yield pb.LocateStreamRequest(requests=[request])

    return [result async for result in results(geolocation(channel).LocateStream(send()))]


async def test_no_answer_names_a_directory_of_the_server(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    server, channel = live
    damaged = Path(tempfile.gettempdir()) / "geosurge-load-x" / "level-2.faiss"

    async def fail(*_: object, **__: object) -> None:
        raise BundleCorruptError(f"{damaged} is damaged")

    monkeypatch.setattr(server._batcher, "locate", fail)
    [result] = await stream(channel, [good()])
    assert result.status.message == "level-2.faiss is damaged"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await geolocation(channel).Locate(good())
    assert caught.value.details() == "level-2.faiss is damaged"


@pytest.mark.parametrize("name", BAD_REQUESTS)
async def test_a_bad_request_is_refused_with_its_own_reason(live: Live, name: str) -> None:
    request, reason, code = BAD_REQUESTS[name]
    async with refused(code, reason):
        await geolocation(live[1]).Locate(request)
    assert (await geolocation(live[1]).Locate(good())).index_version == "tiny"


async def test_in_a_stream_each_bad_item_costs_itself_alone(live: Live) -> None:
    requests, expected = [], []
    for number, (request, reason, _) in enumerate(BAD_REQUESTS.values()):
        bad = pb.LocateRequest()
        bad.CopyFrom(request)
        bad.request_id = bad.request_id or f"bad-{number}"
        requests += [good(f"good-{number}"), bad]
        expected += ["", reason]
    responses = await stream(live[1], [*requests, good("last")])
    assert [response.request_id for response in responses] == [request.request_id for request in requests] + ["last"]
    reasons = [error_of(item.status).reason if item.HasField("status") else "" for item in responses]
    assert reasons == [*expected, ""]
    leaf = responses[0].response.path[-1].token
    for response in responses[::2]:
        assert response.response.request_id == response.request_id
        assert response.response.path[-1].token == leaf


async def test_the_answer_is_that_of_the_locator(live: Live, bundle: Path) -> None:
    response = await geolocation(live[1]).Locate(good("views/1.png"))
    with Locator.open(bundle) as locator:
        expected = location_to_response(locator.locate([encoded_image(1)])[0], "views/1.png")  # type: ignore[arg-type]
    response.ClearField("timings")
    expected.ClearField("timings")
    assert response == expected


async def test_options_reach_the_search(live: Live) -> None:
    stub = geolocation(live[1])
    plain = await stub.Locate(with_options())
    options: dict[str, Any] = {"top_k": 3, "confidence_level": 0.5, "h3_resolution": 4}
    response = await stub.Locate(with_options(**options, search_mode=pb.SEARCH_MODE_EXACT))
    assert len(response.alternatives) == 3
    assert response.location.confidence_level == 0.5
    assert response.location.radius_km <= plain.location.radius_km
    assert response.location.h3_cell.startswith("84")
    region = await stub.Locate(with_options(region_tokens=[plain.alternatives[-1].token]))
    assert [leaf.token for leaf in region.alternatives] == [plain.alternatives[-1].token]
    assert (await stub.Locate(with_options(index_version="tiny"))).path == plain.path


async def test_an_empty_stream_ends_well(live: Live) -> None:
    assert await stream(live[1], []) == []
    call = geolocation(live[1]).LocateStream()
    await call.done_writing()
    assert await call.code() == grpc.StatusCode.OK


async def test_a_stream_item_without_a_request_gets_an_id_and_a_reason(live: Live) -> None:
    call = geolocation(live[1]).LocateStream(iter([pb.LocateStreamRequest(requests=[pb.LocateRequest()])]))
    [response] = (await call.read()).results
    assert len(response.request_id) == 32
    assert error_of(response.status).reason == "QUERY_MISSING"


async def test_a_message_without_a_request_ends_its_stream_after_the_answers(live: Live) -> None:
    messages = [pb.LocateStreamRequest(requests=[good("a"), good("b")]), pb.LocateStreamRequest()]
    answers = results(geolocation(live[1]).LocateStream(iter(messages)))
    assert [(await anext(answers)).request_id for _ in range(2)] == ["a", "b"]
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, "QUERY_MISSING"):
        await anext(answers)


async def test_several_requests_of_a_message_are_answered_in_order_and_each_for_itself(live: Live) -> None:
    requests = [good("a"), pb.LocateRequest(request_id="b", image=b"garbage"), good("c")]
    call = geolocation(live[1]).LocateStream(iter([pb.LocateStreamRequest(requests=requests)]))
    answered = [answer async for answer in results(call)]
    assert [answer.request_id for answer in answered] == ["a", "b", "c"]
    assert [answer.HasField("response") for answer in answered] == [True, False, True]


async def test_an_item_that_fails_unexpectedly_is_logged_with_its_id(
    live: Live, caplog: pytest.LogCaptureFixture
) -> None:
    server, channel = live
    del server._versions.active.locator.manifest
    first, second = await stream(channel, [good("a"), good("b" * 300)])
    assert {error_of(answer.status).reason for answer in (first, second)} == {"INTERNAL"}
    failures = {vars(record)["request_id"]: vars(record)["error_id"] for record in caplog.records if record.exc_info}
    assert failures.keys() == {"a", "b" * 200}
    assert failures["a"] in first.status.message


async def test_fifty_clients_at_once_get_what_each_gets_alone(live: Live) -> None:
    stub = geolocation(live[1])
    requests = [
        pb.LocateRequest(request_id=str(n), image=encoded_image(n)) if n % 2 else with_options() for n in range(50)
    ]
    together = await asyncio.gather(*(stub.Locate(request) for request in requests))
    for request, response in zip(requests, together, strict=True):
        alone = await stub.Locate(request)
        assert response.request_id == request.request_id or not request.request_id
        assert [cell.token for cell in response.path] == [cell.token for cell in alone.path]
        assert response.location.probability == pytest.approx(alone.location.probability, rel=1e-3)


async def test_a_unary_call_beyond_the_permits_is_refused_at_once_and_a_stream_waits(bundle: Path) -> None:
    async with running(settings_for(bundle, max_concurrent_requests=2)) as (server, channel):
        held = [server._admission.take() for _ in range(2)]
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await geolocation(channel).Locate(good(), timeout=5)
        assert refusal.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        trailers = dict(refusal.value.trailing_metadata())
        status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
        retry = error_details_pb2.RetryInfo()
        assert error_of(status).reason == "OVERLOADED"
        assert status.details[1].Unpack(retry)
        assert retry.retry_delay.ToTimedelta().total_seconds() > 0

        waiting = asyncio.create_task(stream(channel, [good(str(n)) for n in range(5)]))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        for permit in held:
            permit.release()
        responses = await asyncio.wait_for(waiting, 10)
        assert [response.response.request_id for response in responses] == ["0", "1", "2", "3", "4"]
        assert server._admission.in_use == 0


async def test_a_stream_reads_no_further_ahead_than_its_window(bundle: Path) -> None:
    async with running(settings_for(bundle, max_stream_window=3, max_concurrent_requests=10)) as (server, channel):
        blocked = asyncio.Event()
        loop = asyncio.get_running_loop()
        owner = asyncio.wrap_future(
            server._batcher._search.call(lambda: asyncio.run_coroutine_threadsafe(blocked.wait(), loop).result())
        )
        waiting = asyncio.create_task(stream(channel, [good(str(n)) for n in range(9)]))
        while server._admission.in_use < 3:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert server._admission.in_use == 3
        blocked.set()
        await owner
        assert len(await waiting) == 9


async def test_cancelled_and_late_calls_leave_nothing_behind(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    server, channel = live
    stub = geolocation(channel)
    calls = [stub.Locate(good(), timeout=0.001 if n % 2 else 10) for n in range(40)]
    streams = [stub.LocateStream(iter([pb.LocateStreamRequest(requests=[good()])] * 20)) for _ in range(5)]
    await asyncio.sleep(0.005)
    for call in [*calls[::4], *streams]:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    for _ in range(1000):
        if server._admission.in_use == 0 and server._batcher.queue_length == 0:
            break
        await asyncio.sleep(0.01)
    assert server._admission.in_use == 0
    assert server._batcher.queue_length == 0
    assert server._versions.status("tiny").request_count == 0
    assert (await stub.Locate(good())).index_version == "tiny"
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_info_publishes_limits_and_the_index(live: Live, bundle: Path) -> None:
    info = await geolocation(live[1]).GetInfo(pb.GetInfoRequest())
    with Locator.open(bundle) as locator:
        assert info.encoder_sha256 == locator.encoder.fingerprint
        assert [level.cell_count for level in info.levels] == list(locator.tree.cell_counts)
    assert info.index_version == "tiny"
    assert info.dimension == 16
    assert info.limits.max_image_bytes == MAX_IMAGE_BYTES
    for limit, top_k in (("ok", info.limits.max_top_k), ("refused", info.limits.max_top_k + 1)):
        if limit == "ok":
            await geolocation(live[1]).Locate(with_options(top_k=top_k))
        else:
            async with refused(INVALID, "OPTION_OUT_OF_RANGE"):
                await geolocation(live[1]).Locate(with_options(top_k=top_k))
    side = info.limits.min_image_side_px
    await geolocation(live[1]).Locate(pb.LocateRequest(image=encoded_image(1, size=(side, side))))


async def test_an_index_without_an_encoder_answers_embeddings_and_refuses_images(tmp_path: Path) -> None:
    async with running(settings_for(make_bundle(tmp_path / "vectors"))) as (_, channel):
        stub = geolocation(channel)
        assert (await stub.Locate(with_options())).index_version == "tiny"
        async with refused(grpc.StatusCode.FAILED_PRECONDITION, "ENCODER_MISSING"):
            await stub.Locate(good())
        info = await stub.GetInfo(pb.GetInfoRequest())
        assert list(info.image_formats) == []
        assert info.encoder_sha256 == ""


def test_the_default_options_of_the_api_are_those_of_the_engine() -> None:
    comments = (Path(__file__).parents[3] / "proto" / "geosurge" / "v1" / "geolocation.proto").read_text()
    default = LocateOptions()
    assert f"at least 1. Default {default.top_k}." in comments
    assert f"in (0, 1). Default {default.confidence_level}." in comments
