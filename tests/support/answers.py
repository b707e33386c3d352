"""What a version must answer, by opening its bundle here, and whether an answer is that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import grpc
import numpy as np
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from numpy.typing import NDArray

from geosurge.errors import GeoSurgeError
from geosurge.location import LocateOptions, Location
from geosurge.locator import Locator
from geosurge.v1 import geolocation_pb2 as pb
from geosurge.wire import location_to_response, options_to_message

PROBABILITY_TOLERANCE = 1e-3
"""An encoder's last digits depend on the size of the batch."""

OPTIONS = (LocateOptions(), LocateOptions(top_k=3, exact=True, h3_resolution=5))
"""How questions are asked in turn: with the beam, and with a scan of every leaf."""

Query = bytes | NDArray[np.float32]


def question(
    query: Query, options: LocateOptions = OPTIONS[0], *, request_id: str = "", version: str = ""
) -> pb.LocateRequest:
    """The request that asks for an image or an embedding."""
    message = options_to_message(options, version)
    if isinstance(query, bytes):
        return pb.LocateRequest(request_id=request_id, image=query, options=message)
    embedding = pb.Embedding(values=query.tolist())
    return pb.LocateRequest(request_id=request_id, embedding=embedding, options=message)


def questions(queries: Sequence[Query]) -> list[pb.LocateRequest]:
    """A request for each query, with `OPTIONS` in turn."""
    return [question(query, OPTIONS[number % len(OPTIONS)]) for number, query in enumerate(queries)]


def expected_answers(bundle: Path, queries: Sequence[Query]) -> list[pb.LocateResponse]:
    """What a bundle answers `questions` with."""
    with Locator.open(bundle) as locator:
        outcomes = [_locate(locator, query, OPTIONS[number % len(OPTIONS)]) for number, query in enumerate(queries)]
    return [location_to_response(outcome, "") for outcome in outcomes]


def same_answer(answer: pb.LocateResponse, expected: pb.LocateResponse) -> bool:
    """Whether version, path, alternatives, region and coordinate of two answers are the same."""
    return (
        answer.index_version == expected.index_version
        and [(cell.level, cell.token) for cell in answer.path] == [(cell.level, cell.token) for cell in expected.path]
        and [leaf.token for leaf in answer.alternatives] == [leaf.token for leaf in expected.alternatives]
        and list(answer.credible_region.tokens) == list(expected.credible_region.tokens)
        and answer.location.h3_cell == expected.location.h3_cell
        and answer.location.place.city == expected.location.place.city
        and np.allclose(_numbers(answer), _numbers(expected), rtol=0, atol=PROBABILITY_TOLERANCE)
        and math.isclose(answer.location.radius_km, expected.location.radius_km, rel_tol=0.01)
    )


def reason_of(error: grpc.RpcError) -> str:
    """The stable reason that a failed call carries; empty where it carries none."""
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    for detail in status.details if status is not None else ():
        detail.Unpack(info)
    return info.reason


def retry_seconds_of(error: grpc.RpcError) -> float | None:
    """When a failed call says to come back; ``None`` where it does not."""
    status = rpc_status.from_call(error)
    retry = error_details_pb2.RetryInfo()
    for detail in status.details if status is not None else ():
        if detail.Unpack(retry):
            return retry.retry_delay.ToTimedelta().total_seconds()
    return None


def _locate(locator: Locator, query: Query, options: LocateOptions) -> Location:
    if isinstance(query, bytes):
        (outcome,) = locator.locate([query], options)
    else:
        (outcome,) = locator.locate_embeddings(query[np.newaxis], [options])
    if isinstance(outcome, GeoSurgeError):
        raise outcome
    return outcome


def _numbers(answer: pb.LocateResponse) -> list[float]:
    return [
        answer.location.latitude_deg,
        answer.location.longitude_deg,
        answer.location.probability,
        *(cell.probability for cell in answer.path),
        *(leaf.probability for leaf in answer.alternatives),
    ]
