"""The service that locates. Every call takes one version handle and answers from it alone."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import geosurge
from geosurge.errors import (
    GeoSurgeError,
    QueryMissingError,
    ShuttingDownError,
    StreamLimitError,
)
from geosurge.location import MAX_BEAM_WIDTH, MAX_TOP_K
from geosurge.locator import MAX_REGION_TOKENS
from geosurge.server.admission import Admission, Permit, peer_address
from geosurge.server.batcher import Batcher
from geosurge.server.conversions import (
    check_request_id,
    check_version_name,
    message_to_options,
    request_to_id,
    request_to_query,
)
from geosurge.server.failures import exception_to_error
from geosurge.server.handle import VersionHandle
from geosurge.server.interceptors import current_call
from geosurge.server.versions import Versions
from geosurge.settings import ServerSettings
from geosurge.v1 import geolocation_pb2, geolocation_pb2_grpc
from geosurge.wire import error_to_status, location_to_response

_RESPONSE_BYTES: Final = 1 << 16
"""A message of a stream takes no further result when it has so many."""


class _StreamEnd:
    """Ends a stream that has been answered."""


# What a stream's writer is handed, in order: an item's task, or how the stream ends.
_Answer = asyncio.Task[geolocation_pb2.LocateResult] | GeoSurgeError | _StreamEnd


class GeolocationService(geolocation_pb2_grpc.GeolocationServiceServicer):
    """Locates images and embeddings."""

    def __init__(
        self,
        settings: ServerSettings,
        versions: Versions,
        batcher: Batcher,
        admission: Admission,
        stopping: asyncio.Event,
    ) -> None:
        self._settings = settings
        self._versions = versions
        self._batcher = batcher
        self._admission = admission
        self._stopping = stopping

    async def Locate(  # noqa: N802
        self,
        request: geolocation_pb2.LocateRequest,
        context: Any,  # noqa: ANN401
    ) -> geolocation_pb2.LocateResponse:
        """Locates one image or embedding; refused at once when no permit is free."""
        request_id = request_to_id(request)
        current_call().request_id = request_id
        with self._admission.take(peer_address(context)):
            return await self._locate(request, request_id, _deadline(context))

    async def LocateStream(  # noqa: N802
        self,
        requests: AsyncIterator[geolocation_pb2.LocateStreamRequest],
        context: Any,  # noqa: ANN401
    ) -> None:
        """Locates many, answering in order; waits for permits, so that the client is slowed down instead of refused.

        When the server stops, what was taken from the stream is answered and the stream then ends with SHUTTING_DOWN.
        """
        call = current_call()
        call.item_count = 0
        deadline = _deadline(context)
        answers: asyncio.Queue[_Answer] = asyncio.Queue()
        window = asyncio.Semaphore(self._settings.max_stream_window)
        async with asyncio.TaskGroup() as group:
            read = self._read(requests, group, answers, window, deadline=deadline, peer=peer_address(context))
            reading = group.create_task(read)
            watching = group.create_task(self._end_when_stopping(reading))
            answer: _Answer | None = await answers.get()
            while isinstance(answer, asyncio.Task):
                results, answer = await _ready_results(answer, answers)
                call.item_count += len(results)
                await context.write(geolocation_pb2.LocateStreamResponse(results=results))
                for _ in results:
                    window.release()
                answer = answer or await answers.get()
            watching.cancel()
        if isinstance(answer, GeoSurgeError):
            raise answer

    async def GetInfo(  # noqa: N802
        self,
        request: geolocation_pb2.GetInfoRequest,  # noqa: ARG002
        context: Any,  # noqa: ANN401, ARG002
    ) -> geolocation_pb2.GetInfoResponse:
        """Describes the server and its active version."""
        with self._versions.acquire() as handle:
            current_call().index_version = handle.name
            return info_message(handle, self._settings)

    async def _locate(
        self, request: geolocation_pb2.LocateRequest, request_id: str, deadline: float
    ) -> geolocation_pb2.LocateResponse:
        check_request_id(request_id)
        options = message_to_options(request.options)
        query = request_to_query(request)
        with self._versions.acquire(check_version_name(request.options.index_version), request_id) as handle:
            current_call().index_version = handle.name
            location = await self._batcher.locate(handle, query, options, deadline=deadline)
        return location_to_response(location, request_id)

    async def _locate_item(
        self, request: geolocation_pb2.LocateRequest, deadline: float
    ) -> geolocation_pb2.LocateResult:
        request_id = request_to_id(request)
        try:
            response = await self._locate(request, request_id, deadline)
        except Exception as exception:  # noqa: BLE001
            call = current_call()
            error = call.private_paths.hide(exception_to_error(exception, request_id))
            call.item_failed(error.reason)
            status = error_to_status(error, {"request_id": request_id})
            return geolocation_pb2.LocateResult(request_id=request_id, status=status)
        return geolocation_pb2.LocateResult(request_id=request_id, response=response)

    async def _read(
        self,
        requests: AsyncIterator[geolocation_pb2.LocateStreamRequest],
        group: asyncio.TaskGroup,
        answers: asyncio.Queue[_Answer],
        window: asyncio.Semaphore,
        *,
        deadline: float,
        peer: str,
    ) -> None:
        """Turns requests into tasks, in order, as permits and the window allow; then says how the stream ends."""
        end: GeoSurgeError | _StreamEnd = _StreamEnd()
        limit = self._settings.max_stream_items
        count = 0
        try:
            async for message in requests:
                if not message.requests:
                    raise QueryMissingError("a message of the stream holds no request; put at least one into each")
                for request in message.requests:
                    if count == limit:
                        raise StreamLimitError(
                            f"the stream has had {limit} items, as many as it may; open another for the rest"
                        )
                    count += 1
                    await window.acquire()
                    permit = await self._admission.wait(peer)
                    task = group.create_task(self._locate_item(request, deadline))
                    # A task that is cancelled before its first step runs none of its own code.
                    task.add_done_callback(_releaser(permit))
                    answers.put_nowait(task)
        except asyncio.CancelledError:
            if not self._stopping.is_set():
                raise
            end = ShuttingDownError("the server is stopping; send what was not answered again, to another one")
        except GeoSurgeError as error:
            end = error
        answers.put_nowait(end)

    async def _end_when_stopping(self, reading: asyncio.Task[None]) -> None:
        await self._stopping.wait()
        reading.cancel()


async def _ready_results(
    first: asyncio.Task[geolocation_pb2.LocateResult], answers: asyncio.Queue[_Answer]
) -> tuple[list[geolocation_pb2.LocateResult], _Answer | None]:
    """Waits for a result and takes those after it that are ready; also what was taken off the queue and is not."""
    results = [await first]
    size = results[0].ByteSize()
    while size < _RESPONSE_BYTES and not answers.empty():
        answer = answers.get_nowait()
        if not (isinstance(answer, asyncio.Task) and answer.done()):
            return results, answer
        results.append(answer.result())
        size += results[-1].ByteSize()
    return results, None


def info_message(handle: VersionHandle, settings: ServerSettings) -> geolocation_pb2.GetInfoResponse:
    """Describes a server with these settings that serves this version."""
    manifest = handle.locator.manifest
    response = geolocation_pb2.GetInfoResponse(
        engine_version=geosurge.__version__,
        index_version=handle.name,
        domain=_sentences(
            f"Locates: {manifest.domain.can}",
            f"Not: {manifest.domain.cannot}",
            f"Trained on: {manifest.domain.training}",
        ),
        dimension=manifest.dimension,
        levels=[geolocation_pb2.LevelInfo(level=level.level, cell_count=level.cells) for level in manifest.levels],
        encoder_sha256="" if manifest.encoder is None else manifest.encoder.sha256,
        image_formats=handle.locator.limits.formats if manifest.encoder is not None else (),
        limits=geolocation_pb2.Limits(
            max_image_bytes=settings.max_image_bytes,
            max_image_pixels=settings.max_image_pixels,
            min_image_side_px=handle.locator.limits.min_side_px,
            max_top_k=MAX_TOP_K,
            max_beam_width=MAX_BEAM_WIDTH,
            max_region_tokens=MAX_REGION_TOKENS,
            max_batch_size=settings.max_batch_size,
            max_concurrent_requests=settings.max_concurrent_requests,
            max_requests_per_peer=settings.max_requests_per_peer,
            max_stream_items=settings.max_stream_items,
        ),
        default_beam_width=manifest.default_beam_width,
    )
    response.index_create_time.FromDatetime(manifest.create_time)
    return response


def _sentences(*parts: str) -> str:
    return " ".join(f"{part.rstrip(' .')}." for part in parts)


def _deadline(context: Any) -> float:  # noqa: ANN401
    """Moment of `time.monotonic` at which the call's deadline passes; infinite without one."""
    remaining = context.time_remaining()
    return math.inf if remaining is None else time.monotonic() + remaining


def _releaser(permit: Permit) -> Callable[[object], None]:
    def release(_task: object) -> None:
        permit.release()

    return release
