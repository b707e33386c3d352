"""Callers who leave, or whose time is up, at any moment: nothing of them stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from pathlib import Path

import grpc
from support.answers import Query, expected_answers, question, questions, same_answer
from support.processes import REPORT_TASKS, ServerProcess, geolocation, index_client, server_process, wait_until
from support.servers import embedding, encoded_image
from support.traffic import open_channel

from geosurge.v1 import geolocation_pb2 as pb

ABANDONED = 10_000
CALLERS, CALLS = 16, 200
PATIENCE_SECONDS = 0.015
"""Mean time after which a caller leaves: about as long as an answer takes, so that it happens at every stage."""

QUERIES: list[Query] = [*(embedding(seed) for seed in range(6)), *(encoded_image(seed) for seed in range(2))]
ASKED = [question(query) for query in QUERIES]
LEFT = {"CANCELLED", "DEADLINE_EXCEEDED"}


async def give_up(channel: grpc.aio.Channel, rng: random.Random) -> None:
    """Makes a call, and leaves it or lets it expire after a random time."""
    seconds, expires = 0.002 + rng.expovariate(1 / PATIENCE_SECONDS), rng.random() < 0.5
    timeout = seconds if expires else None
    if rng.random() < 0.1:
        ask = ask_in_stream(channel, rng.choices(ASKED, k=rng.randrange(12)), timeout)
    else:
        ask = ask_once(channel, rng.choice(ASKED), timeout)
    # A cancelled task cancels the call that it waits for.
    asking = asyncio.create_task(ask)
    await asyncio.wait([asking], timeout=None if expires else seconds)
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking


async def ask_once(channel: grpc.aio.Channel, asked: pb.LocateRequest, timeout: float | None) -> None:
    try:
        await geolocation(channel).Locate(asked, timeout=timeout)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            raise


async def ask_in_stream(channel: grpc.aio.Channel, items: list[pb.LocateRequest], timeout: float | None) -> None:
    """Sends items and then nothing for ever, so that the stream ends only by being left."""
    call = geolocation(channel).LocateStream(timeout=timeout)
    # A stream that has expired says so in another way to each operation.
    with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
        for item in items:
            await call.write(pb.LocateStreamRequest(requests=[item]))
        while await call.read() is not grpc.aio.EOF:
            pass


async def give_up_often(address: str, seed: int) -> None:
    """Has `CALLERS` callers give up `CALLS` calls each."""

    async def caller(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        async with open_channel(address) as channel:
            for _ in range(CALLS):
                await give_up(channel, rng)

    async with asyncio.TaskGroup() as group:
        for number in range(CALLERS):
            group.create_task(caller(number))


def calls_by_code(server: ServerProcess) -> dict[str, float]:
    """How the calls that reached the server have ended there."""
    ends: dict[str, float] = {}
    for (name, labels), count in server.metrics().items():
        if name == "geosurge_calls_total":
            code = dict(labels)["code"]
            ends[code] = ends.get(code, 0.0) + count
    return ends


def task_count(server: ServerProcess, file: Path) -> int:
    """How many asyncio tasks the server has."""
    file.unlink(missing_ok=True)
    server.send(signal.SIGUSR1)
    wait_until(file.exists, "the server has counted its tasks")
    return int(file.read_text())


async def test_ten_thousand_abandoned_calls_leave_no_permit_task_or_thread_behind(bundle: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    settings = {"max_concurrent_requests": 1000, "max_batch_size": 8, "log_level": "warning"}
    with server_process(bundle, prelude=REPORT_TASKS, environment={"TASKS_FILE": str(tasks)}, **settings) as server:
        # Whatever any traffic leaves, such as a thread of each pool, is there after this.
        await give_up_often(server.address, 0)
        wait_until(lambda: server.metric("geosurge_permits_in_use") == 0, "the first callers are forgotten")
        tasks_before, threads_before = task_count(server, tasks), server.thread_count()

        rounds = 0
        while sum(calls_by_code(server).get(code, 0) for code in LEFT) < ABANDONED:
            rounds += 1
            await give_up_often(server.address, rounds)

        wait_until(lambda: server.metric("geosurge_permits_in_use") == 0, "every permit is given back")
        wait_until(lambda: server.metric("geosurge_queue_length") == 0, "nothing is queued")
        wait_until(lambda: task_count(server, tasks) <= tasks_before, f"no more than {tasks_before} tasks are left")
        # Pools, gRPC's among them, may not have had all their threads yet; one call in a thousand leaves more.
        most = threads_before + ABANDONED // 1000
        wait_until(lambda: server.thread_count() < most, f"fewer than {most} threads are left")
        with index_client(server) as index:
            assert index.version("tiny").request_count == 0
        ends = calls_by_code(server)
        async with open_channel(server.address) as channel:
            answers = [await geolocation(channel).Locate(asked, timeout=60) for asked in questions(QUERIES)]
        log = server.log
    assert all(map(same_answer, answers, expected_answers(bundle, QUERIES)))
    # They left in both ways, and some too late; nobody was refused, and nothing failed because of them.
    assert ends.keys() == {*LEFT, "OK"}
    assert min(ends.values()) > ABANDONED / 10
    assert "Traceback" not in log
    assert "ERROR" not in log
