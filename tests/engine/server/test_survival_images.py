"""Requests that cannot be answered come in the midst of good ones, to a server that has as much to do as it can."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from support.answers import Query, expected_answers, questions, reason_of, same_answer
from support.bad_requests import BAD_REQUESTS, MAX_IMAGE_BYTES
from support.processes import geolocation, results, server_process
from support.servers import embedding, encoded_image
from support.traffic import load, open_channel

from geosurge.images import IMAGE_FORMATS
from geosurge.v1 import geolocation_pb2 as pb

CLIENTS, STREAMS, ROUNDS = 12, 4, 8
QUERIES: list[Query] = [
    *(encoded_image(seed, file_format) for seed, file_format in enumerate(IMAGE_FORMATS)),
    *(embedding(seed) for seed in range(3)),
]
GOOD = questions(QUERIES)


def items_of_a_stream(seed: int) -> list[tuple[str, pb.LocateRequest]]:
    """Names and requests in a random order: every bad one `ROUNDS` times, and as many good ones, named by number."""
    bad = [(name, request) for name, (request, _, _) in BAD_REQUESTS.items()] * ROUNDS
    good = [(str(number % len(GOOD)), GOOD[number % len(GOOD)]) for number in range(len(bad))]
    items = [*bad, *good]
    random.Random(seed).shuffle(items)
    return [(name, with_id(request, f"{seed}-{place}")) for place, (name, request) in enumerate(items)]


def with_id(request: pb.LocateRequest, request_id: str) -> pb.LocateRequest:
    """The request with an id, unless it has one."""
    named = pb.LocateRequest(request_id=request_id)
    named.MergeFrom(request)
    return named


async def locate_stream(channel: grpc.aio.Channel, asked: list[pb.LocateRequest]) -> list[pb.LocateResult]:
    async def send() -> AsyncIterator[pb.LocateStreamRequest]:
        for request in asked:
            yield pb.LocateStreamRequest(requests=[request])

    return [answer async for answer in results(geolocation(channel).LocateStream(send()))]


def item_reason(answer: pb.LocateResult) -> str:
    info = error_details_pb2.ErrorInfo()
    assert answer.status.details[0].Unpack(info)
    return info.reason


async def test_at_full_load_each_bad_request_gets_its_reason_and_each_good_one_its_answer(bundle: Path) -> None:
    expected = expected_answers(bundle, QUERIES)
    streams = [items_of_a_stream(seed) for seed in range(STREAMS)]
    settings = {"max_image_bytes": MAX_IMAGE_BYTES, "max_batch_size": 8, "max_concurrent_requests": 512}
    with server_process(bundle, **settings) as server:
        async with load(server.address, GOOD, CLIENTS) as log, open_channel(server.address) as channel:
            while log.calls < CLIENTS:
                await asyncio.sleep(0.01)
            answered = await asyncio.gather(
                *(locate_stream(channel, [request for _, request in items]) for items in streams)
            )
            for items, answers in zip(streams, answered, strict=True):
                assert len(answers) == len(items)
                for (name, request), answer in zip(items, answers, strict=True):
                    if name in BAD_REQUESTS:
                        _, reason, code = BAD_REQUESTS[name]
                        assert (answer.status.code, item_reason(answer)) == (code.value[0], reason), name
                    else:
                        assert same_answer(answer.response, expected[int(name)]), answer
                    assert answer.request_id == request.request_id

            for name, (request, reason, code) in BAD_REQUESTS.items():
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await geolocation(channel).Locate(request, timeout=60)
                assert (refused.value.code(), reason_of(refused.value)) == (code, reason), name
            batches, searched = (
                server.metric(f"geosurge_batch_size_{part}", stage="search") for part in ("count", "sum")
            )
        assert server.health() == "SERVING"
        reasons = {reason for _, reason, _ in BAD_REQUESTS.values()}
        failed = [server.metric("geosurge_failed_items_total", reason=reason) for reason in reasons]
        assert sum(failed) == STREAMS * ROUNDS * len(BAD_REQUESTS)
        assert server.metric("geosurge_permits_in_use") == 0
        assert "Traceback" not in server.log
    assert log.failures == {}

    assert log.inconsistent({"tiny": expected}) == 0
    # The server had always more to do than it was doing.
    assert searched > 2 * batches
