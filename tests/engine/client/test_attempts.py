from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.clients import free_port
from support.servers import background_server, embedding, encoded_image, settings_for

from geosurge.client import Client, RetryPolicy
from geosurge.errors import DeadlineExceededError, ServiceError
from geosurge.v1 import geolocation_pb2, geolocation_pb2_grpc


@pytest.mark.parametrize("timeout", [0, -1])
def test_a_timeout_of_nothing_is_not_the_default(client: Client, timeout: float) -> None:
    with pytest.raises(DeadlineExceededError, match="did not answer within"):
        client.get_info(timeout_seconds=timeout)
    with pytest.raises(DeadlineExceededError, match="did not answer within"):
        client.locate_embedding(embedding(0), timeout_seconds=timeout)


def test_a_server_that_comes_up_late_is_waited_for(bundle: Path) -> None:
    port = free_port()
    with ExitStack() as stack:
        client = stack.enter_context(Client(f"127.0.0.1:{port}", retry=RetryPolicy(max_attempts=50)))
        starting = threading.Timer(0.3, lambda: stack.enter_context(background_server(settings_for(bundle, port=port))))
        starting.start()
        assert client.locate_embedding(embedding(0)).index_version == "tiny"
        starting.join()


def test_a_server_that_stays_away_is_reported_with_its_address() -> None:
    port = free_port()
    with Client(f"127.0.0.1:{port}", retry=RetryPolicy(max_attempts=2)) as client:
        with pytest.raises(ServiceError, match=f"127.0.0.1:{port} cannot be reached"):
            client.get_info()
        with pytest.raises(ServiceError):
            list(client.locate_many([encoded_image(1)]))


@pytest.mark.parametrize("attempts", [1, 2])
def test_a_call_that_the_server_itself_cancels_is_repeated(attempts: int) -> None:
    answers = iter([grpc.StatusCode.CANCELLED])

    class Stopping(geolocation_pb2_grpc.GeolocationServiceServicer):
        def GetInfo(self, request: Any, context: grpc.ServicerContext) -> geolocation_pb2.GetInfoResponse:  # noqa: N802
            for code in answers:
                context.abort(code, "stopping")
            return geolocation_pb2.GetInfoResponse(index_version="answered")

    server = grpc.server(ThreadPoolExecutor(1))
    geolocation_pb2_grpc.add_GeolocationServiceServicer_to_server(Stopping(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with Client(f"127.0.0.1:{port}", retry=RetryPolicy(max_attempts=attempts)) as client:
            if attempts == 1:
                with pytest.raises(ServiceError, match="ended before it took the call"):
                    client.get_info()
            else:
                assert client.get_info().index_version == "answered"
    finally:
        server.stop(None)


@pytest.fixture
def silent_address() -> Iterator[str]:
    """A port that accepts connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_call_ends_at_its_deadline(silent_address: str) -> None:
    with Client(silent_address, timeout_seconds=0.3) as client:
        begun = time.monotonic()
        with pytest.raises((DeadlineExceededError, ServiceError)):
            client.locate_embedding(embedding(0))
        assert time.monotonic() - begun < 10


def test_pauses_grow_up_to_a_limit_and_end_with_the_deadline() -> None:
    policy = RetryPolicy(max_attempts=10, first_pause_seconds=0.1, longest_pause_seconds=1.0)
    for failed, mean in ((1, 0.1), (2, 0.2), (3, 0.4), (9, 1.0)):
        pauses = [policy.pause_seconds(failed, 100) for _ in range(50)]
        assert all(pause is not None and 0.5 * mean <= pause <= 1.5 * mean for pause in pauses)
        assert len(set(pauses)) > 1
    assert policy.pause_seconds(10, 100) is None
    assert policy.pause_seconds(1, 0.04) is None
