from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
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
from geosurge.server import batcher as batcher_module
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

    def preprocess(self, data: bytes) -> NDArray[np.uint8]:
        gate: Gate | None = self.__dict__.get("gates", {}).get(data)
        if gate is not None:
            gate.pass_through()
        return super().preprocess(data)


class Gate:
    """Holds the thread that comes to it until it is opened."""

    def __init__(self) -> None:
        self._reached, self._opened = threading.Event(), threading.Event()

    def pass_through(self) -> None:
        self._reached.set()
        self._opened.wait(60)

    def open(self) -> None:
        self._opened.set()

    @property
    def is_reached(self) -> bool:
        return self._reached.is_set()

    async def reached(self) -> None:
        assert await asyncio.to_thread(self._reached.wait, 10)


@pytest.fixture
def handle(bundle: Path) -> VersionHandle:
    return VersionHandle("tiny", RecordingLocator.open(bundle))


def batch_sizes(handle: VersionHandle) -> list[int]:
    return list(handle.locator.__dict__.get("batch_sizes", []))


@asynccontextmanager
async def started(
    max_batch_size: int = 8, metrics: Metrics | None = None, decode_workers: int = 2, device: str = "cpu"
) -> AsyncIterator[Batcher]:
    batcher = Batcher(
        max_batch_size=max_batch_size, decode_workers=decode_workers, device=device, metrics=metrics or Metrics()
    )
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


async def expected(batcher: Batcher, count: int) -> None:
    while len(batcher._encode._expected) != count:
        await asyncio.sleep(0.001)


@contextmanager
def slow_decoding(handle: VersionHandle, image: bytes) -> Iterator[Gate]:
    """Holds the decoding of an image until the gate is opened, or the block ends."""
    gate = Gate()
    handle.locator.__dict__.setdefault("gates", {})[image] = gate
    try:
        yield gate
    finally:
        gate.open()


@contextmanager
def slow_encoding(handle: VersionHandle, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Holds every encoding until the gate is opened, or the block ends."""
    gate = Gate()
    encode = handle.locator.encoder.encode

    def slow(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        gate.pass_through()
        return encode(pixels)

    monkeypatch.setattr(handle.locator.encoder, "encode", slow)
    try:
        yield gate
    finally:
        gate.open()


@pytest.fixture
def long_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns so long that a test which waits for their end fails."""
    monkeypatch.setattr(batcher_module, "MAX_TURN_SECONDS", 60.0)


def encoded_batches(metrics: Metrics) -> tuple[float | None, float | None]:
    """Number of batches that were encoded, and of images in them."""
    count, images = (
        metrics.registry.get_sample_value(f"geosurge_batch_size_{name}", {"stage": "encode"})
        for name in ("count", "sum")
    )
    return count, images


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


async def test_a_large_encoder_gets_the_batches_that_it_wants(
    handle: VersionHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handle.locator.encoder, "useful_batch_size", lambda limit: min(limit, 3))
    metrics = Metrics()
    async with started(max_batch_size=8, metrics=metrics) as batcher:
        async with busy(batcher, "encode"):
            tasks = [asyncio.create_task(batcher.locate(handle, encoded_image(seed), OPTIONS)) for seed in range(7)]
            await queued(batcher, 7)
        await asyncio.gather(*tasks)
    assert encoded_batches(metrics) == (3, 7)


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
    batcher = Batcher(max_batch_size=2, decode_workers=1, metrics=Metrics())
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
        batcher._search.__dict__["_work"] = lambda batch: 1 // 0
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


@pytest.mark.usefixtures("long_turns")
async def test_images_whose_decoding_ends_at_different_times_are_encoded_together(handle: VersionHandle) -> None:
    slow_image, metrics = encoded_image(0), Metrics()
    async with started(metrics=metrics) as batcher:
        with slow_decoding(handle, slow_image):
            tasks = [
                asyncio.create_task(batcher.locate(handle, image, OPTIONS))
                for image in (slow_image, encoded_image(1), encoded_image(2))
            ]
            await asyncio.wait_for(queued(batcher, 2), 10)
            await asyncio.sleep(0.05)
            assert batcher.queue_length == 2
        await asyncio.wait_for(asyncio.gather(*tasks), 10)
    assert encoded_batches(metrics) == (1, 3)
    assert batcher._encode._expected == set()


async def test_an_image_does_not_wait_for_one_whose_decoding_takes_longer_than_a_turn(handle: VersionHandle) -> None:
    slow_image, metrics = encoded_image(0), Metrics()
    async with started(metrics=metrics) as batcher:
        with slow_decoding(handle, slow_image) as decoding:
            slow = asyncio.create_task(batcher.locate(handle, slow_image, OPTIONS))
            await decoding.reached()
            assert isinstance(await asyncio.wait_for(batcher.locate(handle, encoded_image(1), OPTIONS), 10), Location)
            assert not slow.done()
        assert isinstance(await asyncio.wait_for(slow, 10), Location)
    assert encoded_batches(metrics) == (2, 2)
    assert batcher._encode._expected == set()


@pytest.mark.usefixtures("long_turns")
async def test_a_full_batch_waits_for_nobody(handle: VersionHandle) -> None:
    slow_image, metrics = encoded_image(0), Metrics()
    async with started(max_batch_size=2, decode_workers=3, metrics=metrics) as batcher:
        with slow_decoding(handle, slow_image) as decoding:
            slow = asyncio.create_task(batcher.locate(handle, slow_image, OPTIONS))
            await decoding.reached()
            fast = (batcher.locate(handle, encoded_image(seed), OPTIONS) for seed in (1, 2))
            await asyncio.wait_for(asyncio.gather(*fast), 10)
            assert not slow.done()
        await asyncio.wait_for(slow, 10)
    assert encoded_batches(metrics) == (2, 3)


@pytest.mark.usefixtures("long_turns")
async def test_work_between_batches_waits_for_no_image(handle: VersionHandle) -> None:
    slow_image = encoded_image(0)
    async with started() as batcher:
        with slow_decoding(handle, slow_image) as decoding:
            tasks = [
                asyncio.create_task(batcher.locate(handle, image, OPTIONS)) for image in (slow_image, encoded_image(1))
            ]
            await decoding.reached()
            await asyncio.wait_for(queued(batcher, 1), 10)
            await asyncio.wait_for(asyncio.wrap_future(batcher.between_batches(lambda: None)), 10)
            assert batcher.queue_length == 1
        await asyncio.wait_for(asyncio.gather(*tasks), 10)


@pytest.mark.usefixtures("long_turns")
async def test_stopping_does_not_wait_for_the_end_of_a_turn(handle: VersionHandle) -> None:
    slow_image = encoded_image(0)
    async with started() as batcher:
        with slow_decoding(handle, slow_image) as decoding:
            slow, fast = (
                asyncio.create_task(batcher.locate(handle, image, OPTIONS)) for image in (slow_image, encoded_image(1))
            )
            await decoding.reached()
            await asyncio.wait_for(queued(batcher, 1), 10)
            stopping = asyncio.create_task(batcher.stop())
            assert isinstance(await asyncio.wait_for(fast, 10), Location)
        with pytest.raises(ShuttingDownError):
            await asyncio.wait_for(slow, 10)
        await asyncio.wait_for(stopping, 10)
    assert batcher._encode._expected == set()


@pytest.mark.usefixtures("long_turns")
async def test_an_image_that_cannot_be_decoded_is_expected_no_longer(handle: VersionHandle) -> None:
    bad_image, metrics = b"no image at all", Metrics()
    async with started(metrics=metrics) as batcher:
        with slow_decoding(handle, bad_image) as decoding:
            bad, good = (
                asyncio.create_task(batcher.locate(handle, image, OPTIONS)) for image in (bad_image, encoded_image(1))
            )
            await decoding.reached()
            await asyncio.wait_for(queued(batcher, 1), 10)
        with pytest.raises(ImageNotDecodableError):
            await asyncio.wait_for(bad, 10)
        assert isinstance(await asyncio.wait_for(good, 10), Location)
    assert encoded_batches(metrics) == (1, 1)
    assert batcher._encode._expected == set()


@pytest.mark.usefixtures("long_turns")
async def test_an_image_whose_caller_went_before_it_was_decoded_is_expected_no_longer(handle: VersionHandle) -> None:
    slow_image, metrics = encoded_image(0), Metrics()
    async with started(decode_workers=1, metrics=metrics) as batcher:
        with slow_decoding(handle, slow_image) as decoding:
            first, gone, last = (
                asyncio.create_task(batcher.locate(handle, image, OPTIONS))
                for image in (slow_image, encoded_image(1), encoded_image(2))
            )
            await decoding.reached()
            await asyncio.wait_for(expected(batcher, 3), 10)
            gone.cancel()
            await asyncio.wait_for(expected(batcher, 2), 10)
        await asyncio.wait_for(asyncio.gather(first, last), 10)
        assert gone.cancelled()
    assert encoded_batches(metrics) == (1, 2)
    assert batcher._encode._expected == set()


@pytest.mark.usefixtures("long_turns")
async def test_an_image_whose_caller_went_while_it_was_decoded_is_expected_no_longer(handle: VersionHandle) -> None:
    slow_image, metrics = encoded_image(0), Metrics()
    async with started(metrics=metrics) as batcher:
        with slow_decoding(handle, slow_image) as decoding:
            gone, other = (
                asyncio.create_task(batcher.locate(handle, image, OPTIONS)) for image in (slow_image, encoded_image(1))
            )
            await decoding.reached()
            await asyncio.wait_for(queued(batcher, 1), 10)
            gone.cancel()
            await asyncio.sleep(0)
        assert isinstance(await asyncio.wait_for(other, 10), Location)
        assert gone.cancelled()
    assert encoded_batches(metrics) == (1, 1)
    assert batcher._encode._expected == set()


@pytest.mark.usefixtures("long_turns")
async def test_what_arrives_while_a_batch_is_encoded_is_decoded_afterwards(
    handle: VersionHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    late_image = encoded_image(1)
    async with started() as batcher:
        with slow_decoding(handle, late_image) as decoding, slow_encoding(handle, monkeypatch) as encoding:
            decoding.open()
            early = asyncio.create_task(batcher.locate(handle, encoded_image(0), OPTIONS))
            await encoding.reached()
            late = asyncio.create_task(batcher.locate(handle, late_image, OPTIONS))
            await asyncio.sleep(0.1)
            assert not decoding.is_reached
        await asyncio.wait_for(asyncio.gather(early, late), 10)
        assert decoding.is_reached


async def test_decoding_does_not_wait_for_an_encoder_that_takes_longer_than_a_turn(
    handle: VersionHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    late_image = encoded_image(1)
    async with started() as batcher:
        with slow_decoding(handle, late_image) as decoding, slow_encoding(handle, monkeypatch) as encoding:
            early = asyncio.create_task(batcher.locate(handle, encoded_image(0), OPTIONS))
            await encoding.reached()
            late = asyncio.create_task(batcher.locate(handle, late_image, OPTIONS))
            await decoding.reached()
            assert not early.done()
        await asyncio.wait_for(asyncio.gather(early, late), 10)


@pytest.mark.usefixtures("long_turns")
async def test_decoding_goes_on_after_an_encoder_has_failed(
    handle: VersionHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = handle.locator.encoder.encode

    def fail_once(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        monkeypatch.setattr(handle.locator.encoder, "encode", encode)
        assert not batcher._may_decode.is_set()
        raise RuntimeError("the encoder broke")

    async with started() as batcher:
        monkeypatch.setattr(handle.locator.encoder, "encode", fail_once)
        with pytest.raises(GeoSurgeError, match="the server logged the cause"):
            await asyncio.wait_for(batcher.locate(handle, encoded_image(0), OPTIONS), 10)
        assert batcher._may_decode.is_set()
        assert isinstance(await asyncio.wait_for(batcher.locate(handle, encoded_image(1), OPTIONS), 10), Location)
    assert batcher._encode._expected == set()


@pytest.mark.usefixtures("long_turns")
async def test_beside_a_gpu_decoding_and_encoding_wait_for_nothing(
    handle: VersionHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_image, late_image = encoded_image(0), encoded_image(2)
    async with started(device="cuda") as batcher:
        with (
            slow_decoding(handle, slow_image) as decoding,
            slow_decoding(handle, late_image) as late_decoding,
            slow_encoding(handle, monkeypatch) as encoding,
        ):
            slow = asyncio.create_task(batcher.locate(handle, slow_image, OPTIONS))
            await decoding.reached()
            fast = asyncio.create_task(batcher.locate(handle, encoded_image(1), OPTIONS))
            await encoding.reached()
            assert batcher._may_decode.is_set()
            late = asyncio.create_task(batcher.locate(handle, late_image, OPTIONS))
            await late_decoding.reached()
            encoding.open()
            assert isinstance(await asyncio.wait_for(fast, 10), Location)
            assert not slow.done()
            assert not late.done()
        await asyncio.wait_for(asyncio.gather(slow, late), 10)
    assert batcher._encode._expected == set()


async def test_a_lone_image_is_searched_where_it_was_encoded_unless_others_are_being_searched(
    handle: VersionHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    locate = handle.locator.locate_embeddings

    def locate_and_tell(
        embeddings: NDArray[np.float32], options: Sequence[LocateOptions]
    ) -> list[Location | InputError]:
        threads.append(threading.current_thread().name)
        return locate(embeddings, options)

    monkeypatch.setattr(handle.locator, "locate_embeddings", locate_and_tell)
    async with started() as batcher:
        await batcher.locate(handle, encoded_image(0), LocateOptions())
        await batcher.locate(handle, embedding(0), LocateOptions())
        async with busy(batcher):
            waiting = asyncio.create_task(batcher.locate(handle, encoded_image(1), LocateOptions()))
            while not len(batcher._search):
                await asyncio.sleep(0.01)
        await waiting
    assert threads == ["geosurge-encode", "geosurge-search", "geosurge-search"]


async def test_an_image_that_failed_is_not_kept_by_its_own_error(handle: VersionHandle) -> None:
    gc.collect()
    gc.disable()
    try:
        async with started() as batcher:
            for query in (b"garbage", encoded_image(0)[:-900]):
                with pytest.raises(InputError):
                    await batcher.locate(handle, query, OPTIONS)
        assert [kept for kept in gc.get_objects() if type(kept).__name__ == "_Item"] == []
    finally:
        gc.enable()


async def test_a_slow_image_is_waited_for_once(handle: VersionHandle) -> None:
    slow_image = encoded_image(0)
    async with started() as batcher:
        with slow_decoding(handle, slow_image) as decoding:
            slow = asyncio.create_task(batcher.locate(handle, slow_image, OPTIONS))
            await decoding.reached()
            await asyncio.wait_for(batcher.locate(handle, encoded_image(1), OPTIONS), 10)
            assert batcher._encode._expected == set()
        await asyncio.wait_for(slow, 10)


async def test_a_search_that_crashes_beside_the_encoder_is_named(
    handle: VersionHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("the search broke")

    monkeypatch.setattr(handle.locator, "locate_embeddings", fail)
    async with started() as batcher:
        with pytest.raises(GeoSurgeError):
            await batcher.locate(handle, encoded_image(0), OPTIONS)
        assert await asyncio.wait_for(batcher.crashed(), 10) == "search"
