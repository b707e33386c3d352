"""Answers concurrent requests in batches, in three stages: decode, encode, search.

| stage | runs on | works on |
|---|---|---|
| decode | a pool of threads | one image, so that a bad one fails alone |
| encode | a thread | images that queued while it was busy, of one encoder |
| search | a thread (for a lone image, the encoding one) | embeddings that queued while it was busy, of one version |

FAISS and CUDA each want a single thread at a time. A stage that is free takes what is there, up to the largest batch
(of a large encoder on the CPU: what keeps the cores busy), without waiting for more to come. What comes next is decoded
and what came before is searched meanwhile. The permits of `geosurge.server.admission` bound what is queued in all
stages together.

Encoding on the CPU wants the cores that decode. There the two take turns, each on all cores: what has arrived is
decoded, and then encoded in one batch. Side by side, batches are small and the one disturbs the other. A decoded image
waits for those that are being decoded, twice as long as the last batch took, and decoding for the end of a batch;
both for `MAX_TURN_SECONDS` at most.

A request that was cancelled, or whose deadline has passed, is left out when a batch is formed, and an answer that
nobody waits for any more is dropped without touching the others. When work on a batch fails, its items fail, and the
stage goes on with the next. A stage that cannot work at all any more, or hangs, has crashed: `Batcher.crashed` says so,
and the process has to end.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from geosurge.encoder.model import ImageEncoder
from geosurge.errors import DeadlineExceededError, GeoSurgeError, ShuttingDownError
from geosurge.location import LocateOptions, Location
from geosurge.server.failures import log_unexpected
from geosurge.server.handle import VersionHandle
from geosurge.server.metrics import Metrics

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

MAX_TURN_SECONDS: Final = 0.05
"""For how long a batch and the decoding wait for each other at most: a large photo, or an encoder, may take longer."""


@dataclass(eq=False)
class _Item:
    """One request on its way: an image, then its canonical pixels, then its embedding."""

    handle: VersionHandle
    options: LocateOptions
    answer: asyncio.Future[Location]
    deadline: float
    arrived_at: float
    image: bytes | None = None
    decode_ms: float = 0.0
    encode_ms: float = 0.0
    encoder: ImageEncoder | None = None
    pixels: NDArray[np.uint8] | None = None
    embedding: NDArray[np.float32] | None = None


@dataclass(frozen=True, eq=False)
class _Call:
    """A function that waits for its turn between two batches."""

    function: Callable[[], Any]
    future: Future[Any]

    def run(self) -> None:
        if self.future.set_running_or_notify_cancel():
            try:
                self.future.set_result(self.function())
            except BaseException as error:  # noqa: BLE001
                self.future.set_exception(error)


class _Stage:
    """A thread that works on whatever queued while it was busy."""

    def __init__(
        self,
        name: str,
        work: Callable[[list[_Item]], None],
        *,
        group: Callable[[_Item], object],
        reject: Callable[[list[_Item], GeoSurgeError], None],
        crashed: Callable[[str], None],
        batch_size: Callable[[_Item], int],
        gather_seconds: float = 0.0,
    ) -> None:
        """Prepares the thread.

        Args:
            name: Name of the stage.
            work: Works on one batch; must not raise.
            group: Key of an item; all items of a batch have the identical object as their key.
            reject: Ends items with an error.
            crashed: Called with the name when the thread ends without having been asked to.
            batch_size: Most items of a batch that begins with this one.
            gather_seconds: For how long an item waits at most for those that are expected.
        """
        self.name = name
        self._work = work
        self._group = group
        self._reject = reject
        self._crashed = crashed
        self._batch_size = batch_size
        self._gather_seconds = gather_seconds
        self._changed = threading.Condition()
        self._queue: deque[_Item] = deque()
        self._expected: set[_Item] = set()
        self._last_seconds = math.inf
        self._calls: deque[_Call] = deque()
        self._stopping = False
        self._working = threading.Lock()
        self._busy_since = math.inf
        self._thread = threading.Thread(target=self._run, name=f"geosurge-{name}", daemon=True)

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def busy_seconds(self) -> float:
        """For how long it has worked on what it works on; 0 when it waits."""
        return max(0.0, time.monotonic() - self._busy_since)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def expect(self, item: _Item) -> None:
        """Says that an item is on its way."""
        with self._changed:
            self._expected.add(item)

    def expect_no_longer(self, item: _Item) -> None:
        """Says that an item will not come."""
        with self._changed:
            self._expected.discard(item)
            if self._queue and not self._expected:
                self._changed.notify()

    def put(self, items: Sequence[_Item]) -> None:
        """Queues items.

        Raises:
            ShuttingDownError: The stage has been stopped; those that were expected are so still.
        """
        with self._changed:
            self._check_open()
            self._expected.difference_update(items)
            is_first = not self._queue
            self._queue.extend(items)
            if is_first or self._is_ready:
                self._changed.notify()

    def work_now(self, items: list[_Item]) -> bool:
        """Works on items at once and on the calling thread, unless the stage works or has work; says whether it did."""
        if self._queue or self._stopping or not self._working.acquire(blocking=False):
            return False
        try:
            self._busy_since = time.monotonic()
            self._work(items)
            self._busy_since = math.inf
        except BaseException as error:  # noqa: BLE001
            self._reject(items, _crashed())
            self._crash(error)
        finally:
            self._working.release()
        return True

    def call(self, function: Callable[[], _Result]) -> Future[_Result]:
        """Runs a function on the thread, before the next batch.

        Raises:
            ShuttingDownError: The stage has been stopped.
        """
        call = _Call(function, Future())
        with self._changed:
            self._check_open()
            self._calls.append(call)
            self._changed.notify()
        return call.future

    def stop(self) -> None:
        """Works on what is queued, then ends the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _check_open(self) -> None:
        if self._stopping:
            raise _stopping()

    def _run(self) -> None:
        try:
            while self._step():
                pass
        except BaseException as error:  # noqa: BLE001
            self._crash(error)

    def _crash(self, error: BaseException) -> None:
        """Says that the stage cannot work any more, and refuses what it has and what will come."""
        logger.critical("stage crashed", extra={"stage": self.name}, exc_info=error)
        with self._changed:
            self._stopping = True
            queue, self._queue = list(self._queue), deque()
            calls, self._calls = list(self._calls), deque()
            self._changed.notify()
        for call in calls:
            call.future.cancel()
        self._reject(queue, _crashed())
        self._crashed(self.name)

    def _step(self) -> bool:
        """Does one piece of work; false when there will be no more.

        A method of its own, so that between two pieces of work no local keeps a version alive.
        """
        call: _Call | None = None
        batch: list[_Item] = []
        expired: list[_Item] = []
        with self._changed:
            self._wait()
            if self._calls:
                call = self._calls.popleft()
            elif self._queue:
                batch, expired = self._take_batch()
            else:
                return False
        with self._working:
            begun = self._busy_since = time.monotonic()
            if call:
                call.run()
            if expired:
                self._reject(expired, _expired())
            if batch:
                try:
                    self._work(batch)
                except BaseException:
                    self._reject(batch, _crashed())
                    raise
                self._last_seconds = time.monotonic() - begun
            self._busy_since = math.inf
        return True

    @property
    def _is_ready(self) -> bool:
        """Whether there is a batch that waits for nothing."""
        return bool(self._queue) and (not self._expected or len(self._queue) >= self._batch_size(self._queue[0]))

    def _wait(self) -> None:
        """Waits for work, and a batch for what is expected.

        For longer than two batches take, waiting costs more than it saves; what is slow is not waited for again.
        """
        give_up = math.inf
        while not (self._calls or self._stopping or self._is_ready):
            now = time.perf_counter()
            if self._queue and give_up == math.inf:
                give_up = now + min(self._gather_seconds, 2 * self._last_seconds)
            if now >= give_up:
                late = [item for item in self._expected if now - item.arrived_at > self._gather_seconds]
                self._expected.difference_update(late)
                return
            self._changed.wait(None if give_up == math.inf else give_up - now)

    def _take_batch(self) -> tuple[list[_Item], list[_Item]]:
        """Takes the oldest item and what can go with it; also what has expired. Cancelled ones are dropped."""
        now = time.monotonic()
        batch: list[_Item] = []
        expired: list[_Item] = []
        others: list[_Item] = []
        while self._queue and (not batch or len(batch) < self._batch_size(batch[0])):
            item = self._queue.popleft()
            if item.answer.done():
                continue
            if item.deadline <= now:
                expired.append(item)
            elif batch and self._group(item) is not self._group(batch[0]):
                others.append(item)
            else:
                batch.append(item)
        self._queue.extendleft(reversed(others))
        return batch, expired


class Batcher:
    """Owns the stages; `locate` belongs to the event loop that called `start`."""

    def __init__(self, *, max_batch_size: int, decode_workers: int, device: str = "cpu", metrics: Metrics) -> None:
        self._metrics = metrics
        self._takes_turns = device == "cpu"
        self._turn_begun = 0.0
        self._may_decode = threading.Event()
        self._may_decode.set()
        self._decoders = ThreadPoolExecutor(decode_workers, thread_name_prefix="geosurge-decode")
        self._readers = ThreadPoolExecutor(decode_workers, thread_name_prefix="geosurge-read")
        self._encode = _Stage(
            "encode",
            self._encode_batch,
            group=lambda item: item.encoder,
            reject=self._reject,
            crashed=self._crash,
            batch_size=lambda item: _encoder_of(item).useful_batch_size(max_batch_size),
            gather_seconds=MAX_TURN_SECONDS if self._takes_turns else 0.0,
        )
        self._search = _Stage(
            "search",
            self._search_batch,
            group=lambda item: item.handle,
            reject=self._reject,
            crashed=self._crash,
            batch_size=lambda _: max_batch_size,
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._crashes: asyncio.Future[str] | None = None

    @property
    def queue_length(self) -> int:
        """Requests that wait for a batch."""
        return len(self._encode) + len(self._search)

    def start(self) -> None:
        """Starts the threads; call it on the event loop that requests come from."""
        self._loop = asyncio.get_running_loop()
        self._crashes = self._loop.create_future()
        self._encode.start()
        self._search.start()

    async def crashed(self) -> str:
        """Waits until a stage has ended without having been asked to, or hangs, and names it."""
        assert self._crashes is not None
        return await asyncio.shield(self._crashes)

    def check(self, max_seconds: float) -> None:
        """Counts a stage as crashed that has worked on one thing for longer than that."""
        for stage in (self._encode, self._search):
            if stage.busy_seconds > max_seconds and self._crashes is not None and not self._crashes.done():
                logger.critical("stage hangs", extra={"stage": stage.name, "seconds": round(stage.busy_seconds, 1)})
                self._crash(stage.name)

    async def stop(self) -> None:
        """Answers what is queued, then ends the threads; calling it again does nothing."""
        await asyncio.to_thread(self._stop)

    async def locate(
        self,
        handle: VersionHandle,
        query: bytes | NDArray[np.float32],
        options: LocateOptions,
        *,
        deadline: float = math.inf,
    ) -> Location:
        """Locates one image or embedding.

        Args:
            handle: Version that answers; the caller keeps it acquired until this returns.
            query: An encoded image, or an embedding of shape (d,).
            options: How it is located.
            deadline: Moment of `time.monotonic` after which the answer is worthless.

        Returns:
            The answer, with the time of each stage.

        Raises:
            InputError: The image, the embedding or an option cannot be used.
            DeadlineExceededError: The deadline passed before the work began.
            ShuttingDownError: The batcher has been stopped.
            GeoSurgeError: A stage failed; the message holds the id under which it was logged.
        """
        answer: asyncio.Future[Location] = asyncio.get_running_loop().create_future()
        item = _Item(handle, options, answer, deadline, time.perf_counter())
        try:
            if isinstance(query, bytes):
                item.encoder, item.image = handle.locator.encoder, query
                location = await self._locate_image(item)
            else:
                # What else can be wrong is found by the search; these two would cost others time, or an answer.
                if options.region_tokens:
                    await self.in_reader(_validate, handle, options)
                if len(query) != handle.locator.manifest.dimension:
                    handle.locator.normalise_embedding(query)
                item.embedding = query
                self._search.put([item])
                location = await answer
        finally:
            # An error holds the frames that it came through. With the item in one of them, it would hold itself.
            del item, answer
        self._metrics.stage("queue", location.timings.queue_ms / 1000)
        return location

    async def _locate_image(self, item: _Item) -> Location:
        self._encode.expect(item)
        try:
            decoding = self._decoders.submit(self._decode, item)
        except RuntimeError as error:
            self._encode.expect_no_longer(item)
            raise _stopping() from error
        try:
            return await item.answer
        finally:
            # A caller that is gone leaves its place in the decoders' queue, but not its image.
            if decoding.cancel():
                self._encode.expect_no_longer(item)
            item.image = None
            del item, decoding

    async def in_reader(self, function: Callable[..., _Result], *arguments: Any) -> _Result:  # noqa: ANN401
        """Runs a function that reads the tree, and would block the event loop for too long, on a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, function, *arguments)

    def between_batches(self, function: Callable[[], _Result]) -> Future[_Result]:
        """Runs a function that computes with all cores on the encoding thread, before the next batch.

        Raises:
            ShuttingDownError: The batcher has been stopped.
        """
        return self._encode.call(function)

    def _stop(self) -> None:
        # In the order of the data: what the first stage still encodes goes through the second.
        self._encode.stop()
        self._search.stop()
        self._decoders.shutdown(wait=True)
        self._readers.shutdown(wait=True)

    def _decode(self, item: _Item) -> None:
        if item.image is not None:
            self._may_decode.wait(max(0.0, self._turn_begun + MAX_TURN_SECONDS - time.perf_counter()))
        try:
            _decode(item)
            self._encode.put([item])
        except GeoSurgeError as error:
            self._encode.expect_no_longer(item)
            # Without its traceback, whose frames hold the image.
            self._reject([item], error)
        except Exception as error:  # noqa: BLE001 - the service logs it under the request's id
            self._encode.expect_no_longer(item)
            self._deliver([item], [error])
        else:
            self._metrics.stage("decode", item.decode_ms / 1000)

    def _encode_batch(self, batch: list[_Item]) -> None:
        begun = time.perf_counter()
        try:
            pixels = np.stack([item.pixels for item in batch if item.pixels is not None])
            if self._takes_turns:
                self._turn_begun = begun
                self._may_decode.clear()
            try:
                embeddings = _encoder_of(batch[0]).encode(pixels)
            finally:
                self._may_decode.set()
        except Exception as error:  # noqa: BLE001
            self._reject(batch, _batch_error(error, "encode", batch))
            _check_encoder(batch[0])
            return
        seconds = time.perf_counter() - begun
        for item, embedding in zip(batch, embeddings, strict=True):
            item.embedding, item.pixels, item.encode_ms = embedding, None, 1000 * seconds
        # Waking another thread takes as long as searching with one embedding.
        if len(batch) > 1 or not self._search.work_now(batch):
            try:
                self._search.put(batch)
            except ShuttingDownError as error:
                self._reject(batch, error)
        self._metrics.stage("encode", seconds)
        self._metrics.batch("encode", len(batch))

    def _search_batch(self, batch: list[_Item]) -> None:
        begun = time.perf_counter()
        try:
            embeddings = np.stack([item.embedding for item in batch if item.embedding is not None])
            with batch[0].handle.use() as locator:
                outcomes = locator.locate_embeddings(embeddings, [item.options for item in batch])
        except Exception as error:  # noqa: BLE001
            self._reject(batch, _batch_error(error, "search", batch))
            _check_search(batch[0])
            return
        seconds = time.perf_counter() - begun
        self._deliver(
            batch,
            [
                _with_timings(item, outcome, begun) if isinstance(outcome, Location) else outcome
                for item, outcome in zip(batch, outcomes, strict=True)
            ],
        )
        self._metrics.stage("search", seconds)
        self._metrics.batch("search", len(batch))

    def _reject(self, items: list[_Item], error: GeoSurgeError) -> None:
        # An exception that several tasks raise would collect the tracebacks of all.
        self._deliver(items, [type(error)(str(error)) for _ in items])

    def _deliver(self, batch: Sequence[_Item], outcomes: Sequence[Location | Exception]) -> None:
        def resolve() -> None:
            for item, outcome in zip(batch, outcomes, strict=True):
                if item.answer.done():
                    continue
                if isinstance(outcome, Exception):
                    item.answer.set_exception(outcome)
                else:
                    item.answer.set_result(outcome)

        self._on_loop(resolve)

    def _crash(self, stage: str) -> None:
        def resolve() -> None:
            if self._crashes is not None and not self._crashes.done():
                self._crashes.set_result(stage)

        self._on_loop(resolve)

    def _on_loop(self, function: Callable[[], None]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:
            logger.warning("the event loop ended before everything was answered")


def _decode(item: _Item) -> None:
    image = item.image
    if image is None or time.monotonic() >= item.deadline:
        raise _expired()
    with item.handle.use() as locator:
        locator.validate_options(item.options)
        begun = time.perf_counter()
        item.pixels = locator.preprocess(image)
    item.decode_ms = 1000 * (time.perf_counter() - begun)


def _encoder_of(item: _Item) -> ImageEncoder:
    assert item.encoder is not None
    return item.encoder


def _validate(handle: VersionHandle, options: LocateOptions) -> None:
    with handle.use() as locator:
        locator.validate_options(options)


def _check_encoder(item: _Item) -> None:
    """After a failure: raises what the encoder raises for a black image, as it would for every batch to come."""
    assert item.pixels is not None
    _encoder_of(item).encode(np.zeros_like(item.pixels)[np.newaxis])


def _check_search(item: _Item) -> None:
    """After a failure: raises what the index raises for any query, as it would for every batch to come."""
    with item.handle.use() as locator:
        locator.locate_embeddings(np.ones((1, locator.manifest.dimension), np.float32), [LocateOptions()])


def _batch_error(error: Exception, stage: str, batch: Sequence[_Item]) -> GeoSurgeError:
    """The error that the items of a batch are told: also of one raised on purpose, which none of them has caused."""
    return log_unexpected(error, stage=stage, size=len(batch), index_version=batch[0].handle.name)


def _with_timings(item: _Item, location: Location, search_begun: float) -> Location:
    queue_ms = 1000 * (search_begun - item.arrived_at) - item.decode_ms - item.encode_ms
    timings = replace(location.timings, decode_ms=item.decode_ms, queue_ms=queue_ms, encode_ms=item.encode_ms)
    return replace(location, timings=timings)


def _stopping() -> ShuttingDownError:
    return ShuttingDownError("the server is stopping; send the request again, to another one")


def _crashed() -> GeoSurgeError:
    return GeoSurgeError("the engine failed and is ending; send the request again, to another one")


def _expired() -> DeadlineExceededError:
    return DeadlineExceededError("the deadline passed before the work began; allow more time or send less at once")
