"""Five times as many calls as a server can answer: it answers as many as it can, soon, and refuses the others at once.

A batch sleeps, as if it waited for a GPU. So the machine's cores are idle, and what is measured is how long calls wait
for each other.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.answers import OPTIONS, expected_answers, question, reason_of, retry_seconds_of, same_answer
from support.processes import SLOW_ENCODER, geolocation, server_process
from support.servers import encoded_image
from support.traffic import open_channel

from geosurge.v1 import geolocation_pb2 as pb

BATCH, ENCODE_SECONDS = 8, 0.25
CAPACITY = BATCH / ENCODE_SECONDS
"""Calls a second."""
OVERLOAD = 5
SECONDS, FIRST_SECONDS = 9.0, 1.0
REFUSAL_SECONDS = 0.020
IMAGES = [encoded_image(seed) for seed in range(4)]
LOCATE = "/geosurge.v1.GeolocationService/Locate"


@dataclass
class Seen:
    """What clients saw; answers come with the number of their image, refusals with their reason."""

    answers: list[tuple[int, pb.LocateResponse]] = field(default_factory=list)
    answer_seconds: list[float] = field(default_factory=list)
    refusals: list[tuple[grpc.StatusCode, str, bool]] = field(default_factory=list)
    refusal_seconds: list[float] = field(default_factory=list)


async def ask(channel: grpc.aio.Channel, number: int, seen: Seen) -> None:
    begun = time.perf_counter()
    try:
        answer = await geolocation(channel).Locate(question(IMAGES[number % len(IMAGES)]), timeout=60)
    except grpc.aio.AioRpcError as error:
        seen.refusal_seconds.append(time.perf_counter() - begun)
        seen.refusals.append((error.code(), reason_of(error), (retry_seconds_of(error) or 0) > 0))
    else:
        seen.answer_seconds.append(time.perf_counter() - begun)
        seen.answers.append((number % len(IMAGES), answer))


async def at_a_rate(rate: float, seconds: float, call: Callable[[int], Awaitable[None]]) -> None:
    """Makes calls at fixed times, whether or not those before have been answered."""
    begun = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(round(rate * seconds)):
            await asyncio.sleep(max(begun + number / rate - time.perf_counter(), 0))
            group.create_task(call(number))  # type: ignore[arg-type]


def refusal_seconds_of_the_server(log: str) -> list[float]:
    """How long the server itself took for each call that it refused, from its log."""
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    refused = [line for line in lines if line.get("method") == LOCATE and line["code"] == "RESOURCE_EXHAUSTED"]
    return [line["duration_ms"] / 1000 for line in refused]


async def test_at_five_times_its_capacity_a_server_answers_as_soon_and_refuses_at_once(bundle: Path) -> None:
    """The 20 ms of a refusal are compared with nearly all that the server measured, and with the client's median.

    A client may get its turn on busy cores later than its answer. What it sees in the first second is not compared:
    the overload begins there, with a batch of a single image.
    """
    environment = {"ENCODE_SECONDS": str(ENCODE_SECONDS)}
    settings = {"max_batch_size": BATCH, "max_concurrent_requests": 2 * BATCH, "log_format": "json"}
    quiet, first, busy = Seen(), Seen(), Seen()
    health: list[int] = []
    with server_process(bundle, prelude=SLOW_ENCODER, environment=environment, **settings) as server:
        async with open_channel(server.address) as channel, open_channel(server.address) as other:
            for number in range(20):
                await ask(channel, number, quiet)

            async def check_health(_number: int) -> None:
                stub: Any = health_pb2_grpc.HealthStub(other)
                health.append((await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)).status)

            rate = OVERLOAD * CAPACITY
            await asyncio.gather(
                at_a_rate(
                    rate, SECONDS, lambda number: ask(channel, number, first if number < rate * FIRST_SECONDS else busy)
                ),
                at_a_rate(20, SECONDS, check_health),
            )
            await ask(channel, 0, quiet)
        assert server.metric("geosurge_permits_in_use") == 0
        log = server.log

    assert quiet.refusals == []
    expected = expected_answers(bundle, [image for image in IMAGES for _ in OPTIONS])[:: len(OPTIONS)]
    assert all(
        same_answer(answer, expected[number]) for number, answer in [*quiet.answers, *first.answers, *busy.answers]
    )
    refusals = [*first.refusals, *busy.refusals]
    assert set(refusals) == {(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", True)}
    answers = len(first.answers) + len(busy.answers)
    assert answers + len(refusals) == rate * SECONDS
    assert answers > 0.7 * CAPACITY * SECONDS
    unloaded, loaded = (float(np.percentile(seen.answer_seconds, 99)) for seen in (quiet, busy))
    assert loaded <= 2 * unloaded + ENCODE_SECONDS
    measured = refusal_seconds_of_the_server(log)
    assert len(measured) == len(refusals)
    assert np.percentile(measured, 99) < REFUSAL_SECONDS
    assert np.median(busy.refusal_seconds) < REFUSAL_SECONDS
    assert health == [health_pb2.HealthCheckResponse.SERVING] * len(health)
