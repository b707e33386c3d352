from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.servers import embedding, encoded_image

from geosurge.bundle import open_bundle
from geosurge.errors import (
    DeadlineExceededError,
    GeoSurgeError,
    ImageNotDecodableError,
    IndexVersionUnknownError,
    InputError,
    ShuttingDownError,
)
from geosurge.location import LocateOptions, Location
from geosurge.locator import Locator
from geosurge.server.batcher import Batcher
from geosurge.server.handle import VersionHandle
from geosurge.server.metrics import Metrics

OPTIONS = LocateOptions()


class RecordingLocator(Locator):
    """A locator that remembers the size of each batch, and fails when it is told to."""

    def locate_embeddings(
        self, embeddings: NDArray[np.float32], options: Sequence[LocateOptions]
    ) -> list[Location | InputError]:
        self.__dict__.setdefault("batch_sizes", []).append(len(embeddings))
        if self.__dict__.pop("fails", False):
            raise RuntimeError("the stage broke")
        return super().locate_embeddings(embeddings, options)


@pytest.fixture
def handle(bundle: Path) -> VersionHandle:
    return VersionHandle("tiny", RecordingLocator.open(bundle))


def batch_sizes(handle: VersionHandle) -> list[int]:
    return list(handle.locator.__dict__.get("batch_sizes", []))


@asynccontextmanager
async def started(max_batch_size: int = 8, metrics: Metrics | None = None) -> AsyncIterator[Batcher]:
    batcher = Batcher(max_batch_size=max_batch_size, decode_workers=2, metrics=metrics)
    batcher.start()
    try:
        yield batcher
    finally:
        await batcher.stop()


@asynccontextmanager
async def busy(batcher: Batcher, stage: str = "search") -> AsyncIterator[None]:
    """Keeps a stage busy inside the block, so that requests queue."""
    begun, release = threading.Event(), threading.Event()

    def block() -> None:
        begun.set()
        release.wait(10)

    blocking = {"encode": batcher._encode, "search": batcher._search}[stage].call(block)
    await asyncio.to_thread(begun.wait, 10)
    try:
        yield
    finally:
        release.set()
        await asyncio.wrap_future(blocking)


async def queued(batcher: Batcher, count: int) -> None:
    while batcher.queue_length < count:
        await asyncio.sleep(0.001)


def place_of(location: Location) -> tuple[str, float, float]:
    return location.path[-1].token, location.latitude_deg, location.longitude_deg


async def test_together_is_the_same_as_one_at_a_time(handle: VersionHandle) -> None:
    queries = [embedding(seed) if seed % 2 else encoded_image(seed) for seed in range(50)]
    async with started() as batcher:
        together = await asyncio.gather(*(batcher.locate(handle, query, OPTIONS) for query in queries))
        alone = [await batcher.locate(handle, query, OPTIONS) for query in queries]
    assert max(batch_sizes(handle)) > 1
    for one, other in zip(together, alone, strict=True):
        assert one.path[-1].token == other.path[-1].token
        assert one.probability == pytest.approx(other.probability, rel=1e-3)


async def test_what_queued_while_the_owner_was_busy_goes_in_one_batch_up_to_the_largest(
    handle: VersionHandle,
) -> None:
    async with started(max_batch_size=8) as batcher:
        async with busy(batcher):
            tasks = [asyncio.create_task(batcher.locate(handle, embedding(seed), OPTIONS)) for seed in range(20)]
            await queued(batcher, 20)
        await asyncio.gather(*tasks)
    assert batch_sizes(handle) == [8, 8, 4]


async def test_a_cancelled_member_leaves_its_batch_without_hurting_it(handle: VersionHandle) -> None:
    async with started() as batcher:
        async with busy(batcher):
            tasks = [asyncio.create_task(batcher.locate(handle, embedding(seed), OPTIONS)) for seed in range(5)]
            await queued(batcher, 5)
            tasks[1].cancel()
            tasks[4].cancel()
            await asyncio.sleep(0)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(answer, Location) for answer in answers] == [True, False, True, True, False]
    assert batch_sizes(handle) == [3]


async def test_the_owner_goes_on_when_everybody_in_the_queue_has_gone(handle: VersionHandle) -> None:
    async with started() as batcher:
        async with busy(batcher):
            tasks = [asyncio.create_task(batcher.locate(handle, embedding(seed), OPTIONS)) for seed in range(3)]
            await queued(batcher, 3)
            for task in tasks:
                task.cancel()
            await asyncio.sleep(0)
        assert isinstance(await batcher.locate(handle, embedding(9), OPTIONS), Location)


async def test_an_expired_item_is_dropped_before_any_work(handle: VersionHandle) -> None:
    async with started() as batcher:
        async with busy(batcher):
            soon = time.monotonic() + 0.01
            late = asyncio.create_task(batcher.locate(handle, embedding(0), OPTIONS, deadline=soon))
            in_time = asyncio.create_task(batcher.locate(handle, embedding(1), OPTIONS))
            await queued(batcher, 2)
            await asyncio.sleep(0.02)
        with pytest.raises(DeadlineExceededError):
            await late
        assert isinstance(await in_time, Location)
        with pytest.raises(DeadlineExceededError):
            await batcher.locate(handle, encoded_image(0), OPTIONS, deadline=time.monotonic())
    assert batch_sizes(handle) == [1]


async def test_a_failing_stage_fails_its_batch_and_not_the_next(
    handle: VersionHandle, caplog: pytest.LogCaptureFixture
) -> None:
    async with started() as batcher:
        handle.locator.__dict__["fails"] = True
        async with busy(batcher):
            tasks = [asyncio.create_task(batcher.locate(handle, embedding(seed), OPTIONS)) for seed in range(3)]
            await queued(batcher, 3)
        failures = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(await batcher.locate(handle, embedding(0), OPTIONS), Location)
    assert {type(failure) for failure in failures} == {GeoSurgeError}
    assert len(set(map(id, failures))) == 3
    assert "the stage broke" not in str(failures[0])
    error_id = str(failures[0]).rsplit(" ", 1)[1]
    assert error_id in [record.__dict__.get("error_id") for record in caplog.records]
    assert "the stage broke" in caplog.text


async def test_a_bad_image_fails_alone(handle: VersionHandle) -> None:
    queries = [encoded_image(1), b"no image at all", encoded_image(2)]
    async with started() as batcher:
        answers = await asyncio.gather(
            *(batcher.locate(handle, query, OPTIONS) for query in queries), return_exceptions=True
        )
    assert [type(answer) for answer in answers] == [Location, ImageNotDecodableError, Location]


async def test_a_batch_never_mixes_versions(handle: VersionHandle, other_bundle: Path) -> None:
    other = VersionHandle("other", RecordingLocator.open(other_bundle))
    handles = [handle, other, other, handle, handle, other]
    async with started() as batcher:
        async with busy(batcher):
            tasks = [
                asyncio.create_task(batcher.locate(which, embedding(seed), OPTIONS))
                for seed, which in enumerate(handles)
            ]
            await queued(batcher, len(tasks))
        answers = await asyncio.gather(*tasks)
    assert [answer.index_version for answer in answers] == [which.name for which in handles]
    assert batch_sizes(handle) == batch_sizes(other) == [3]


async def test_each_item_has_its_own_options(handle: VersionHandle) -> None:
    async with started() as batcher:
        async with busy(batcher):
            tasks = [
                asyncio.create_task(batcher.locate(handle, embedding(0), LocateOptions(top_k=k))) for k in (1, 2, 3)
            ]
            await queued(batcher, 3)
        answers = await asyncio.gather(*tasks)
    assert [len(answer.alternatives) for answer in answers] == [1, 2, 3]
    assert batch_sizes(handle) == [3]


async def test_timings_account_for_the_whole_wait(handle: VersionHandle) -> None:
    async with started() as batcher:
        async with busy(batcher, "encode"):
            begun = time.perf_counter()
            task = asyncio.create_task(batcher.locate(handle, encoded_image(0), OPTIONS))
            await queued(batcher, 1)
            await asyncio.sleep(0.05)
        timings = (await task).timings
        elapsed_ms = 1000 * (time.perf_counter() - begun)
    assert timings.queue_ms >= 50
    stages = (timings.decode_ms, timings.encode_ms, timings.search_ms, timings.posterior_ms)
    assert all(stage > 0 for stage in stages)
    assert timings.queue_ms + sum(stages) <= elapsed_ms


async def test_stopping_answers_the_queue_and_refuses_what_comes_later(handle: VersionHandle) -> None:
    batcher = Batcher(max_batch_size=2, decode_workers=1)
    batcher.start()
    async with busy(batcher):
        tasks = [asyncio.create_task(batcher.locate(handle, embedding(seed), OPTIONS)) for seed in range(5)]
        await queued(batcher, 5)
        stopping = asyncio.create_task(batcher.stop())
        await asyncio.sleep(0.01)
    assert all(isinstance(answer, Location) for answer in await asyncio.gather(*tasks))
    await stopping
    with pytest.raises(ShuttingDownError):
        await batcher.locate(handle, embedding(0), OPTIONS)
    with pytest.raises(ShuttingDownError):
        batcher.between_batches(lambda: None)
    await batcher.stop()


async def test_what_fails_between_batches_is_raised_to_its_caller_alone(handle: VersionHandle) -> None:
    async with started() as batcher:
        with pytest.raises(ZeroDivisionError):
            await asyncio.wrap_future(batcher.between_batches(lambda: 1 // 0))
        name = await asyncio.wrap_future(batcher.between_batches(lambda: threading.current_thread().name))
        assert name == "geosurge-encode"
        assert isinstance(await batcher.locate(handle, embedding(0), OPTIONS), Location)


async def test_images_are_encoded_while_embeddings_are_searched(handle: VersionHandle) -> None:
    async with started() as batcher:
        async with busy(batcher, "search"):
            image = asyncio.create_task(batcher.locate(handle, encoded_image(1), OPTIONS))
            while not len(batcher._search):
                await asyncio.sleep(0.001)
        assert (await image).timings.encode_ms > 0


async def test_versions_with_one_encoder_share_its_batches(bundle: Path) -> None:
    first = VersionHandle("tiny", RecordingLocator.open(bundle))
    second = VersionHandle("second", Locator.assemble(open_bundle(bundle), first.locator.encoder))
    metrics = Metrics()
    async with started(metrics=metrics) as batcher:
        async with busy(batcher, "encode"):
            tasks = [
                asyncio.create_task(batcher.locate(which, encoded_image(seed), OPTIONS))
                for seed, which in enumerate([first, second, first, second])
            ]
            await queued(batcher, 4)
        await asyncio.gather(*tasks)
    assert metrics.registry.get_sample_value("geosurge_batch_size_count", {"stage": "encode"}) == 1
    assert metrics.registry.get_sample_value("geosurge_batch_size_count", {"stage": "search"}) == 2


async def test_a_crashed_stage_is_told_and_leaves_nobody_waiting(handle: VersionHandle) -> None:
    async with started() as batcher:
        async with busy(batcher):
            task = asyncio.create_task(batcher.locate(handle, embedding(0), OPTIONS))
            await queued(batcher, 1)
            waiting = batcher._search.call(lambda: None)
            batcher._search.__dict__["_step"] = lambda: 1 // 0
        assert await asyncio.wait_for(batcher.crashed(), 10) == "search"
        with pytest.raises(GeoSurgeError):
            await task
        assert waiting.cancelled()
        with pytest.raises(ShuttingDownError):
            await batcher.locate(handle, embedding(0), OPTIONS)


async def test_what_is_encoded_after_the_search_has_crashed_is_refused(handle: VersionHandle) -> None:
    async with started() as batcher:
        async with busy(batcher, "encode"):
            task = asyncio.create_task(batcher.locate(handle, encoded_image(1), OPTIONS))
            await queued(batcher, 1)
            batcher._search.__dict__["_step"] = lambda: 1 // 0
            await batcher.locate(handle, embedding(0), OPTIONS)
            assert await asyncio.wait_for(batcher.crashed(), 10) == "search"
        with pytest.raises(ShuttingDownError):
            await asyncio.wait_for(task, 10)
        assert await asyncio.wait_for(asyncio.wrap_future(batcher.between_batches(lambda: "alive")), 10) == "alive"


async def test_the_batch_that_crashes_a_stage_is_answered(handle: VersionHandle) -> None:
    async with started() as batcher:
        batcher._search._work = lambda batch: 1 // 0
        with pytest.raises(GeoSurgeError, match="ending"):
            await asyncio.wait_for(batcher.locate(handle, embedding(0), OPTIONS), 10)
        assert await asyncio.wait_for(batcher.crashed(), 10) == "search"


async def test_a_version_is_closed_only_when_no_thread_works_with_it(handle: VersionHandle) -> None:
    with handle.use():
        closing = asyncio.create_task(asyncio.to_thread(handle.close))
        await asyncio.sleep(0.05)
        assert not closing.done()
    await asyncio.wait_for(closing, 10)
    with pytest.raises(IndexVersionUnknownError), handle.use():
        pytest.fail("it is closed")
