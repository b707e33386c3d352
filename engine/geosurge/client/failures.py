"""What a failed call means."""

from __future__ import annotations

from typing import Any

import grpc
from google.rpc import status_pb2

from geosurge.client.connection import Connection, explain_unavailable
from geosurge.errors import (
    CredentialsMissingError,
    DeadlineExceededError,
    GeoSurgeError,
    PermissionDeniedError,
    ServiceError,
)
from geosurge.wire import status_to_error


def error_of(failure: grpc.RpcError, address: str, connection: Connection, timeout_seconds: float) -> GeoSurgeError:
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
        details = unanswered(address, timeout_seconds)
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


def is_cut_off(failure: grpc.RpcError) -> bool:
    """Whether asynchronous gRPC says only that it could not send: the server ended the stream, its reason is lost."""
    return failure.code() == grpc.StatusCode.INTERNAL and failure.details() == "Internal error from Core"


def unanswered(address: str, timeout_seconds: float) -> str:
    """What is said of a call whose time is over."""
    return f"the server at {address} did not answer within {timeout_seconds:g} s"


def late(timeout_seconds: float) -> DeadlineExceededError:
    """The error of a stream without a next answer in time."""
    return DeadlineExceededError(f"no answer came for {timeout_seconds:.1f} s; allow more time or ask for less at once")


def ended_early() -> ServiceError:
    """The error of a stream that ended with queries open."""
    return ServiceError("the server ended the stream before it had answered everything")
