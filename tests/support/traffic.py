"""Clients that ask without pause while something happens to their server, and what they saw."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import count, cycle
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from support.answers import Query, expected_answers, questions, reason_of, same_answer
from support.processes import ServerProcess, geolocation, index_client, server_process
from support.servers import embedding, encoded_image

from geosurge.client import IndexClient
from geosurge.v1 import geolocation_pb2 as pb

CALL_SECONDS = 60.0
WARM_UP_SWAPS = 10
"""Swaps after which a server has allocated whatever it keeps."""

_STREAM_EVERY = 4
_SAMPLES = 5


@dataclass(frozen=True)
class SwapReport:
    """What clients saw while versions were swapped.

    Attributes:
        calls: Requests that were sent during the swaps, items of streams among them.
        failed_calls: Those that got no answer.
        inconsistent: Answers that no single version gives to their request, or that are another request's.
        swaps: How often another version became the active one.
        answers_by_version: How many answers each version gave.
        failures: Why calls failed, and how often.
        p99_with_ms: 99th percentile of the latency during the swaps.
        p99_without_ms: That of the same clients before them.
        rss_growth: By which part the server's resident memory grew over the swaps after the first `WARM_UP_SWAPS`.
    """

    calls: int
    failed_calls: int
    inconsistent: int
    swaps: int
    answers_by_version: dict[str, int]
    failures: dict[str, int]
    p99_with_ms: float
    p99_without_ms: float
    rss_growth: float


@dataclass
class Log:
    """What clients saw; equal answers to one question are kept once."""

    seconds: list[float] = field(default_factory=list)
    answers: Counter[tuple[int, bytes]] = field(default_factory=Counter)
    mixed_up: int = 0
    failures: Counter[str] = field(default_factory=Counter)

    def answered(self, number: int, request_id: str, response: pb.LocateResponse, seconds: float) -> None:
        """Notes the answer to a question."""
        self.seconds.append(seconds)
        self.mixed_up += response.request_id != request_id
        response.ClearField("request_id")
        response.ClearField("timings")
        self.answers[number, response.SerializeToString(deterministic=True)] += 1

    @property
    def calls(self) -> int:
        """Requests that were sent."""
        return len(self.seconds) + self.failures.total()

    def p99_ms(self) -> float:
        """99th percentile of the latencies of those that were answered."""
        return 1000 * float(np.percentile(self.seconds, 99)) if self.seconds else float("nan")

    def by_version(self) -> Counter[str]:
        """How many answers each version gave."""
        versions: Counter[str] = Counter()
        for (_, content), times in self.answers.items():
            versions[pb.LocateResponse.FromString(content).index_version] += times
        return versions

    def inconsistent(self, expected: dict[str, list[pb.LocateResponse]]) -> int:
        """Answers that are not wholly what their version gives to their question."""
        wrong = self.mixed_up
        for (number, content), times in self.answers.items():
            answer = pb.LocateResponse.FromString(content)
            known = expected.get(answer.index_version)
            if known is None or not same_answer(answer, known[number]):
                wrong += times
        return wrong


def default_queries() -> list[Query]:
    """Images and embeddings for the tiny bundles."""
    return [
        query
        for seed in range(16)
        for query in (encoded_image(seed), encoded_image(100 + seed, "JPEG"), embedding(seed))
    ]


def swap_under_load(
    store: Path,
    names: Sequence[str],
    clients: int = 16,
    seconds: float = 60.0,
    swap_every: float = 1.0,
    *,
    quiet_seconds: float = 10.0,
    queries: Sequence[Query] | None = None,
    **settings: object,
) -> SwapReport:
    """Has clients ask a server without pause, first in peace, then while its active version changes.

    Each swap loads the next version, where it is not loaded, activates it, and unloads the one before. A quarter of the
    clients use streams. Every answer is compared with what the bundles answer when they are opened here, afterwards.

    Args:
        store: Where the versions are; one of them is active.
        names: The versions, which become active in turn.
        clients: How many clients, each with a connection of its own.
        seconds: How long versions are swapped.
        swap_every: Time from one swap to the next.
        quiet_seconds: How long the clients ask before.
        queries: What they ask for; by default `default_queries`.
        **settings: The server's settings.

    Raises:
        GeoSurgeError: A version could not be loaded, activated or unloaded.
    """
    queries = default_queries() if queries is None else queries
    with server_process(store, **settings) as server:
        quiet, busy, memory = asyncio.run(
            _swap(
                server,
                names,
                questions(queries),
                clients,
                max(round(seconds / swap_every), 1),
                swap_every,
                quiet_seconds,
            )
        )
    expected = {name: expected_answers(store / name, queries) for name in names}
    after, end = memory[WARM_UP_SWAPS:][:_SAMPLES] or memory[:1], memory[-_SAMPLES:]
    return SwapReport(
        calls=busy.calls,
        failed_calls=busy.failures.total() + quiet.failures.total(),
        inconsistent=busy.inconsistent(expected) + quiet.inconsistent(expected),
        swaps=len(memory),
        answers_by_version=dict(busy.by_version()),
        failures=dict(busy.failures + quiet.failures),
        p99_with_ms=busy.p99_ms(),
        p99_without_ms=quiet.p99_ms(),
        rss_growth=statistics.median(end) / statistics.median(after) - 1.0,
    )


@contextlib.asynccontextmanager
async def load(address: str, asked: Sequence[pb.LocateRequest], clients: int) -> AsyncIterator[Log]:
    """Has clients ask a server without pause inside the ``with`` block; every fourth one uses a stream.

    All has been answered when the block is left.

    Args:
        address: ``host:port`` of the server.
        asked: Requests; every client asks all of them in turn, each client from another one on.
        clients: How many.
    """
    log, over = Log(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for client in range(clients):
            ask = _ask_in_stream if client % _STREAM_EVERY == _STREAM_EVERY - 1 else _ask
            group.create_task(ask(address, asked, client, log, over))
        try:
            yield log
        finally:
            over.set()


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel with a connection of its own."""
    return grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])


async def _swap(
    server: ServerProcess,
    names: Sequence[str],
    asked: Sequence[pb.LocateRequest],
    clients: int,
    swaps: int,
    swap_every: float,
    quiet_seconds: float,
) -> tuple[Log, Log, list[int]]:
    async with load(server.address, asked, clients):
        # Nobody is interested in the first seconds of any process.
        await asyncio.sleep(min(quiet_seconds, 2.0))
    async with load(server.address, asked, clients) as quiet:
        await asyncio.sleep(quiet_seconds)
    memory: list[int] = []
    with index_client(server) as index:
        async with load(server.address, asked, clients) as busy:
            begun = time.monotonic()
            active = _active(await asyncio.to_thread(index.versions))
            turns = cycle(names)
            while len(memory) < swaps:
                name = next(turns)
                if name == active:
                    continue
                await asyncio.to_thread(_exchange, index, active, name)
                active = name
                memory.append(server.resident_bytes())
                await asyncio.sleep(max(begun + len(memory) * swap_every - time.monotonic(), 0))
    return quiet, busy, memory


def _active(versions: Sequence[Any]) -> str:
    return next(version.name for version in versions if version.state == "active")


def _exchange(index: IndexClient, old: str, new: str) -> None:
    index.activate(new)
    index.unload(old)


async def _ask(address: str, asked: Sequence[pb.LocateRequest], client: int, log: Log, over: asyncio.Event) -> None:
    async with open_channel(address) as channel:
        stub = geolocation(channel)
        for turn in count(client):
            if over.is_set():
                return
            number, request = turn % len(asked), pb.LocateRequest()
            request.CopyFrom(asked[number])
            request.request_id = f"{client}-{turn}"
            begun = time.perf_counter()
            try:
                response = await stub.Locate(request, timeout=CALL_SECONDS)
            except grpc.aio.AioRpcError as error:
                log.failures[f"{error.code().name} {reason_of(error)}: {error.details()}"] += 1
            else:
                log.answered(number, request.request_id, response, time.perf_counter() - begun)


async def _ask_in_stream(
    address: str, asked: Sequence[pb.LocateRequest], client: int, log: Log, over: asyncio.Event
) -> None:
    async with open_channel(address) as channel:
        call = geolocation(channel).LocateStream()
        try:
            for turn in count(client):
                if over.is_set():
                    break
                number, item = turn % len(asked), pb.LocateStreamRequest()
                request = item.requests.add()
                request.CopyFrom(asked[number])
                request.request_id = f"{client}-{turn}"
                begun = time.perf_counter()
                await call.write(item)
                [answer] = (await asyncio.wait_for(call.read(), CALL_SECONDS)).results
                if answer.HasField("response"):
                    log.answered(number, request.request_id, answer.response, time.perf_counter() - begun)
                else:
                    log.failures[f"item: {answer.status.message}"] += 1
            await call.done_writing()
            if await call.read() is not grpc.aio.EOF:
                log.failures["a stream had more answers than items"] += 1
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError) as error:
            log.failures[f"stream: {error}"] += 1
