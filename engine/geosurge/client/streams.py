"""The two directions of a stream: requests packed into messages, answers as they come."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final

import grpc

from geosurge.client.failures import ended_early, late
from geosurge.errors import GeoSurgeError
from geosurge.location import Location
from geosurge.v1 import geolocation_pb2
from geosurge.wire import response_to_location, status_to_error

_MESSAGE_BYTES: Final = 1 << 16
"""Requests of a stream share a message up to this size; a large image has one for itself."""

_FINISH_SECONDS: Final = 1.0
"""Time that the server has to end a stream that has been answered."""


class AnswerStream:
    """One connection of `Client.locate_many`. A thread receives, so that the consumer can give up waiting."""

    def __init__(self, method: Any, messages: Iterator[geolocation_pb2.LocateStreamRequest]) -> None:  # noqa: ANN401
        self._call = method(messages)
        self._received: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._receiver = threading.Thread(target=self._receive, name="geosurge-receive", daemon=True)
        self._receiver.start()

    def read(self, timeout_seconds: float) -> geolocation_pb2.LocateResult:
        """The next answer.

        Raises:
            grpc.RpcError: The connection ended.
            DeadlineExceededError: No answer came in time.
        """
        try:
            received = self._received.get(timeout=timeout_seconds)
        except queue.Empty:
            raise late(timeout_seconds) from None
        if isinstance(received, Exception):
            raise received
        result: geolocation_pb2.LocateResult = received
        return result

    def finish(self) -> None:
        """Lets the server end a stream that has been answered, which it would otherwise count as cancelled."""
        self._receiver.join(_FINISH_SECONDS)

    def close(self) -> None:
        """Ends the connection."""
        self._call.cancel()

    def _receive(self) -> None:
        try:
            for response in self._call:
                for result in response.results:
                    self._received.put(result)
            self._received.put(ended_early())
        except grpc.RpcError as error:
            self._received.put(error)


async def finish_answers(stream: Any) -> None:  # noqa: ANN401
    """As `AnswerStream.finish`, of an asynchronous stream."""
    with contextlib.suppress(TimeoutError, grpc.RpcError):
        async with asyncio.timeout(_FINISH_SECONDS):
            await stream.code()


async def read_answers(stream: Any, timeout_seconds: float) -> geolocation_pb2.LocateStreamResponse:  # noqa: ANN401
    """The next answers of an asynchronous stream; raises as `AnswerStream.read`."""
    try:
        async with asyncio.timeout(timeout_seconds):
            response = await stream.read()
    except TimeoutError:
        raise late(timeout_seconds) from None
    if response is grpc.aio.EOF:
        raise ended_early()
    answer: geolocation_pb2.LocateStreamResponse = response
    return answer


def message_to_outcome(result: geolocation_pb2.LocateResult) -> Location | GeoSurgeError:
    """The answer to one query of a stream, or why it has none."""
    if result.HasField("status"):
        return status_to_error(result.status)
    return response_to_location(result.response)


def stream_messages(
    groups: Iterator[list[geolocation_pb2.LocateRequest]],
) -> Iterator[geolocation_pb2.LocateStreamRequest]:
    """The messages that carry groups of requests."""
    for group in groups:
        yield from split_requests(group)


async def async_stream_messages(
    groups: AsyncIterator[list[geolocation_pb2.LocateRequest]],
) -> AsyncIterator[geolocation_pb2.LocateStreamRequest]:
    """As `stream_messages`, of groups that come asynchronously."""
    async for group in groups:
        for message in split_requests(group):
            yield message


def split_requests(group: list[geolocation_pb2.LocateRequest]) -> Iterator[geolocation_pb2.LocateStreamRequest]:
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
