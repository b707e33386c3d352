"""Callers without the right to call, and bytes that are no calls: each gets its code and nothing else; all goes on."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from itertools import repeat
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status
from support.answers import Query, expected_answers, questions, reason_of, same_answer
from support.bad_requests import MAX_IMAGE_BYTES, shows_code
from support.processes import ServerProcess, geolocation, server_process, wait_until
from support.secured import Authority, new_token, replace_file, services
from support.servers import embedding, encoded_image
from support.traffic import open_channel as open_plain_channel

from geosurge.client.connection import Connection, open_channel
from geosurge.v1 import geolocation_pb2 as pb

Code = grpc.StatusCode

LOCATE = "/geosurge.v1.GeolocationService/Locate"
LOCATE_STREAM = "/geosurge.v1.GeolocationService/LocateStream"
LIST_VERSIONS = "/geosurge.v1.IndexService/ListVersions"
MAX_STREAM_ITEMS = 300
QUERIES: list[Query] = [encoded_image(0), embedding(0)]
QUESTIONS = questions(QUERIES)
EMBEDDING = QUESTIONS[1].SerializeToString()


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[ServerProcess]:
    with server_process(bundle, max_image_bytes=MAX_IMAGE_BYTES, max_stream_items=MAX_STREAM_ITEMS) as running:
        yield running
        assert running.process.poll() is None
        assert "Traceback" not in running.log


@pytest.fixture
def expected(bundle: Path) -> list[pb.LocateResponse]:
    """The answers to `QUESTIONS`."""
    return expected_answers(bundle, QUERIES)


def assert_answers(server: ServerProcess, expected: list[pb.LocateResponse]) -> None:
    with grpc.insecure_channel(server.address) as channel:
        answers = [geolocation(channel).Locate(asked, timeout=60) for asked in QUESTIONS]
    assert all(map(same_answer, answers, expected))
    assert server.health() == "SERVING"


def refusal(channel: Any, method: str, message: bytes, *, metadata: Any = (), **options: Any) -> tuple[Code, str]:
    """Calls a method and returns code and reason of the failure, which shows nothing of the server."""
    kind = channel.stream_stream if method == LOCATE_STREAM else channel.unary_unary
    asked = iter([message]) if method == LOCATE_STREAM else message
    with pytest.raises(grpc.RpcError) as caught:
        # Of a stream, a list has every answer.
        list(kind(method)(asked, metadata=metadata, timeout=60, **options))
    error: Any = caught.value
    trailers = repr(rpc_status.from_call(error)) + repr(error.trailing_metadata())
    assert not shows_code(error.details()), error.details()
    assert not shows_code(trailers), trailers
    return error.code(), reason_of(error)


def test_only_the_right_certificate_with_the_right_token_gets_in(bundle: Path, tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path / "authority"), Authority(tmp_path / "stranger")
    locate, admin, expired = new_token(), new_token(), new_token()
    yesterday = datetime.now(UTC).date() - timedelta(days=1)
    file = replace_file(tmp_path / "tokens", f"locate:{locate}\nadmin:{admin}\nadmin:{expired}:{yesterday}\n")
    own = authority.issue("client", "client.example")
    others = stranger.issue("client", "client.example")
    settings = {**authority.tls(), "tls_client_ca": authority.ca_file, "token_file": file}
    with server_process(bundle, **settings) as server:

        def outcome(connection: Connection | None, method: str = LOCATE) -> tuple[Code, str]:
            with open_channel(server.address, connection) as channel:
                return refusal(channel, method, EMBEDDING if method == LOCATE else b"")

        def bearing(token: str | None, identity: tuple[Path, Path] = own) -> Connection:
            return Connection(authority.ca_file, *identity, token=token)

        for connection, code, reason in (
            (None, Code.UNAVAILABLE, ""),
            (Connection(token=admin), Code.UNAVAILABLE, ""),
            (Connection(authority.ca_file, token=admin), Code.UNAVAILABLE, ""),
            (bearing(admin, others), Code.UNAVAILABLE, ""),
            (Connection(stranger.ca_file, *own, token=admin), Code.UNAVAILABLE, ""),
            (bearing(None), Code.UNAUTHENTICATED, "CREDENTIALS_MISSING"),
            (bearing(new_token()), Code.UNAUTHENTICATED, "CREDENTIALS_INVALID"),
            (bearing(expired), Code.UNAUTHENTICATED, "CREDENTIALS_EXPIRED"),
        ):
            assert outcome(connection) == (code, reason), connection
            with open_channel(server.address, bearing(locate)) as channel:
                answers = [geolocation(channel).Locate(asked, timeout=60) for asked in QUESTIONS]
            assert all(map(same_answer, answers, expected_answers(bundle, QUERIES)))
        assert outcome(bearing(locate), LIST_VERSIONS) == (Code.PERMISSION_DENIED, "PERMISSION_DENIED")
        with open_channel(server.address, bearing(admin)) as channel:
            assert channel.unary_unary(LIST_VERSIONS)(b"", timeout=60)
        log = server.log
    assert "Traceback" not in log
    assert not any(token in log for token in (locate, admin, expired))


NO_MESSAGES = {
    "endless number": b"\xff" * 30,
    "cut field": b"\x0a\x7f",
    "open groups": b"\x0b" * 1000,
    "field number zero": b"\x00\x01",
}


@pytest.mark.parametrize("name", NO_MESSAGES)
def test_bytes_that_are_no_message_are_refused_by_every_method(
    server: ServerProcess, expected: list[pb.LocateResponse], name: str
) -> None:
    with grpc.insecure_channel(server.address) as channel:
        for service in services():
            for method in service.methods:
                found = refusal(channel, f"/{service.full_name}/{method.name}", NO_MESSAGES[name])
                assert found == (Code.INVALID_ARGUMENT, "INPUT_INVALID"), method.full_name
        for method in (LOCATE, LOCATE_STREAM):
            assert refusal(channel, method, b"\x0a\x02\xff\xfe") == (Code.INVALID_ARGUMENT, "INPUT_INVALID")
        for method in ("/geosurge.v1.GeolocationService/Forget", "/no.such.Service/Method"):
            assert refusal(channel, method, NO_MESSAGES[name])[0] is Code.UNIMPLEMENTED
    assert_answers(server, expected)


def test_what_is_too_large_is_refused_and_not_unpacked(
    server: ServerProcess, expected: list[pb.LocateResponse]
) -> None:
    image = pb.LocateRequest(image=bytes(100 << 20)).SerializeToString()
    peak = peak_bytes(server)
    with grpc.insecure_channel(server.address, [("grpc.max_send_message_length", -1)]) as channel:
        for compression in (grpc.Compression.Gzip, grpc.Compression.Deflate):
            for method in (LOCATE, LOCATE_STREAM):
                assert refusal(channel, method, image, compression=compression) == (Code.UNIMPLEMENTED, "")
        assert peak_bytes(server) < peak + len(image) // 2
        for method in (LOCATE, LOCATE_STREAM):
            assert refusal(channel, method, image) == (Code.RESOURCE_EXHAUSTED, "")
        much = [("much", "x" * 1_000_000)]
        assert refusal(channel, LOCATE, EMBEDDING, metadata=much) == (Code.RESOURCE_EXHAUSTED, "")
    assert_answers(server, expected)


def peak_bytes(server: ServerProcess) -> int:
    """The most memory that the server ever had."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def test_an_endless_stream_is_ended_after_as_many_items_as_it_may_have(
    server: ServerProcess, expected: list[pb.LocateResponse]
) -> None:
    messages: list[pb.LocateStreamResponse] = []
    item = pb.LocateStreamRequest(requests=[QUESTIONS[1]])
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as ended:
        messages.extend(geolocation(channel).LocateStream(repeat(item), timeout=60))
    answers = [result for message in messages for result in message.results]
    assert (ended.value.code(), reason_of(ended.value)) == (Code.UNAVAILABLE, "STREAM_LIMIT")
    assert len(answers) == MAX_STREAM_ITEMS
    assert all(same_answer(answer.response, expected[1]) for answer in answers)
    assert_answers(server, expected)


def frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
    """An HTTP/2 frame."""
    return struct.pack(">I", len(content))[1:] + struct.pack(">BBI", kind, flags, stream) + content


def headers(method: str, flags: int = 4) -> bytes:
    """The header block that opens a call, without compression."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": method,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    block = b"".join(b"\x00" + b"".join(bytes([len(text)]) + text.encode() for text in pair) for pair in fields.items())
    return frame(1, flags, 1, block)


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
NOISE = random.Random(0)

# What is sent at once, and what is then sent byte by byte without ever coming to an end.
CONNECTIONS: dict[str, tuple[bytes, bytes]] = {
    "silence": (b"", b""),
    "slow preface": (b"PRI", b" * HTTP/2.0"),
    "slow header": (PREFACE + headers(LOCATE, flags=0), frame(9, 0, 1, bytes(16000))),
    "call without a message": (PREFACE + headers(LOCATE), b""),
    "slow message": (PREFACE + headers(LOCATE) + frame(0, 0, 1, struct.pack(">BI", 0, 90_000)), bytes(50)),
    "slow stream": (PREFACE + headers(LOCATE_STREAM), frame(0, 0, 1, struct.pack(">BI", 0, 90_000) + bytes(90_000))),
    "message of 4 GB": (PREFACE + headers(LOCATE) + frame(0, 0, 1, struct.pack(">BI", 0, 2**32 - 1)), bytes(50)),
    "unknown compression": (PREFACE + headers(LOCATE) + frame(0, 1, 1, struct.pack(">BI", 1, 9) + bytes(9)), b""),
    "message of another length": (PREFACE + headers(LOCATE) + frame(0, 1, 1, struct.pack(">BI", 0, 9) + b"1"), b""),
    "data without a call": (PREFACE + frame(0, 0, 7, bytes(100)), b""),
    "frame of 16 MB": (PREFACE + b"\xff\xff\xff" + struct.pack(">BBI", 0, 0, 1), bytes(50)),
    "web browser": (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b""),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", bytes(50)),
    "noise": (NOISE.randbytes(5000), NOISE.randbytes(50)),
    "noise after the preface": (PREFACE + NOISE.randbytes(5000), NOISE.randbytes(50)),
}
TIMES = 10


def test_connections_that_say_little_or_nonsense_hold_nothing_up(
    server: ServerProcess, expected: list[pb.LocateResponse]
) -> None:
    host, _, port = server.address.rpartition(":")
    with ExitStack() as stack:
        sockets = []
        for first, rest in list(CONNECTIONS.values()) * TIMES:
            connection = stack.enter_context(socket.create_connection((host, int(port))))
            connection.sendall(first)
            sockets.append((connection, rest))
        for step in range(50):
            for connection, rest in sockets:
                # The server may have hung up.
                with contextlib.suppress(OSError):
                    connection.sendall(rest[step : step + 1])
            if step % 10 == 0:
                assert_answers(server, expected)
        assert server.metric("geosurge_permits_in_use") == 0
        for connection, _ in sockets:
            connection.settimeout(0.001)
            with contextlib.suppress(OSError):
                assert not shows_code(connection.recv(1 << 16).decode("latin-1"))
    assert_answers(server, expected)


async def test_a_client_that_never_reads_its_answers_keeps_no_permit(
    server: ServerProcess, expected: list[pb.LocateResponse]
) -> None:
    async with open_plain_channel(server.address) as channel:
        calls = [geolocation(channel).LocateStream() for _ in range(5)]
        item = pb.LocateStreamRequest(requests=[QUESTIONS[1]])
        for call in calls:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    for _ in range(MAX_STREAM_ITEMS):
                        await call.write(item)
        await asyncio.to_thread(
            wait_until, lambda: server.metric("geosurge_permits_in_use") == 0, "all that was read is answered"
        )
        await asyncio.to_thread(assert_answers, server, expected)
        for call in calls:
            call.cancel()
    await asyncio.to_thread(
        wait_until, lambda: server.metric("geosurge_permits_in_use") == 0, "nothing of the streams is left"
    )
