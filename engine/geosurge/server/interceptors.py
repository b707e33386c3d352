"""What surrounds every call: errors become statuses; the call is counted, traced, and logged as one line.

The line and the span hold its method, status, duration, request id and index version; never what an image showed or
where it was.

A message over the transport's limit is refused by gRPC itself, out of sight of this module: a unary call does not get
here, and a stream's requests end as if there were no more.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from geosurge.errors import GeoSurgeError, InputError, MessageTooLargeError
from geosurge.server import tracing
from geosurge.server.failures import MAX_LOGGED_LENGTH, PrivatePaths, exception_to_error
from geosurge.server.message_size import check_message_size
from geosurge.server.metrics import METHODS, OTHER, Metrics
from geosurge.v1 import geolocation_pb2
from geosurge.wire import error_to_status

logger = logging.getLogger(__name__)

ENGINE_METHOD_PREFIX: Final = "/geosurge."

_SERVER_FAULTS: Final = ("DEADLINE_EXCEEDED", "INTERNAL", "UNAVAILABLE", "UNIMPLEMENTED", "UNKNOWN")
"""Codes with which the engine ends calls and which OpenTelemetry counts as failures of the server."""

_UNSENT: Final = 'Failed "execute_batch"'
"""Start of the message of gRPC's error for an answer that cannot be sent because the call is over."""


_NO_PATHS: Final = PrivatePaths({})


@dataclass
class CallRecord:
    """The call in progress, for logs, spans and metrics; services fill in what they learn."""

    method: str
    request_id: str = ""
    index_version: str = ""
    item_count: int | None = None
    failed_item_count: int = 0
    metrics: Metrics | None = field(default=None, repr=False)
    private_paths: PrivatePaths = field(default=_NO_PATHS, repr=False)

    def item_failed(self, reason: str) -> None:
        """Counts an item of this stream that is answered with an error; at once, because a stream may last for days."""
        self.failed_item_count += 1
        if self.metrics is not None:
            self.metrics.item_failed(reason)

    def fields(self) -> dict[str, str | int]:
        """What a log line and a span say of the call."""
        fields: dict[str, str | int] = {
            "method": self.method[:MAX_LOGGED_LENGTH],
            "request_id": self.request_id[:MAX_LOGGED_LENGTH],
            "index_version": self.index_version[:MAX_LOGGED_LENGTH],
        }
        if self.item_count is not None:
            fields |= {"items": self.item_count, "failed_items": self.failed_item_count}
        return fields


_current: ContextVar[CallRecord | None] = ContextVar("geosurge_call", default=None)


def current_call() -> CallRecord:
    """The record of the call that this task answers; an unattached one outside of any call."""
    return _current.get() or CallRecord(method="")


@dataclass(frozen=True)
class _Unreadable:
    """Stands for a request that is too large, or not a message of the expected type."""

    error: GeoSurgeError


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Guards the engine's methods, and ends streams of the other services when the server stops.

    It stands before other interceptors, so that calls which they refuse are logged and counted too. A health watch or
    an open reflection stream never ends by itself and would hold up a graceful stop.

    Attributes:
        stopping: Set when the server stops accepting calls.
        metrics: Told of every call to the engine's methods.
        private_paths: What errors must not name.
    """

    def __init__(self, stopping: asyncio.Event, metrics: Metrics, private_paths: PrivatePaths) -> None:
        self.stopping = stopping
        self.metrics = metrics
        self.private_paths = private_paths

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
                _guarded_unary(handler.unary_unary, method, self.metrics, self.private_paths),
                request_deserializer=_tolerant(handler.request_deserializer, method),
                response_serializer=handler.response_serializer,
            )
        return grpc.stream_stream_rpc_method_handler(
            _guarded_stream(handler.stream_stream, method, self.metrics, self.private_paths),
            request_deserializer=_tolerant(handler.request_deserializer, method),
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


def _guarded_unary(
    behaviour: Callable[[Any, Any], Awaitable[Any]], method: str, metrics: Metrics, private_paths: PrivatePaths
) -> Any:  # noqa: ANN401
    async def handle(request: Any, context: Any) -> Any:  # noqa: ANN401
        async with _guard(method, context, metrics, private_paths):
            begun_ns = time.time_ns()
            response = await behaviour(_checked(request), context)
            if isinstance(response, geolocation_pb2.LocateResponse):
                tracing.record_stages(response.timings, begun_ns=begun_ns)
            return response

    return handle


def _guarded_stream(
    behaviour: Callable[[Any, Any], Awaitable[None]], method: str, metrics: Metrics, private_paths: PrivatePaths
) -> Any:  # noqa: ANN401
    async def checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            yield _checked(request)

    async def handle(requests: AsyncIterator[Any], context: Any) -> None:  # noqa: ANN401
        async with _guard(method, context, metrics, private_paths):
            await behaviour(checked(requests), context)

    return handle


@asynccontextmanager
async def _guard(method: str, context: Any, metrics: Metrics, private_paths: PrivatePaths) -> AsyncIterator[None]:  # noqa: ANN401
    """Observes the call inside the ``with`` block and ends it with the status of whatever it raises."""
    call = CallRecord(method, metrics=metrics, private_paths=private_paths)
    token = _current.set(call)
    begun = time.perf_counter()
    code = "OK"
    error: GeoSurgeError | None = None
    with tracing.span(method[1:] if method in METHODS else OTHER, metadata=context.invocation_metadata()):
        try:
            yield
        except asyncio.CancelledError:
            code = _cancellation_code(context)
            raise
        except Exception as exception:
            if is_lost_call(exception):
                code = _cancellation_code(context)
                # gRPC takes any other exception for a failure of the handler.
                raise asyncio.CancelledError from exception
            error = private_paths.hide(exception_to_error(exception))
            code = error.grpc_code
            if error.reason != GeoSurgeError.reason:
                metrics.refused(error.reason)
        finally:
            seconds = time.perf_counter() - begun
            metrics.call_ended(method, code, seconds)
            fields = {"code": code, "duration_ms": round(1000 * seconds, 1), **call.fields()}
            logger.log(logging.ERROR if code == "INTERNAL" else logging.INFO, "call", extra=fields)
            tracing.annotate(_span_attributes(call, code), failed=code in _SERVER_FAULTS)
            _current.reset(token)
    if error is not None:
        await abort(context, error, call.request_id)


def is_lost_call(error: BaseException | None) -> bool:
    """Whether an error only says that the call was over before gRPC could send: its client left, or was refused."""
    if isinstance(error, BaseExceptionGroup):
        return all(is_lost_call(part) for part in error.exceptions)
    return isinstance(error, grpc.aio.InternalError) and str(error).startswith(_UNSENT)


def _cancellation_code(context: Any) -> str:  # noqa: ANN401
    remaining = context.time_remaining()
    return "CANCELLED" if remaining is None or remaining > 0 else "DEADLINE_EXCEEDED"


async def abort(context: Any, error: GeoSurgeError, request_id: str = "") -> None:  # noqa: ANN401
    """Ends a call with the status that stands for an error, its details included."""
    status = error_to_status(error, {"request_id": request_id} if request_id else None)
    rich = rpc_status.to_status(status)
    await context.abort(rich.code, rich.details, rich.trailing_metadata)


def _span_attributes(call: CallRecord, code: str) -> dict[str, str | int]:
    """The fields of the log line, under the names of OpenTelemetry's conventions where it has them."""
    fields = call.fields()
    return {
        "rpc.system.name": "grpc",
        "rpc.method": str(fields.pop("method")).removeprefix("/"),
        "rpc.response.status_code": code,
        **{f"geosurge.{name}": value for name, value in fields.items()},
    }


def _tolerant(deserialize: Callable[[bytes], Any], method: str) -> Callable[[bytes], Any]:
    """Lets an unreadable request reach the handler: gRPC itself would answer UNKNOWN and quote the parser."""

    def parse(data: bytes) -> Any:  # noqa: ANN401
        try:
            check_message_size(method, data)
            return deserialize(data)
        except MessageTooLargeError as error:
            return _Unreadable(error)
        except DecodeError as error:
            return _Unreadable(
                InputError(
                    "the request is not a protobuf message of the method's type; generate the client from this "
                    f"version's .proto files ({error})"
                )
            )

    return parse


def _checked(request: Any) -> Any:  # noqa: ANN401
    if isinstance(request, _Unreadable):
        raise request.error
    return request
