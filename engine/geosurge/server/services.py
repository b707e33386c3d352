"""The services of the public API. Every call takes one version handle and answers from it alone."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import math
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, Final, TypeVar

import geosurge
from geosurge.cells import CellTree
from geosurge.errors import (
    CoordinateOutOfRangeError,
    GeoSurgeError,
    PageInvalidError,
    QueryMissingError,
    ShuttingDownError,
    StreamLimitError,
)
from geosurge.location import MAX_BEAM_WIDTH, MAX_TOP_K
from geosurge.locator import MAX_REGION_TOKENS
from geosurge.server.admission import Admission, Permit
from geosurge.server.batcher import Batcher
from geosurge.server.conversions import (
    check_request_id,
    check_version_name,
    exception_to_error,
    message_to_options,
    request_to_id,
    request_to_query,
)
from geosurge.server.handle import VersionHandle
from geosurge.server.interceptors import current_call
from geosurge.server.versions import Versions
from geosurge.settings import ServerSettings
from geosurge.v1 import cell_pb2, cell_pb2_grpc, geolocation_pb2, geolocation_pb2_grpc
from geosurge.wire import error_to_status, location_to_response

_MAX_PAGE_TOKEN_LENGTH: Final = 4096
"""More than any that the server issues: a version's name, a cell's token and two numbers."""

_Result = TypeVar("_Result")

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
            error = exception_to_error(exception, request_id)
            current_call().item_failed(error.reason)
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


class CellService(cell_pb2_grpc.CellServiceServicer):
    """Reads the cells of an index version. Look-ups touch the disk, so they run on threads of their own.

    A call takes a permit, or is refused at once, as one that locates does: both compete for the same machine.
    """

    def __init__(self, settings: ServerSettings, versions: Versions, batcher: Batcher, admission: Admission) -> None:
        self._settings = settings
        self._versions = versions
        self._batcher = batcher
        self._admission = admission

    async def GetCell(  # noqa: N802
        self,
        request: cell_pb2.GetCellRequest,
        context: Any,  # noqa: ANN401
    ) -> cell_pb2.GetCellResponse:
        """Returns one cell by its token."""
        level = request.level if request.HasField("level") else None
        find = partial(CellTree.find, token=request.token, level=level)
        cell, version = await self._read(context, request.index_version, find)
        return cell_pb2.GetCellResponse(cell=cell, index_version=version)

    async def ListChildren(  # noqa: N802
        self,
        request: cell_pb2.ListChildrenRequest,
        context: Any,  # noqa: ANN401
    ) -> cell_pb2.ListChildrenResponse:
        """Returns a page of the children of a cell, or of the cells of level 1."""
        level = request.level if request.HasField("level") else None
        size = min(request.page_size or self._settings.max_page_size, self._settings.max_page_size)
        start, version = _read_page_token(request)

        def read(tree: CellTree) -> tuple[list[cell_pb2.Cell], bool]:
            child_level, children = _children(tree, request.token, level)
            if not 0 <= start <= len(children):
                raise _page_error()
            page = children[start : start + size]
            return [tree.cell(child_level, ordinal) for ordinal in page], start + size < len(children)

        (cells, more), version = await self._read(context, version, read)
        token = _write_page_token(request, start + size, version) if more else ""
        return cell_pb2.ListChildrenResponse(cells=cells, index_version=version, next_page_token=token)

    async def GetPath(  # noqa: N802
        self,
        request: cell_pb2.GetPathRequest,
        context: Any,  # noqa: ANN401
    ) -> cell_pb2.GetPathResponse:
        """Returns the cells that hold a coordinate."""
        if not request.HasField("coordinate"):
            raise CoordinateOutOfRangeError("the request has no coordinate; set latitude_deg and longitude_deg")
        latitude_deg, longitude_deg = request.coordinate.latitude_deg, request.coordinate.longitude_deg
        path = partial(CellTree.path, latitude_deg=latitude_deg, longitude_deg=longitude_deg)
        cells, version = await self._read(context, request.index_version, path)
        return cell_pb2.GetPathResponse(cells=cells, index_version=version)

    async def _read(
        self,
        context: Any,  # noqa: ANN401
        version: str,
        look_up: Callable[[CellTree], _Result],
    ) -> tuple[_Result, str]:
        name = check_version_name(version)
        with self._admission.take(peer_address(context)), self._versions.acquire(name) as handle:
            current_call().index_version = handle.name
            return await self._batcher.in_reader(_look_up, handle, look_up), handle.name


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


def peer_address(context: Any) -> str:  # noqa: ANN401
    """Who calls: the address without the port."""
    peer: str = context.peer()
    return peer.rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else peer


def _look_up(handle: VersionHandle, look_up: Callable[[CellTree], _Result]) -> _Result:
    with handle.use() as locator:
        return look_up(locator.tree)


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


def _children(tree: CellTree, token: str, level: int | None) -> tuple[int, range]:
    """Level and ordinals of the children of a cell; without a token, of the whole globe."""
    if not token:
        return 1, range(tree.cell_counts[0])
    parent = tree.find(token, level, finest=True)
    return parent.level + 1, tree.children(parent.level, parent.ordinal)


def _write_page_token(request: cell_pb2.ListChildrenRequest, start: int, version: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([version, *_listing(request), start]).encode()).decode()


def _read_page_token(request: cell_pb2.ListChildrenRequest) -> tuple[int, str]:
    """Where a page starts, and the version it is read from: that of the first page, so that pages fit together."""
    if not request.page_token:
        return 0, request.index_version
    if len(request.page_token) > _MAX_PAGE_TOKEN_LENGTH:
        raise _page_error()
    try:
        version, *listing, start = json.loads(base64.b64decode(request.page_token, altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, TypeError, RecursionError) as error:
        raise _page_error() from error
    fits = listing == _listing(request) and request.index_version in ("", version)
    if not (fits and isinstance(version, str) and type(start) is int):
        raise _page_error()
    return start, version


def _listing(request: cell_pb2.ListChildrenRequest) -> list[Any]:
    return [request.token, request.level if request.HasField("level") else None]


def _page_error() -> PageInvalidError:
    return PageInvalidError(
        "page_token was not issued for this cell, level and index version; repeat the request that issued it with "
        "the token added, or start again without one"
    )
