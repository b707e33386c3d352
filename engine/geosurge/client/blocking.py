"""The client that blocks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
from numpy.typing import NDArray

from geosurge.client.attempts import DEFAULT_TIMEOUT_SECONDS, Attempts, RetryPolicy
from geosurge.client.connection import Connection, open_channel
from geosurge.client.feeds import Feed
from geosurge.client.requests import (
    ImageSource,
    Query,
    check_embedding,
    encode_image,
    locate_request,
    path_request,
    stream_entry,
)
from geosurge.client.streams import AnswerStream, message_to_outcome, stream_messages
from geosurge.description import Cell, ServerInfo
from geosurge.errors import GeoSurgeError
from geosurge.location import LocateOptions, Location
from geosurge.v1 import cell_pb2, cell_pb2_grpc, geolocation_pb2, geolocation_pb2_grpc
from geosurge.wire import message_to_cell, message_to_info, response_to_location


class Client:
    """A blocking client; safe to use from many threads at once. Open it after a fork, not before."""

    def __init__(
        self,
        address: str,
        *,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        retry: RetryPolicy | None = None,
        connection: Connection | None = None,
    ) -> None:
        """Prepares a connection, which is made by the first call.

        Args:
            address: ``host:port`` of the server.
            timeout_seconds: Time that a call may take, with its retries.
            retry: When calls are repeated.
            connection: Encryption and credentials; ``None`` is plain text without a token.

        Raises:
            ConfigurationError: A certificate, key or token cannot be used.
        """
        self.address = address
        self._timeout_seconds = timeout_seconds
        self._retry = retry or RetryPolicy()
        self._connection = connection or Connection()
        self.channel = open_channel(address, self._connection)
        self._geolocation: Any = geolocation_pb2_grpc.GeolocationServiceStub(self.channel)  # type: ignore[no-untyped-call]
        self._cells: Any = cell_pb2_grpc.CellServiceStub(self.channel)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Ends the connection and every call on it."""
        self.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def locate(
        self,
        image: ImageSource,
        options: LocateOptions | None = None,
        *,
        index_version: str = "",
        timeout_seconds: float | None = None,
    ) -> Location:
        """Locates one image.

        Args:
            image: The image.
            options: How it is located.
            index_version: Version that must answer; empty means the active one.
            timeout_seconds: Instead of the client's own.

        Raises:
            InputError: The image or an option cannot be used; the class says why.
            OverloadedError: The server is busy; it says when to come back.
            DeadlineExceededError: No answer came in time.
            ServiceError: The server cannot be reached.
        """
        request = locate_request(encode_image(image), options, index_version)
        return response_to_location(self.call(self._geolocation.Locate, request, timeout_seconds))

    def locate_embedding(
        self,
        embedding: NDArray[np.floating[Any]],
        options: LocateOptions | None = None,
        *,
        index_version: str = "",
        timeout_seconds: float | None = None,
    ) -> Location:
        """Locates an embedding (d,) that the server's own encoder made of an image; otherwise as `locate`."""
        request = locate_request(check_embedding(embedding), options, index_version)
        return response_to_location(self.call(self._geolocation.Locate, request, timeout_seconds))

    def locate_many(
        self,
        queries: Iterable[Query],
        options: LocateOptions | None = None,
        *,
        index_version: str = "",
        window: int = 64,
        timeout_seconds: float | None = None,
    ) -> Iterator[Location | GeoSurgeError]:
        """Locates many over one stream.

        The queries are pulled by a thread of their own while answers are being yielded. When the server stops or the
        connection breaks, what was not answered is sent again.

        Args:
            queries: Images or embeddings; they are pulled as the window allows.
            options: How each is located.
            index_version: Version that must answer; empty means the active one.
            window: Queries under way at once, at least 1.
            timeout_seconds: Time that may pass without an answer to a query that was sent.

        Yields:
            The answer to each query in turn, or why it has none. An error here never ends the stream.

        Raises:
            DeadlineExceededError: No answer came in time.
            ServiceError: The server cannot be reached.
        """
        timeout = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        limit = self.get_info(timeout_seconds=timeout).max_image_bytes
        feed = Feed(queries, lambda query: stream_entry(query, options, index_version, limit), window)
        try:
            yield from self._answers(feed, timeout)
        finally:
            feed.close()

    def get_info(self, *, timeout_seconds: float | None = None) -> ServerInfo:
        """Describes the server: limits, active index version, what it can locate."""
        return message_to_info(self.call(self._geolocation.GetInfo, geolocation_pb2.GetInfoRequest(), timeout_seconds))

    def cell(self, token: str, level: int | None = None, *, index_version: str = "") -> Cell:
        """Reads a cell; without a level the coarsest one of this token.

        Raises:
            CellUnknownError: The index has no such cell.
            LevelOutOfRangeError: The index has no such level.
        """
        request = cell_pb2.GetCellRequest(token=token, level=level, index_version=index_version)
        response = self.call(self._cells.GetCell, request, None)
        return message_to_cell(response.cell, response.index_version)

    def children(self, token: str = "", level: int | None = None, *, index_version: str = "") -> Iterator[Cell]:
        """Yields the children of a cell, or the cells of level 1 when no token is given; pages are read as needed.

        Raises:
            CellUnknownError: The index has no such cell.
            LevelOutOfRangeError: The index has no such level.
        """
        request = cell_pb2.ListChildrenRequest(token=token, level=level, index_version=index_version)
        while True:
            response = self.call(self._cells.ListChildren, request, None)
            yield from (message_to_cell(cell, response.index_version) for cell in response.cells)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    def path(self, latitude_deg: float, longitude_deg: float, *, index_version: str = "") -> tuple[Cell, ...]:
        """Cells that hold a coordinate, from level 1 down; ends where the coordinate leaves the partition.

        Raises:
            CoordinateOutOfRangeError: The coordinate is not on the globe.
        """
        response = self.call(self._cells.GetPath, path_request(latitude_deg, longitude_deg, index_version), None)
        return tuple(message_to_cell(cell, response.index_version) for cell in response.cells)

    def call(self, method: Any, request: Any, timeout_seconds: float | None = None) -> Any:  # noqa: ANN401
        """Calls a unary method of a stub on `channel` with the client's timeout and retries.

        Raises:
            GeoSurgeError: What the server refused it with, or why it cannot be reached.
        """
        timeout = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        attempts = Attempts(self.address, self._connection, self._retry, timeout)
        while True:
            try:
                return method(request, timeout=attempts.remaining_seconds)
            except grpc.RpcError as error:
                pause = attempts.pause_after(error)
            time.sleep(pause)

    def _answers(
        self, feed: Feed[Query, geolocation_pb2.LocateRequest], timeout: float
    ) -> Iterator[Location | GeoSurgeError]:
        attempts = Attempts(self.address, self._connection, self._retry, timeout)
        stream: AnswerStream | None = None
        try:
            while (entry := feed.head()) is not None:
                if entry.error is not None:
                    feed.pop()
                    yield entry.error
                    continue
                try:
                    stream = stream or AnswerStream(self._geolocation.LocateStream, stream_messages(feed.requests()))
                    result = stream.read(attempts.remaining_seconds)
                except grpc.RpcError as error:
                    stream = None
                    time.sleep(attempts.pause_after(error))
                    continue
                feed.pop()
                attempts.succeed()
                yield message_to_outcome(result)
            if stream is not None:
                stream.finish()
        finally:
            if stream is not None:
                stream.close()
