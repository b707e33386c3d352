"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
from numpy.typing import NDArray

from geosurge.client.attempts import DEFAULT_TIMEOUT_SECONDS, Attempts, RetryPolicy
from geosurge.client.connection import Connection, open_async_channel
from geosurge.client.feeds import AsyncFeed
from geosurge.client.requests import (
    ImageSource,
    Query,
    check_embedding,
    encode_image,
    locate_request,
    path_request,
    stream_entry,
)
from geosurge.client.streams import async_stream_messages, finish_answers, message_to_outcome, read_answers
from geosurge.description import Cell, ServerInfo
from geosurge.errors import GeoSurgeError
from geosurge.location import LocateOptions, Location
from geosurge.v1 import cell_pb2, cell_pb2_grpc, geolocation_pb2, geolocation_pb2_grpc
from geosurge.wire import message_to_cell, message_to_info, response_to_location


class AsyncClient:
    """The client for asyncio; belongs to the event loop that it was made on. See `Client` for what methods raise."""

    def __init__(
        self,
        address: str,
        *,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        retry: RetryPolicy | None = None,
        connection: Connection | None = None,
    ) -> None:
        """As `Client`."""
        self.address = address
        self._timeout_seconds = timeout_seconds
        self._retry = retry or RetryPolicy()
        self._connection = connection or Connection()
        self._channel = open_async_channel(address, self._connection)
        self._geolocation: Any = geolocation_pb2_grpc.GeolocationServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._cells: Any = cell_pb2_grpc.CellServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        """Ends the connection and every call on it."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def locate(
        self,
        image: ImageSource,
        options: LocateOptions | None = None,
        *,
        index_version: str = "",
        timeout_seconds: float | None = None,
    ) -> Location:
        """Locates one image; see `Client.locate`."""
        request = locate_request(await asyncio.to_thread(encode_image, image), options, index_version)
        return response_to_location(await self._call(self._geolocation.Locate, request, timeout_seconds))

    async def locate_embedding(
        self,
        embedding: NDArray[np.floating[Any]],
        options: LocateOptions | None = None,
        *,
        index_version: str = "",
        timeout_seconds: float | None = None,
    ) -> Location:
        """Locates an embedding; see `Client.locate_embedding`."""
        request = locate_request(check_embedding(embedding), options, index_version)
        return response_to_location(await self._call(self._geolocation.Locate, request, timeout_seconds))

    async def locate_many(
        self,
        queries: Iterable[Query] | AsyncIterable[Query],
        options: LocateOptions | None = None,
        *,
        index_version: str = "",
        window: int = 64,
        timeout_seconds: float | None = None,
    ) -> AsyncIterator[Location | GeoSurgeError]:
        """Locates many over one stream; see `Client.locate_many`. The queries may come asynchronously."""
        timeout = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        limit = (await self.get_info(timeout_seconds=timeout)).max_image_bytes
        feed = AsyncFeed(queries, lambda query: stream_entry(query, options, index_version, limit), window)
        attempts = Attempts(self.address, self._connection, self._retry, timeout)
        stream: Any = None
        results: deque[geolocation_pb2.LocateResult] = deque()
        try:
            while (entry := await feed.head()) is not None:
                if entry.error is not None:
                    await feed.pop()
                    yield entry.error
                    continue
                try:
                    stream = stream or self._geolocation.LocateStream(async_stream_messages(feed.requests()))
                    while not results:
                        results.extend((await read_answers(stream, attempts.remaining_seconds)).results)
                except grpc.RpcError as error:
                    stream = None
                    await asyncio.sleep(attempts.pause_after(error))
                    continue
                await feed.pop()
                attempts.succeed()
                yield message_to_outcome(results.popleft())
            if stream is not None:
                await finish_answers(stream)
        finally:
            feed.close()
            if stream is not None:
                stream.cancel()

    async def get_info(self, *, timeout_seconds: float | None = None) -> ServerInfo:
        """Describes the server; see `Client.get_info`."""
        return message_to_info(
            await self._call(self._geolocation.GetInfo, geolocation_pb2.GetInfoRequest(), timeout_seconds)
        )

    async def cell(self, token: str, level: int | None = None, *, index_version: str = "") -> Cell:
        """Reads a cell; see `Client.cell`."""
        request = cell_pb2.GetCellRequest(token=token, level=level, index_version=index_version)
        response = await self._call(self._cells.GetCell, request, None)
        return message_to_cell(response.cell, response.index_version)

    async def children(
        self, token: str = "", level: int | None = None, *, index_version: str = ""
    ) -> AsyncIterator[Cell]:
        """Yields the children of a cell; see `Client.children`."""
        request = cell_pb2.ListChildrenRequest(token=token, level=level, index_version=index_version)
        while True:
            response = await self._call(self._cells.ListChildren, request, None)
            for cell in response.cells:
                yield message_to_cell(cell, response.index_version)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    async def path(self, latitude_deg: float, longitude_deg: float, *, index_version: str = "") -> tuple[Cell, ...]:
        """Cells that hold a coordinate; see `Client.path`."""
        request = path_request(latitude_deg, longitude_deg, index_version)
        response = await self._call(self._cells.GetPath, request, None)
        return tuple(message_to_cell(cell, response.index_version) for cell in response.cells)

    async def _call(self, method: Any, request: Any, timeout_seconds: float | None) -> Any:  # noqa: ANN401
        timeout = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        attempts = Attempts(self.address, self._connection, self._retry, timeout)
        while True:
            try:
                return await method(request, timeout=attempts.remaining_seconds)
            except grpc.RpcError as error:
                pause = attempts.pause_after(error)
            await asyncio.sleep(pause)
