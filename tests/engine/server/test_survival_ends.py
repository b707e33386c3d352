"""How a server ends: asked to, with calls open; and by itself, when a part of it has crashed."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.answers import expected_answers, question, questions, reason_of, same_answer
from support.bundles import make_store, tiny_encoder
from support.processes import (
    CRASHING_STAGE,
    FAILING_ENCODER,
    HELD_ENCODER,
    geolocation,
    index_client,
    results,
    server_process,
    wait_until,
)
from support.servers import embedding, encoded_image
from support.traffic import load, open_channel

from geosurge import store as stores
from geosurge.errors import ServiceError
from geosurge.v1 import geolocation_pb2 as pb

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

QUERIES = [query for seed in range(4) for query in (encoded_image(seed), embedding(seed))]
STREAMS, ITEMS, CALLS = 3, 10, 8


async def _extend(items: list[Any], source: AsyncIterator[Any]) -> None:
    """Keeps what a stream yields before it fails."""
    async for item in source:
        items.append(item)  # noqa: PERF401


async def health_changes(channel: grpc.aio.Channel) -> list[int]:
    """Every status that a health watch is told, until it ends."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    told: list[int] = []
    with contextlib.suppress(grpc.aio.AioRpcError):
        await _extend(told, (response.status async for response in stub.Watch(health_pb2.HealthCheckRequest())))
    return told


async def whole_stream(channel: grpc.aio.Channel, count: int) -> tuple[list[pb.LocateResult], grpc.aio.AioRpcError]:
    """Sends items and never ends the stream; returns what came, and how the server ended it."""

    async def send() -> AsyncIterator[pb.LocateStreamRequest]:
        for number in range(count):
            yield pb.LocateStreamRequest(requests=[question(encoded_image(number), request_id=str(number))])
        await asyncio.Event().wait()

    answers: list[pb.LocateResult] = []
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await _extend(answers, results(geolocation(channel).LocateStream(send())))
    return answers, ended.value


async def test_sigterm_answers_what_is_in_flight_and_exits_with_zero(bundle: Path, tmp_path: Path) -> None:
    images = [encoded_image(number) for number in range(max(ITEMS, CALLS))]
    hold = tmp_path / "hold"
    settings = {"max_batch_size": 4, "max_concurrent_requests": 64, "grace_seconds": 60.0}
    with server_process(bundle, prelude=HELD_ENCODER, environment={"HOLD_FILE": str(hold)}, **settings) as server:
        hold.touch()
        async with open_channel(server.address) as channel:
            stub = geolocation(channel)
            watch = asyncio.create_task(health_changes(channel))
            calls = [asyncio.ensure_future(stub.Locate(question(image), timeout=60)) for image in images[:CALLS]]
            streams = [asyncio.create_task(whole_stream(channel, ITEMS)) for _ in range(STREAMS)]
            silent = asyncio.create_task(whole_stream(channel, 0))
            while server.metric("geosurge_permits_in_use") < CALLS + STREAMS * ITEMS:
                await asyncio.sleep(0.01)
            server.send(signal.SIGTERM)
            while "stopping signal=SIGTERM" not in server.log:
                await asyncio.sleep(0.01)
            hold.unlink()
            answers = await asyncio.gather(*calls)
            ended = await asyncio.gather(*streams, silent)
            told = await watch
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Locate(question(images[0]), timeout=60)
        status = await asyncio.to_thread(server.wait, 60)
        log = server.log
    expected = expected_answers(bundle, [image for image in images for _ in range(2)])[::2]
    assert all(map(same_answer, answers, expected))
    for items, error in ended:
        assert [item.request_id for item in items] == [str(number) for number in range(len(items))]
        assert all(same_answer(item.response, expected[number]) for number, item in enumerate(items))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    assert [len(items) for items, _ in ended] == [ITEMS] * STREAMS + [0]
    assert told == [SERVING, NOT_SERVING]
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert status == 0, log
    assert "Traceback" not in log


@pytest.mark.parametrize("stage", ["encode", "search"])
async def test_a_server_whose_stage_crashes_says_so_refuses_what_it_holds_and_ends_itself(
    bundle: Path, tmp_path: Path, stage: str
) -> None:
    crash = tmp_path / "crash"
    # A call that nobody answers would hold the server up for as long as the test has patience.
    settings = {"max_batch_size": 4, "max_concurrent_requests": 64, "grace_seconds": 3600.0}
    with server_process(bundle, prelude=CRASHING_STAGE, environment={"CRASH_FILE": str(crash)}, **settings) as server:
        async with open_channel(server.address) as channel, load(server.address, questions(QUERIES), 12) as log:
            watch = asyncio.create_task(health_changes(channel))
            while log.calls < 200:
                await asyncio.sleep(0.01)
            assert log.failures == {}
            (tmp_path / "new").write_text(stage)
            (tmp_path / "new").replace(crash)
            status = await asyncio.to_thread(server.wait)
            told = await watch
        assert told == [SERVING, NOT_SERVING]
        assert status > 0
        assert f"the stage '{stage}' crashed" in server.log
        assert server.log.count("stage crashed") == 1
    codes = {failure.split()[0] for failure in log.failures}
    # gRPC itself cancels calls that come in the moment a server stops.
    assert codes <= {"INTERNAL", "UNAVAILABLE", "CANCELLED", "stream:", "item:"}, log.failures
    assert any("the engine failed and is ending" in failure for failure in log.failures), log.failures
    assert log.inconsistent({"tiny": expected_answers(bundle, QUERIES)}) == 0


async def test_a_server_that_can_encode_nothing_any_more_ends_itself(bundle: Path, tmp_path: Path) -> None:
    fail = tmp_path / "fail"
    with server_process(bundle, prelude=FAILING_ENCODER, environment={"FAIL_FILE": str(fail)}) as server:
        async with open_channel(server.address) as channel:
            watch = asyncio.create_task(health_changes(channel))
            await geolocation(channel).Locate(question(encoded_image(1)), timeout=60)
            fail.touch()
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await geolocation(channel).Locate(question(encoded_image(1)), timeout=60)
            assert failed.value.code() is grpc.StatusCode.INTERNAL
            assert await asyncio.to_thread(server.wait) > 0
            assert await watch == [SERVING, NOT_SERVING]
        assert "unexpected failure" in server.log
        assert "stage crashed" in server.log


async def test_a_server_whose_stage_hangs_ends_itself(bundle: Path, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    settings = {"max_stage_seconds": 2.0, "grace_seconds": 0.5}
    with server_process(bundle, prelude=HELD_ENCODER, environment={"HOLD_FILE": str(hold)}, **settings) as server:
        async with open_channel(server.address) as channel:
            watch = asyncio.create_task(health_changes(channel))
            await geolocation(channel).Locate(question(embedding(1)), timeout=60)
            hold.touch()
            with pytest.raises(grpc.aio.AioRpcError):
                await geolocation(channel).Locate(question(encoded_image(1)), timeout=60)
            assert await asyncio.to_thread(server.wait) > 0
            assert await watch == [SERVING, NOT_SERVING]
        assert "stage hangs stage=encode" in server.log


RELOADED_WHILE_STARTING = """
import os, signal
from pathlib import Path
from geosurge import store
from geosurge.server import app

start = app.Versions.start

async def start_and_reload(self):
    handle = await start(self)
    store.activate(Path(os.environ["STORE"]), "two")
    os.kill(os.getpid(), signal.SIGHUP)
    return handle

app.Versions.start = start_and_reload
"""


def test_a_reload_that_is_asked_for_during_the_start_is_made(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", {"one": None, "two": None})
    with server_process(store, prelude=RELOADED_WHILE_STARTING, environment={"STORE": str(store)}) as server:
        wait_until(lambda: "activated index_version=two previous_version=one" in server.log, "two is active")


async def test_sigterm_ends_an_activation_and_leaves_the_store_as_it_is(tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    store = make_store(tmp_path / "store", {"one": tiny_encoder(seed=0), "two": tiny_encoder(seed=1)})
    with server_process(store, prelude=HELD_ENCODER, environment={"HOLD_FILE": str(hold)}) as server:
        hold.touch()
        with index_client(server) as index:
            activation = asyncio.create_task(asyncio.to_thread(index.activate, "two"))
            # The encoder is held while it is asked for the golden images.
            while index.version("two").load_progress < 0.8:
                await asyncio.sleep(0.01)
            server.send(signal.SIGTERM)
            while "stopping signal=SIGTERM" not in server.log:
                await asyncio.sleep(0.01)
            hold.unlink()
            with pytest.raises(ServiceError):
                await activation
        assert await asyncio.to_thread(server.wait) == 0
    assert stores.current(store) == "one"
