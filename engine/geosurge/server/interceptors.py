"""What surrounds every call: errors become statuses, and one line is logged.

Logged are the method, status, duration, request id and index version; never what an image showed or where it was.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from geosurge.errors import GeoSurgeError, InputError
from geosurge.server.conversions import exception_to_error
from geosurge.wire import error_to_status

logger = logging.getLogger(__name__)

ENGINE_METHOD_PREFIX: Final = "/geosurge."


@dataclass
class CallRecord:
    """What is known of the call in progress; services fill in what they learn."""

    method: str
    request_id: str = ""
    index_version: str = ""
    item_count: int | None = None
    failed_item_count: int = 0


_current: ContextVar[CallRecord | None] = ContextVar("geosurge_call", default=None)


def current_call() -> CallRecord:
    """The record of the call that this task answers; an unattached one outside of any call."""
    return _current.get() or CallRecord(method="")


@dataclass(frozen=True)
class _Malformed:
    """Stands for a request that is not a message of the expected type."""

    detail: str


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Guards the engine's methods, and ends streams of the other services when the server stops.

    A health watch or an open reflection stream never ends by itself and would hold up a graceful stop.

    Attributes:
        stopping: Set when the server stops accepting calls.
    """

    def __init__(self, stopping: asyncio.Event) -> None:
        self.stopping = stopping

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:  # noqa: ANN401
        """Wraps the handler of a method."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        if not method.startswith(ENGINE_METHOD_PREFIX):
            return self._ended_by_stop(handler)
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(
                _guarded_unary(handler.unary_unary, method),
                request_deserializer=_tolerant(handler.request_deserializer),
                response_serializer=handler.response_serializer,
            )
        return grpc.stream_stream_rpc_method_handler(
            _guarded_stream(handler.stream_stream, method),
            request_deserializer=_tolerant(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _ended_by_stop(self, handler: Any) -> Any:  # noqa: ANN401
        codecs = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(self._until_stopping(handler.unary_stream), **codecs)
        if handler.stream_stream:
            return grpc.stream_stream_rpc_method_handler(self._until_stopping(handler.stream_stream), **codecs)
        return handler

    def _until_stopping(self, behaviour: Callable[[Any, Any], Any]) -> Any:  # noqa: ANN401
        async def produce(request: Any, context: Any) -> None:  # noqa: ANN401
            if inspect.isasyncgenfunction(behaviour):
                async for response in behaviour(request, context):
                    await context.write(response)
            else:
                await behaviour(request, context)

        async def handle(request: Any, context: Any) -> None:  # noqa: ANN401
            work = asyncio.ensure_future(produce(request, context))
            stop = asyncio.ensure_future(self.stopping.wait())
            try:
                await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                stop.cancel()
                ended = work.done()
                work.cancel()
            if ended:
                await work
            else:
                with suppress(asyncio.CancelledError):
                    await work
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is stopping")

        return handle


def _guarded_unary(behaviour: Callable[[Any, Any], Awaitable[Any]], method: str) -> Any:  # noqa: ANN401
    async def handle(request: Any, context: Any) -> Any:  # noqa: ANN401
        async with _guard(method, context):
            return await behaviour(_checked(request), context)

    return handle


def _guarded_stream(behaviour: Callable[[Any, Any], Awaitable[None]], method: str) -> Any:  # noqa: ANN401
    async def checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            yield _checked(request)

    async def handle(requests: AsyncIterator[Any], context: Any) -> None:  # noqa: ANN401
        async with _guard(method, context):
            await behaviour(checked(requests), context)

    return handle


@asynccontextmanager
async def _guard(method: str, context: Any) -> AsyncIterator[None]:  # noqa: ANN401
    """Logs the call inside the ``with`` block and ends it with the status of whatever it raises."""
    call = CallRecord(method)
    token = _current.set(call)
    begun = time.perf_counter()
    code = "OK"
    try:
        yield
    except asyncio.CancelledError:
        remaining = context.time_remaining()
        code = "CANCELLED" if remaining is None or remaining > 0 else "DEADLINE_EXCEEDED"
        raise
    except Exception as exception:  # noqa: BLE001
        error = exception_to_error(exception)
        code = error.grpc_code
        await _abort(context, error, call.request_id)
    finally:
        _log(call, code, 1000 * (time.perf_counter() - begun))
        _current.reset(token)


async def _abort(context: Any, error: GeoSurgeError, request_id: str) -> None:  # noqa: ANN401
    status = error_to_status(error, {"request_id": request_id} if request_id else None)
    rich = rpc_status.to_status(status)
    await context.abort(rich.code, rich.details, rich.trailing_metadata)


def _log(call: CallRecord, code: str, duration_ms: float) -> None:
    items = "" if call.item_count is None else f" items={call.item_count} failed_items={call.failed_item_count}"
    logger.log(
        logging.ERROR if code == "INTERNAL" else logging.INFO,
        "call method=%s code=%s duration_ms=%.1f request_id=%r index_version=%s%s",
        call.method,
        code,
        duration_ms,
        call.request_id[:200],
        call.index_version,
        items,
    )


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Lets a malformed request reach the handler: gRPC itself would answer UNKNOWN and quote the parser."""

    def parse(data: bytes) -> Any:  # noqa: ANN401
        try:
            return deserialize(data)
        except DecodeError as error:
            return _Malformed(str(error))

    return parse


def _checked(request: Any) -> Any:  # noqa: ANN401
    if isinstance(request, _Malformed):
        raise InputError(
            "the request is not a protobuf message of the method's type; generate the client from this "
            f"version's .proto files ({request.detail})"
        )
    return request
