"""The Python client: paths, bytes, arrays or embeddings in, dataclasses out.

    with Client("127.0.0.1:50051") as client:
        location = client.locate("view.jpg")
        for answer in client.locate_many(Path("views").glob("*.jpg")):
            ...

`Client` blocks, `AsyncClient` is awaited; they have the same methods. A failed call raises the class of
`geosurge.errors` that the server meant. A call is repeated only when the server was unreachable or stopping
(UNAVAILABLE, or CANCELLED by it), with growing pauses, and never beyond its timeout: all calls only read, so repeating
one is harmless.
What a `Connection` says about TLS and tokens goes for every call.

Importing this module loads neither torch nor FAISS.
"""

from __future__ import annotations

import asyncio
import io
import os
import queue
import random
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias

import grpc
import numpy as np
from google.rpc import status_pb2
from numpy.typing import NDArray

from geosurge.connection import (
    Connection,
    explain_unavailable,
    is_refused_handshake,
    open_async_channel,
    open_channel,
)
from geosurge.description import Cell, ServerInfo
from geosurge.errors import (
    CredentialsMissingError,
    DeadlineExceededError,
    EmbeddingInvalidError,
    GeoSurgeError,
    ImageFormatUnsupportedError,
    ImageTooLargeError,
    InputNotReadableError,
    PermissionDeniedError,
    ServiceError,
)
from geosurge.feeds import AsyncFeed, Entry, Feed
from geosurge.location import LocateOptions, Location
from geosurge.v1 import cell_pb2, cell_pb2_grpc, geolocation_pb2, geolocation_pb2_grpc
from geosurge.wire import (
    message_to_cell,
    message_to_info,
    options_to_message,
    response_to_location,
    status_to_error,
)

if TYPE_CHECKING:
    from PIL import Image

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | NDArray[np.uint8] | Image.Image"
"""A file's path, an encoded image, or pixels: (height, width, 3) uint8 or a Pillow image, which are sent as PNG."""

Query: TypeAlias = "ImageSource | NDArray[np.floating[Any]]"
"""An image, or an embedding of shape (d,)."""

DEFAULT_TIMEOUT_SECONDS: Final = 30.0

_MESSAGE_BYTES: Final = 1 << 16
"""Requests of a stream share a message up to this size; a large image has one for itself."""

_LARGEST_IMAGE_BYTES: Final = 500_000_000
"""No server can be set to accept more, and protobuf itself ends at two gigabytes."""


_UNREACHED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
"""Statuses of calls that the server did not take: gRPC itself cancels those that come in the moment it stops."""


@dataclass(frozen=True)
class RetryPolicy:
    """How often and when a call that never reached the server is repeated.

    Attributes:
        max_attempts: Attempts in all, at least 1. A stream that has had an answer is taken up again until its timeout,
            however many attempts that takes: its address is known to be right, and a restart lasts a while.
        first_pause_seconds: Mean pause before the second attempt; it doubles with each further one.
        longest_pause_seconds: The mean pause at most.
    """

    max_attempts: int = 5
    first_pause_seconds: float = 0.1
    longest_pause_seconds: float = 2.0

    def pause_seconds(self, failed_attempts: int, remaining_seconds: float) -> float | None:
        """Pause before the next attempt, spread by half around the mean; ``None`` when there must be none."""
        if failed_attempts >= self.max_attempts:
            return None
        mean = min(self.first_pause_seconds * 2.0 ** min(failed_attempts - 1, 100), self.longest_pause_seconds)
        # Spread keeps many clients from returning at one moment; nothing secret depends on it.
        pause = mean * random.uniform(0.5, 1.5)  # noqa: S311
        return pause if pause < remaining_seconds else None


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
        request = _locate_request(_encoded(image), options, index_version)
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
        request = _locate_request(_embedding(embedding), options, index_version)
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
        feed = Feed(queries, lambda query: _entry(query, options, index_version, limit), window)
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
        response = self.call(self._cells.GetPath, _path_request(latitude_deg, longitude_deg, index_version), None)
        return tuple(message_to_cell(cell, response.index_version) for cell in response.cells)

    def call(self, method: Any, request: Any, timeout_seconds: float | None = None) -> Any:  # noqa: ANN401
        """Calls a unary method of a stub on `channel` with the client's timeout and retries.

        Raises:
            GeoSurgeError: What the server refused it with, or why it cannot be reached.
        """
        timeout = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        attempts = _Attempts(self.address, self._connection, self._retry, timeout)
        while True:
            try:
                return method(request, timeout=attempts.remaining_seconds)
            except grpc.RpcError as error:
                pause = attempts.pause_after(error)
            time.sleep(pause)

    def _answers(
        self, feed: Feed[Query, geolocation_pb2.LocateRequest], timeout: float
    ) -> Iterator[Location | GeoSurgeError]:
        attempts = _Attempts(self.address, self._connection, self._retry, timeout)
        stream: _Stream | None = None
        try:
            while (entry := feed.head()) is not None:
                if entry.error is not None:
                    feed.pop()
                    yield entry.error
                    continue
                try:
                    stream = stream or _Stream(self._geolocation.LocateStream, _messages(feed.requests()))
                    result = stream.read(attempts.remaining_seconds)
                except grpc.RpcError as error:
                    stream = None
                    time.sleep(attempts.pause_after(error))
                    continue
                feed.pop()
                attempts.succeed()
                yield _outcome(result)
        finally:
            if stream is not None:
                stream.close()


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
        request = _locate_request(await asyncio.to_thread(_encoded, image), options, index_version)
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
        request = _locate_request(_embedding(embedding), options, index_version)
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
        feed = AsyncFeed(queries, lambda query: _entry(query, options, index_version, limit), window)
        attempts = _Attempts(self.address, self._connection, self._retry, timeout)
        stream: Any = None
        results: deque[geolocation_pb2.LocateResult] = deque()
        try:
            while (entry := await feed.head()) is not None:
                if entry.error is not None:
                    await feed.pop()
                    yield entry.error
                    continue
                try:
                    stream = stream or self._geolocation.LocateStream(_async_messages(feed.requests()))
                    while not results:
                        results.extend((await _read(stream, attempts.remaining_seconds)).results)
                except grpc.RpcError as error:
                    stream = None
                    await asyncio.sleep(attempts.pause_after(error))
                    continue
                await feed.pop()
                attempts.succeed()
                yield _outcome(results.popleft())
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
        request = _path_request(latitude_deg, longitude_deg, index_version)
        response = await self._call(self._cells.GetPath, request, None)
        return tuple(message_to_cell(cell, response.index_version) for cell in response.cells)

    async def _call(self, method: Any, request: Any, timeout_seconds: float | None) -> Any:  # noqa: ANN401
        timeout = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        attempts = _Attempts(self.address, self._connection, self._retry, timeout)
        while True:
            try:
                return await method(request, timeout=attempts.remaining_seconds)
            except grpc.RpcError as error:
                pause = attempts.pause_after(error)
            await asyncio.sleep(pause)


class _Attempts:
    """The attempts of one call, or those to get one answer out of a stream: how many, and until when."""

    def __init__(self, address: str, connection: Connection, policy: RetryPolicy, timeout_seconds: float) -> None:
        if timeout_seconds <= 0:
            # gRPC would send the call, and an answer can be faster than a deadline that has passed.
            raise DeadlineExceededError(_unanswered(address, timeout_seconds))
        self._address = address
        self._connection = connection
        self._policy = policy
        self._timeout_seconds = timeout_seconds
        self._failed = 0
        self._deadline: float | None = None

    @property
    def remaining_seconds(self) -> float:
        """Time left for the current attempt; the clock starts when this is first asked for."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self._timeout_seconds
        return max(self._deadline - time.monotonic(), 0.0)

    def pause_after(self, failure: grpc.RpcError) -> float:
        """Seconds to wait before the next attempt.

        Raises:
            GeoSurgeError: What the failure meant, when there is no next attempt.
        """
        self._failed += 1
        is_cut_off = _is_cut_off(failure)
        is_unreached = failure.code() in _UNREACHED and not is_refused_handshake(failure.details() or "")
        if is_unreached or is_cut_off:
            pause = self._policy.pause_seconds(self._failed, self.remaining_seconds)
            if pause is not None:
                return pause
        if is_cut_off:
            raise _ended_early() from failure
        raise _error_of(failure, self._address, self._connection, self._timeout_seconds) from failure

    def succeed(self) -> None:
        """Forgets failures and starts the clock anew for the next answer; only the clock ends the attempts now."""
        self._policy = replace(self._policy, max_attempts=sys.maxsize)
        self._failed = 0
        self._deadline = None


class _Stream:
    """One connection of `Client.locate_many`. A thread receives, so that the consumer can give up waiting."""

    def __init__(self, method: Any, messages: Iterator[geolocation_pb2.LocateStreamRequest]) -> None:  # noqa: ANN401
        self._call = method(messages)
        self._received: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._receive, name="geosurge-receive", daemon=True).start()

    def read(self, timeout_seconds: float) -> geolocation_pb2.LocateResult:
        """The next answer.

        Raises:
            grpc.RpcError: The connection ended.
            DeadlineExceededError: No answer came in time.
        """
        try:
            received = self._received.get(timeout=timeout_seconds)
        except queue.Empty:
            raise _late(timeout_seconds) from None
        if isinstance(received, Exception):
            raise received
        result: geolocation_pb2.LocateResult = received
        return result

    def close(self) -> None:
        """Ends the connection."""
        self._call.cancel()

    def _receive(self) -> None:
        try:
            for response in self._call:
                for result in response.results:
                    self._received.put(result)
            self._received.put(_ended_early())
        except grpc.RpcError as error:
            self._received.put(error)


async def _read(stream: Any, timeout_seconds: float) -> geolocation_pb2.LocateStreamResponse:  # noqa: ANN401
    """The next answers of an asynchronous stream; raises as `_Stream.read`."""
    try:
        async with asyncio.timeout(timeout_seconds):
            response = await stream.read()
    except TimeoutError:
        raise _late(timeout_seconds) from None
    if response is grpc.aio.EOF:
        raise _ended_early()
    answer: geolocation_pb2.LocateStreamResponse = response
    return answer


def _late(timeout_seconds: float) -> DeadlineExceededError:
    return DeadlineExceededError(f"no answer came for {timeout_seconds:.1f} s; allow more time or ask for less at once")


def _ended_early() -> ServiceError:
    return ServiceError("the server ended the stream before it had answered everything")


def _error_of(failure: grpc.RpcError, address: str, connection: Connection, timeout_seconds: float) -> GeoSurgeError:
    """The engine's error behind a failed call; without the engine's own details, the transport's code decides."""
    trailers: Any = failure.trailing_metadata() or ()
    for key, value in trailers:
        if key == "grpc-status-details-bin":
            return status_to_error(status_pb2.Status.FromString(value))
    code, details = failure.code(), failure.details() or ""
    if code == grpc.StatusCode.UNAVAILABLE:
        details = explain_unavailable(details, address, connection)
    elif code == grpc.StatusCode.CANCELLED:
        return ServiceError(f"the server at {address} ended before it took the call ({details}); send it again")
    elif code == grpc.StatusCode.DEADLINE_EXCEEDED:
        details = _unanswered(address, timeout_seconds)
    elif code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        details = f"the request is too large for the server at {address} ({details}); send a smaller image"
    elif code == grpc.StatusCode.UNAUTHENTICATED:
        return CredentialsMissingError(f"the server at {address} does not accept the credentials ({details})")
    elif code == grpc.StatusCode.PERMISSION_DENIED:
        return PermissionDeniedError(f"the server at {address} does not permit the call ({details})")
    elif code == grpc.StatusCode.UNIMPLEMENTED:
        return ServiceError(
            f"the server at {address} does not offer this call ({details}); check the address, and that it is of this "
            "version: the IndexService may be on its --admin-port"
        )
    return status_to_error(status_pb2.Status(code=code.value[0], message=details))


def _is_cut_off(failure: grpc.RpcError) -> bool:
    """Whether asynchronous gRPC says only that it could not send: the server ended the stream, its reason is lost."""
    return failure.code() == grpc.StatusCode.INTERNAL and failure.details() == "Internal error from Core"


def _unanswered(address: str, timeout_seconds: float) -> str:
    return f"the server at {address} did not answer within {timeout_seconds:g} s"


def _outcome(result: geolocation_pb2.LocateResult) -> Location | GeoSurgeError:
    if result.HasField("status"):
        return status_to_error(result.status)
    return response_to_location(result.response)


def _messages(
    groups: Iterator[list[geolocation_pb2.LocateRequest]],
) -> Iterator[geolocation_pb2.LocateStreamRequest]:
    for group in groups:
        yield from _split(group)


async def _async_messages(
    groups: AsyncIterator[list[geolocation_pb2.LocateRequest]],
) -> AsyncIterator[geolocation_pb2.LocateStreamRequest]:
    async for group in groups:
        for message in _split(group):
            yield message


def _split(group: list[geolocation_pb2.LocateRequest]) -> Iterator[geolocation_pb2.LocateStreamRequest]:
    """Messages with these requests, of `_MESSAGE_BYTES` at most, or with one request."""
    message, size = geolocation_pb2.LocateStreamRequest(), 0
    for request in group:
        request_size = request.ByteSize()
        if message.requests and size + request_size > _MESSAGE_BYTES:
            yield message
            message, size = geolocation_pb2.LocateStreamRequest(), 0
        message.requests.append(request)
        size += request_size
    if message.requests:
        yield message


def _locate_request(
    query: bytes | NDArray[np.floating[Any]], options: LocateOptions | None, index_version: str
) -> geolocation_pb2.LocateRequest:
    # The id is made here rather than by the server so that a repeated call is recognised as the same request.
    request = geolocation_pb2.LocateRequest(
        request_id=uuid.uuid4().hex, options=options_to_message(options or LocateOptions(), index_version)
    )
    if isinstance(query, bytes):
        request.image = query
    else:
        request.embedding.values.extend(query.tolist())
        request.embedding.SetInParent()
    return request


def _entry(
    query: Query, options: LocateOptions | None, index_version: str, max_image_bytes: int
) -> Entry[geolocation_pb2.LocateRequest]:
    """Prepares a query of a stream. One that the server would have to refuse by ending the stream is refused here."""
    try:
        is_embedding = isinstance(query, np.ndarray) and query.ndim == 1
        content = _embedding(query) if is_embedding else _encoded(query, max_image_bytes)
    except GeoSurgeError as error:
        return Entry(error=error)
    return Entry(request=_locate_request(content, options, index_version))


def _embedding(embedding: Any) -> NDArray[np.floating[Any]]:  # noqa: ANN401
    values = np.asarray(embedding)
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.floating):
        raise EmbeddingInvalidError(f"an embedding is one row of floats, not {values.shape} {values.dtype}")
    return values


def _encoded(image: Any, max_bytes: int = _LARGEST_IMAGE_BYTES) -> bytes:  # noqa: ANN401
    """The bytes that stand for an image on the wire."""
    if isinstance(image, bytes):
        data = image
    elif isinstance(image, str | os.PathLike):
        data = _read_file(Path(image), max_bytes)
    else:
        data = _to_png(image)
    if len(data) > max_bytes:
        raise _too_large(len(data), max_bytes)
    return data


def _read_file(path: Path, max_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise _too_large(size, max_bytes)
            return file.read()
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise InputNotReadableError(f"cannot read {path}: {reason}") from error


def _to_png(image: Any) -> bytes:  # noqa: ANN401
    # Imported here because most callers send files and need no image library at all.
    from PIL import Image, ImageOps  # noqa: PLC0415

    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ImageFormatUnsupportedError(
                f"an image array must be (height, width, 3) uint8, not {image.shape} {image.dtype}"
            )
        picture: Image.Image = Image.fromarray(image)
    elif isinstance(image, Image.Image):
        picture = ImageOps.exif_transpose(image)
        if picture.mode not in {"1", "L", "LA", "I;16", "P", "RGB", "RGBA"}:
            picture = picture.convert("RGB")
    else:
        raise ImageFormatUnsupportedError(
            f"an image is a path, bytes, a numpy array or a Pillow image, not {type(image).__name__}"
        )
    content = io.BytesIO()
    picture.save(content, "PNG", compress_level=1)
    return content.getvalue()


def _too_large(size: int, limit: int) -> ImageTooLargeError:
    return ImageTooLargeError(
        f"the image has {size} bytes, the limit is {limit}; send a smaller or more compressed picture"
    )


def _path_request(latitude_deg: float, longitude_deg: float, index_version: str) -> cell_pb2.GetPathRequest:
    coordinate = cell_pb2.Coordinate(latitude_deg=latitude_deg, longitude_deg=longitude_deg)
    return cell_pb2.GetPathRequest(coordinate=coordinate, index_version=index_version)
