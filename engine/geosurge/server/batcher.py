"""Batches concurrent requests through one encoder and one index.

Images are decoded by a pool of threads, one by one, so that a bad one fails alone. Encoding and searching belong to
one owner thread (FAISS and CUDA want a single one); whenever it is free it takes everything that queued while it was
busy, up to the largest batch, without ever waiting for more. What comes next is decoded meanwhile, so that a batch is
ready when the one before it is done.

A batch holds requests of one index version. A request that was cancelled, or whose deadline has passed, is left out
when its batch is formed, and an answer that nobody waits for any more is dropped without touching the others. When a
stage fails, the items of that batch fail, and the owner goes on with the next.
"""

from __future__ import annotations

import asyncio
import io
import logging
import math
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from geosurge.errors import DeadlineExceededError, GeoSurgeError, ShuttingDownError
from geosurge.location import LocateOptions, Location
from geosurge.server.versions import VersionHandle

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


@dataclass(frozen=True, eq=False)
class _Item:
    """One request on its way: canonical pixels to encode, or an embedding to search with."""

    handle: VersionHandle
    options: LocateOptions
    answer: asyncio.Future[Location]
    deadline: float
    arrived_at: float
    decode_ms: float
    pixels: NDArray[np.uint8] | None = None
    embedding: NDArray[np.float32] | None = None


class Batcher:
    """Owns the decoding threads and the owner thread; `locate` belongs to the event loop that called `start`."""

    def __init__(self, *, max_batch_size: int, decode_workers: int) -> None:
        self._max_batch_size = max_batch_size
        self._decoders = ThreadPoolExecutor(decode_workers, thread_name_prefix="geosurge-decode")
        self._owner = threading.Thread(target=self._own, name="geosurge-owner", daemon=True)
        self._changed = threading.Condition()
        self._queue: deque[_Item] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def queue_length(self) -> int:
        """Requests that wait for a batch."""
        return len(self._queue)

    def start(self) -> None:
        """Starts the owner thread; call it on the event loop that requests come from."""
        self._loop = asyncio.get_running_loop()
        self._owner.start()

    async def stop(self) -> None:
        """Answers what is queued, then ends the threads; calling it again does nothing."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        await asyncio.to_thread(self._join)

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
        arrived_at = time.perf_counter()
        answer: asyncio.Future[Location] = asyncio.get_running_loop().create_future()
        if isinstance(query, bytes):
            pixels, decode_ms = await self.in_decoder(_decode, handle, query, options, deadline)
            item = _Item(handle, options, answer, deadline, arrived_at, decode_ms, pixels=pixels)
        else:
            # Only looking up the cells of a region costs enough to leave the event loop for.
            if options.region_tokens:
                await self.in_decoder(handle.locator.validate_options, options)
            else:
                handle.locator.validate_options(options)
            embedding = handle.locator.normalise_embedding(query)
            item = _Item(handle, options, answer, deadline, arrived_at, 0.0, embedding=embedding)
        with self._changed:
            if self._stopping:
                raise ShuttingDownError("the server is stopping; send the request again, to another one")
            self._queue.append(item)
            self._changed.notify()
        return await answer

    async def warm_up(self, handle: VersionHandle) -> None:
        """Sends a grey image through every stage, alone and as the largest batch, so that first requests find it warm.

        A version without an encoder is asked an embedding instead.

        Raises:
            GeoSurgeError: A stage failed.
        """
        await self.locate(handle, _warm_up_query(handle), LocateOptions())
        await self.on_owner(lambda: _warm_up_batch(handle, self._max_batch_size))

    async def in_decoder(self, function: Callable[..., _Result], *arguments: Any) -> _Result:  # noqa: ANN401
        """Runs a function that takes long for an event loop on a decoding thread."""
        return await asyncio.get_running_loop().run_in_executor(self._decoders, function, *arguments)

    async def on_owner(self, function: Callable[[], _Result]) -> _Result:
        """Runs a function on the owner thread, before the next batch: opening, warming up and closing of versions."""
        future: Future[_Result] = Future()

        def call() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:  # noqa: BLE001
                    future.set_exception(error)

        with self._changed:
            if self._stopping:
                raise ShuttingDownError("the batcher has been stopped")
            self._calls.append(call)
            self._changed.notify()
        return await asyncio.wrap_future(future)

    def _join(self) -> None:
        if self._owner.ident is not None:
            self._owner.join()
        self._decoders.shutdown(wait=True)

    def _own(self) -> None:
        while self._step():
            pass

    def _step(self) -> bool:
        """Does one piece of work; false when there will be no more. Its locals die with it, and a version with them."""
        call: Callable[[], None] | None = None
        batch: list[_Item] = []
        expired: list[_Item] = []
        with self._changed:
            while not (self._calls or self._queue or self._stopping):
                self._changed.wait()
            if self._calls:
                call = self._calls.popleft()
            elif self._queue:
                batch, expired = self._take_batch()
            else:
                return False
        if call:
            call()
        if expired:
            self._deliver(expired, [_expired() for _ in expired])
        if batch:
            self._deliver(batch, _run(batch))
        return True

    def _take_batch(self) -> tuple[list[_Item], list[_Item]]:
        """Takes the oldest request and what can go with it; also what has expired. Cancelled ones are dropped."""
        now = time.monotonic()
        batch: list[_Item] = []
        expired: list[_Item] = []
        others: list[_Item] = []
        while self._queue and len(batch) < self._max_batch_size:
            item = self._queue.popleft()
            if item.answer.done():
                continue
            if item.deadline <= now:
                expired.append(item)
            elif batch and item.handle is not batch[0].handle:
                others.append(item)
            else:
                batch.append(item)
        self._queue.extendleft(reversed(others))
        return batch, expired

    def _deliver(self, batch: Sequence[_Item], outcomes: Sequence[Location | GeoSurgeError]) -> None:
        def resolve() -> None:
            for item, outcome in zip(batch, outcomes, strict=True):
                if item.answer.done():
                    continue
                if isinstance(outcome, GeoSurgeError):
                    item.answer.set_exception(outcome)
                else:
                    item.answer.set_result(outcome)

        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(resolve)
        except RuntimeError:
            logger.warning("event loop ended before %d answers were delivered", len(batch))


def _decode(
    handle: VersionHandle, data: bytes, options: LocateOptions, deadline: float
) -> tuple[NDArray[np.uint8], float]:
    if time.monotonic() >= deadline:
        raise _expired()
    handle.locator.validate_options(options)
    begun = time.perf_counter()
    pixels = handle.locator.preprocess(data)
    return pixels, 1000 * (time.perf_counter() - begun)


def _run(batch: Sequence[_Item]) -> list[Location | GeoSurgeError]:
    """Encodes and searches one batch on the owner thread; whatever fails becomes the outcome of each item."""
    begun = time.perf_counter()
    try:
        embeddings, encode_ms = _embed(batch)
        outcomes = batch[0].handle.locator.locate_embeddings(embeddings, [item.options for item in batch])
        return [
            _with_timings(item, outcome, begun, encode_ms) if isinstance(outcome, Location) else outcome
            for item, outcome in zip(batch, outcomes, strict=True)
        ]
    except Exception:
        error_id = uuid.uuid4().hex
        logger.exception(
            "batch failed size=%d index_version=%s error_id=%s", len(batch), batch[0].handle.name, error_id
        )
        message = f"the engine failed while it worked on the batch of this request; the server logged it as {error_id}"
        return [GeoSurgeError(message) for _ in batch]


def _embed(batch: Sequence[_Item]) -> tuple[NDArray[np.float32], float]:
    """Embeddings (n, d) of a batch in its order, and the milliseconds that the encoder took."""
    locator = batch[0].handle.locator
    pixels = [item.pixels for item in batch if item.pixels is not None]
    begun = time.perf_counter()
    encoded = iter(locator.encode(np.stack(pixels)) if pixels else ())
    encode_ms = 1000 * (time.perf_counter() - begun)
    rows = [next(encoded) if item.embedding is None else item.embedding for item in batch]
    return np.ascontiguousarray(np.stack(rows), dtype=np.float32), encode_ms


def _warm_up_query(handle: VersionHandle) -> bytes | NDArray[np.float32]:
    locator = handle.locator
    if locator.manifest.encoder is None:
        return np.ones(locator.manifest.dimension, dtype=np.float32)
    grey = io.BytesIO()
    Image.new("RGB", (256, 256), (128, 128, 128)).save(grey, "PNG")
    return grey.getvalue()


def _warm_up_batch(handle: VersionHandle, size: int) -> None:
    locator, query = handle.locator, _warm_up_query(handle)
    if isinstance(query, bytes):
        embeddings = locator.encode(np.repeat(locator.preprocess(query)[np.newaxis], size, axis=0))
    else:
        embeddings = np.repeat(locator.normalise_embedding(query)[np.newaxis], size, axis=0)
    for outcome in locator.locate_embeddings(embeddings, [LocateOptions()] * size):
        if isinstance(outcome, GeoSurgeError):
            raise outcome


def _with_timings(item: _Item, location: Location, batch_begun: float, encode_ms: float) -> Location:
    queue_ms = 1000 * (batch_begun - item.arrived_at) - item.decode_ms
    timings = replace(
        location.timings,
        decode_ms=item.decode_ms,
        queue_ms=queue_ms,
        encode_ms=encode_ms if item.pixels is not None else 0.0,
    )
    return replace(location, timings=timings)


def _expired() -> DeadlineExceededError:
    return DeadlineExceededError("the deadline passed before the work began; allow more time or send less at once")
