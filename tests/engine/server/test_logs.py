from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc._cython.cygrpc import ExecuteBatchError
from hypothesis import example, given
from hypothesis import strategies as st
from support.processes import results
from support.servers import embedding, encoded_image

from geosurge.server.interceptors import CallRecord, _current
from geosurge.server.logs import JsonFormatter, LogFormat, TextFormatter, add_call, is_informative
from geosurge.v1 import cell_pb2, cell_pb2_grpc, geolocation_pb2_grpc
from geosurge.v1 import geolocation_pb2 as pb

GEOLOCATION = "/geosurge.v1.GeolocationService"
RECORD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR) [\w.]+ \S")
FORGED = "id\r\n2030-01-01 00:00:00,000 INFO geosurge.server.app forged\n{}\x1b[2J\u2028\x85x"


def record_of(message: str = "call", *, error: BaseException | None = None, **fields: object) -> logging.LogRecord:
    exc_info = (type(error), error, error.__traceback__) if error is not None else None
    logger = logging.getLogger("geosurge.test")
    return logger.makeRecord(logger.name, logging.INFO, __file__, 1, message, (), exc_info, extra=fields)


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:  # noqa: BLE001
        return caught


def test_text_is_a_line_with_its_fields() -> None:
    line = TextFormatter().format(record_of(code="OK", duration_ms=1.5, request_id="my id", index_version="", items=3))
    assert RECORD.match(line)
    assert line.endswith(" INFO geosurge.test call code=OK duration_ms=1.5 request_id='my id' index_version='' items=3")


def test_json_is_an_object_with_its_fields() -> None:
    parsed = json.loads(JsonFormatter().format(record_of(code="OK", duration_ms=1.5, level="never", path=Path("a"))))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", parsed.pop("time"))
    expected = {"level": "INFO", "logger": "geosurge.test", "message": "call", "code": "OK", "duration_ms": 1.5}
    assert parsed == {**expected, "path": "a"}


@given(st.text())
@example(FORGED)
@example("a=b c='d'")
@example("\u202e")
def test_what_a_client_chooses_stays_in_its_line(text: str) -> None:
    for fields in ({"request_id": text, "code": "OK"}, {"code": "OK"}):
        record = record_of(f"failed for {text}", **fields)
        first, *others = TextFormatter().format(record).splitlines()
        assert RECORD.match(first)
        assert all(line.startswith("    ") for line in others)
        line = JsonFormatter().format(record)
        assert line.isascii()
        assert line.isprintable()
        assert json.loads(line)["message"] == f"failed for {text}"
        assert json.loads(line).get("request_id") == fields.get("request_id")
    value = TextFormatter().format(record_of(request_id=text, code="OK")).removesuffix(" code=OK")
    assert value.isprintable()


def test_a_traceback_stays_below_its_line() -> None:
    record = record_of("unexpected failure", error=raised(ValueError(FORGED)), error_id="e")
    first, *others = TextFormatter().format(record).splitlines()
    assert first.endswith("unexpected failure error_id=e")
    assert others[0] == "    Traceback (most recent call last):"
    assert all(line.startswith("    ") for line in others)
    parsed = json.loads(JsonFormatter().format(record))
    assert parsed["exception"].startswith("Traceback")
    assert parsed["exception"].endswith(FORGED)


def test_outside_of_a_call_a_record_says_of_none() -> None:
    record = record_of("serving")
    assert add_call(record)
    assert "request_id" not in TextFormatter().format(record)


def test_what_a_record_says_itself_comes_before_what_its_call_is_about() -> None:
    call = CallRecord("/geosurge.v1.IndexService/RollbackVersion")
    token = _current.set(call)
    try:
        record, other = record_of("activated", index_version="two"), record_of("other")
        assert add_call(record)
        assert add_call(other)
    finally:
        _current.reset(token)
    assert record.__dict__["index_version"] == "two"
    assert record.__dict__["request_id"] == other.__dict__["request_id"] == other.__dict__["index_version"] == ""


def test_what_a_client_chose_is_cut_in_every_record_of_its_call() -> None:
    token = _current.set(CallRecord("/" + "m" * 500, request_id="r" * 500, index_version="v" * 500))
    try:
        record = record_of("something")
        assert add_call(record)
    finally:
        _current.reset(token)
    assert (record.__dict__["request_id"], record.__dict__["index_version"]) == ("r" * 200, "v" * 200)


def grpc_record(message: str, error: Exception | None) -> logging.LogRecord:
    record = record_of(message, error=error)
    record.name = "grpc._cython.cygrpc"
    return record


def test_only_the_status_that_nobody_waits_for_is_dropped() -> None:
    message = f"ExecuteBatchError raised in core by servicer method [{GEOLOCATION}/LocateStream]"
    lost = raised(ExecuteBatchError('Failed "execute_batch": (<SendStatusFromServerOperation>,)'))
    assert not is_informative(grpc_record(message, lost))
    misuse = raised(ExecuteBatchError("Failed grpc_call_start_batch: 8 with grpc_call_error value: 'TOO_MANY'"))
    for record in (
        grpc_record(message, misuse),
        grpc_record(message, None),
        grpc_record(f"Unexpected [ValueError] raised by servicer method [{GEOLOCATION}/Locate]", ValueError()),
        record_of(message, error=lost),
    ):
        assert is_informative(record)


SERVE = """
    import sys
    from geosurge.server.process import serve
    from geosurge.settings import load_settings
    serve(load_settings(index=sys.argv[1], log_format=sys.argv[2], port=0, max_image_bytes=1000, drain_seconds=0))
"""


@contextmanager
def serving(bundle: Path, log_format: LogFormat, log: Path) -> Iterator[str]:
    """The address of a server process that logs into a file; it has stopped gracefully afterwards."""
    command = [sys.executable, "-c", textwrap.dedent(SERVE), str(bundle), log_format]
    # A pipe that nobody reads while the server is asked would fill up and halt it.
    with log.open("w") as file, subprocess.Popen(command, stderr=file) as process:
        try:
            while (address := re.search(r"\baddress\W+([\d.]+:\d+)", log.read_text())) is None:
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
            yield address[1]
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()


async def ask_everything(channel: grpc.aio.Channel) -> set[str]:
    """Asks what is answered and what is refused; returns what no log may show."""
    geolocation: Any = geolocation_pb2_grpc.GeolocationServiceStub(channel)
    cells: Any = cell_pb2_grpc.CellServiceStub(channel)
    image, vector = encoded_image(1, "JPEG", (20, 20)), pb.Embedding(values=embedding(0).tolist())
    assert len(image) <= 1000
    bad = [
        pb.LocateRequest(request_id="empty", image=b""),
        pb.LocateRequest(request_id="garbage", image=b"garbage of an image"),
        pb.LocateRequest(request_id="large", image=image + bytes(1000)),
        pb.LocateRequest(request_id="short", embedding=pb.Embedding(values=[0.1234567])),
        pb.LocateRequest(request_id="region", embedding=vector, options=pb.LocateOptions(region_tokens=["89c25a31"])),
        pb.LocateRequest(request_id="version", embedding=vector, options=pb.LocateOptions(index_version="a\nb")),
        pb.LocateRequest(request_id="option", embedding=vector, options=pb.LocateOptions(confidence_level=7.654321)),
        pb.LocateRequest(request_id=FORGED),
    ]
    good = [pb.LocateRequest(request_id="image", image=image), pb.LocateRequest(request_id=FORGED, embedding=vector)]
    answers = [await geolocation.Locate(request) for request in good]
    everything = [*bad, *good]
    stream = geolocation.LocateStream(iter([pb.LocateStreamRequest(requests=[request]) for request in everything]))
    answers += [item.response async for item in results(stream) if item.HasField("response")]
    assert len(answers) == 4
    places = [(48.8583701, 2.2944813), (91.2345678, 0.0), (float("nan"), 12.3456789)]
    refused: list[Callable[[], Any]] = [lambda request=request: geolocation.Locate(request) for request in bad]
    for latitude_deg, longitude_deg in places:
        coordinate = cell_pb2.Coordinate(latitude_deg=latitude_deg, longitude_deg=longitude_deg)
        refused.append(lambda coordinate=coordinate: cells.GetPath(cell_pb2.GetPathRequest(coordinate=coordinate)))
    refused.append(lambda: cells.GetCell(cell_pb2.GetCellRequest(token="89c25a31")))
    refused.append(lambda: channel.unary_unary(f"{GEOLOCATION}/Locate")(b"\xff\xff"))
    codes = []
    for ask in refused:
        try:
            await ask()
        except grpc.aio.AioRpcError as error:
            codes.append(error.code())
    assert len(codes) >= len(refused) - 1
    assert set(codes) == {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
    for delay in range(20):
        call = geolocation.Locate(good[0])
        await asyncio.sleep(delay / 5000)
        call.cancel()
    too_large = pb.LocateStreamRequest(requests=[pb.LocateRequest(request_id="huge", image=bytes(1_500_000))])
    for number in range(200):
        sent = [pb.LocateStreamRequest(requests=[good[1]])] * (number % 4)
        with suppress(grpc.aio.AioRpcError):
            _ = [item async for item in geolocation.LocateStream(iter([*sent, too_large]))]
    return secrets(answers, image)


def secrets(answers: list[pb.LocateResponse], image: bytes) -> set[str]:
    values = {"89c25a31", "0.12345", "7.65432", "48.8583", "2.29448", "91.2345", "12.3456", "garbage of"}
    values |= {repr(image[:6])[2:-1], base64.b64encode(image)[:8].decode(), image[:6].hex()}
    values |= {str(value)[:7] for value in embedding(0).tolist()}
    for answer in answers:
        numbers = [answer.location.latitude_deg, answer.location.longitude_deg, answer.location.radius_km]
        numbers += [number for leaf in answer.alternatives for number in (leaf.latitude_deg, leaf.longitude_deg)]
        values |= {str(number)[:7] for number in numbers}
        values |= {cell.token for cell in answer.path if len(cell.token) > 4}
        values |= {token for token in answer.credible_region.tokens if len(token) > 4}
        values |= {answer.location.place.city, answer.location.place.country} - {""}
    return values


@pytest.mark.parametrize("log_format", ["text", "json"])
async def test_a_servers_log_says_who_asked_and_never_what_or_where(
    bundle: Path, log_format: LogFormat, tmp_path: Path
) -> None:
    path = tmp_path / "log"
    with serving(bundle, log_format, path) as address:
        async with grpc.aio.insecure_channel(address) as channel:
            hidden = await ask_everything(channel)
    log = path.read_text()
    lines = log.removesuffix("\n").split("\n")
    assert len(hidden) > 20
    assert not [value for value in hidden if re.search(rf"(?<![\w.]){re.escape(value)}", log)]
    calls = [line for line in lines if f"{GEOLOCATION}/Locate" in line]
    assert len(calls) > 200
    if log_format == "json":
        parsed = [json.loads(line) for line in lines]
        assert {record["level"] for record in parsed} == {"INFO"}
        for record in (json.loads(line) for line in calls):
            assert {"method", "code", "duration_ms", "request_id", "index_version"} <= record.keys()
        first = json.loads(calls[0])
        assert (first["request_id"], first["index_version"], first["code"]) == ("image", "tiny", "OK")
        assert json.loads(calls[1])["request_id"] == FORGED
        assert (json.loads(calls[2])["items"], json.loads(calls[2])["failed_items"]) == (10, 8)
    else:
        assert all(RECORD.match(line) for line in lines)
        assert not [line for line in lines if " INFO " not in line or line.startswith("2030")]
        assert "code=OK" in calls[0]
        assert "request_id=image index_version=tiny" in calls[0]
        assert f"request_id={FORGED!r}" in calls[1]
        assert "items=10 failed_items=8" in calls[2]
