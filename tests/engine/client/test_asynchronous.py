from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.clients import ended_streams, free_port, queries, without_timings
from support.servers import background_server, embedding, encoded_image, settings_for

from geosurge.client import AsyncClient, Client, Query, RetryPolicy
from geosurge.errors import DeadlineExceededError, ImageEmptyError, InputNotReadableError, ServiceError
from geosurge.location import Location


async def test_an_asynchronous_stream_outlasts_it_too_and_ends_at_its_timeout(bundle: Path) -> None:
    port = free_port()
    retry = RetryPolicy(max_attempts=2, first_pause_seconds=0.05)
    with ExitStack() as first, ExitStack() as second:
        address = first.enter_context(background_server(settings_for(bundle, port=port)))
        starting = threading.Timer(1, lambda: second.enter_context(background_server(settings_for(bundle, port=port))))

        async def send() -> AsyncIterator[Query]:
            for number in range(30):
                if number == 10:
                    await asyncio.to_thread(first.close)
                    starting.start()
                if number == 20:
                    await asyncio.to_thread(second.close)
                yield embedding(number)

        answers = []
        async with AsyncClient(address, retry=retry) as client:
            with pytest.raises((ServiceError, DeadlineExceededError)):  # noqa: PT012
                async for answer in client.locate_many(send(), window=4, timeout_seconds=10):
                    answers.append(answer)  # noqa: PERF401
        starting.join()
        assert [type(answer) for answer in answers] == [Location] * 20


async def test_an_answered_asynchronous_stream_counts_as_a_call_that_succeeded(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "geosurge.server.interceptors")
    async with AsyncClient(address) as client:
        for seed in range(60):
            assert len([answer async for answer in client.locate_many([encoded_image(seed)])]) == 1
    assert await asyncio.to_thread(ended_streams, caplog, 60) == ["OK"] * 60


async def test_the_asynchronous_client_does_the_same(address: str, tmp_path: Path) -> None:
    sent, expected = queries(tmp_path)

    async def asynchronous() -> AsyncIterator[Query]:
        for query in sent:
            yield query

    with Client(address) as blocking:
        async with AsyncClient(address) as client:
            for source in (sent, asynchronous()):
                assert [type(answer) async for answer in client.locate_many(source, window=7)] == expected
            async for _ in client.locate_many(embedding(seed) for seed in range(1000)):
                break
            located = await client.locate(encoded_image(1))
            assert without_timings(located) == without_timings(blocking.locate(encoded_image(1)))
            assert (await client.locate_embedding(embedding(1))).index_version == "tiny"
            assert await client.get_info() == blocking.get_info()
            top = [cell async for cell in client.children()]
            assert top == list(blocking.children())
            assert await client.cell(top[0].token) == top[0]
            mean = top[0].mean
            assert await client.path(mean.latitude_deg, mean.longitude_deg) == blocking.path(
                mean.latitude_deg, mean.longitude_deg
            )
            with pytest.raises(ImageEmptyError):
                await client.locate(b"")
            with pytest.raises(InputNotReadableError):
                await client.locate("missing.jpg")


async def test_the_asynchronous_client_reports_a_server_that_stays_away() -> None:
    async with AsyncClient(f"127.0.0.1:{free_port()}", retry=RetryPolicy(max_attempts=2)) as client:
        with pytest.raises(ServiceError, match="cannot be reached"):
            await client.get_info()
