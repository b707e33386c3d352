"""What a refusal of a server says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from geosurge.errors import GeoSurgeError
from geosurge.wire import status_to_error


@asynccontextmanager
async def refused(code: grpc.StatusCode, reason: str) -> AsyncIterator[None]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield
    assert caught.value.code() == code, caught.value
    details = [value for key, value in caught.value.trailing_metadata() if key == "grpc-status-details-bin"]
    assert error_of(status_pb2.Status.FromString(details[0])).reason == reason


def error_of(status: status_pb2.Status) -> GeoSurgeError:
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    error = status_to_error(status)
    assert (info.domain, info.reason) == ("geosurge", error.reason)
    return error
