from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support.processes import results
from support.servers import embedding, encoded_image

from geosurge.server.app import Server
from geosurge.v1 import geolocation_pb2 as pb
from geosurge.v1 import geolocation_pb2_grpc

Live = tuple[Server, grpc.aio.Channel]

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"


@pytest.fixture(scope="module")
def exporter() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    yield exporter
    provider.shutdown()


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> InMemorySpanExporter:
    exporter.clear()
    return exporter


def call_spans(spans: InMemorySpanExporter) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.kind is trace.SpanKind.SERVER]


async def test_a_call_is_a_span_with_its_stages_below_it(spans: InMemorySpanExporter, live: Live) -> None:
    stub: Any = geolocation_pb2_grpc.GeolocationServiceStub(live[1])
    response = await stub.Locate(pb.LocateRequest(request_id="a", image=encoded_image(1)))
    [call] = call_spans(spans)
    assert call.name == "geosurge.v1.GeolocationService/Locate"
    assert call.attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": "geosurge.v1.GeolocationService/Locate",
        "rpc.response.status_code": "OK",
        "geosurge.request_id": "a",
        "geosurge.index_version": "tiny",
    }
    stages = [span for span in spans.get_finished_spans() if span is not call]
    assert [stage.name for stage in stages] == ["decode", "queue", "encode", "search", "posterior"]
    assert call.start_time is not None
    moment = None
    for stage in stages:
        assert stage.parent == call.get_span_context()
        assert stage.start_time is not None
        assert stage.end_time is not None
        assert stage.start_time >= call.start_time
        assert moment in (None, stage.start_time)
        moment = stage.end_time
        milliseconds = getattr(response.timings, f"{stage.name}_ms")
        assert stage.end_time - stage.start_time == pytest.approx(1e6 * milliseconds, abs=1)


async def test_stages_that_were_not_needed_are_left_out(spans: InMemorySpanExporter, live: Live) -> None:
    stub: Any = geolocation_pb2_grpc.GeolocationServiceStub(live[1])
    await stub.Locate(pb.LocateRequest(embedding=pb.Embedding(values=embedding(0).tolist())))
    assert {"decode", "encode"}.isdisjoint(span.name for span in spans.get_finished_spans())


async def test_the_callers_trace_is_continued(spans: InMemorySpanExporter, live: Live) -> None:
    stub: Any = geolocation_pb2_grpc.GeolocationServiceStub(live[1])
    metadata = (("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01"), ("other-bin", b"\x00"))
    await stub.GetInfo(pb.GetInfoRequest(), metadata=metadata)
    await stub.GetInfo(pb.GetInfoRequest(), metadata=(("traceparent", "not one"),))
    await stub.GetInfo(pb.GetInfoRequest())
    continued, *own = call_spans(spans)
    assert continued.parent is not None
    assert trace.format_trace_id(continued.parent.trace_id) == TRACE_ID
    assert trace.format_span_id(continued.parent.span_id) == PARENT_ID
    assert [span.parent for span in own] == [None, None]
    assert len({span.context.trace_id for span in own if span.context}) == 2


async def test_only_a_failure_of_the_engine_is_one_of_the_span(
    spans: InMemorySpanExporter, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, channel = live
    stub: Any = geolocation_pb2_grpc.GeolocationServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.Locate(pb.LocateRequest(embedding=pb.Embedding(values=[12.3456])))
    monkeypatch.setattr(server._versions, "acquire", None)
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.GetInfo(pb.GetInfoRequest())
    refused, failed = call_spans(spans)
    for span, code in ((refused, "INVALID_ARGUMENT"), (failed, "INTERNAL")):
        assert span.attributes is not None
        assert span.attributes["rpc.response.status_code"] == code
        assert not span.events
    assert refused.status.status_code is trace.StatusCode.UNSET
    assert failed.status.status_code is trace.StatusCode.ERROR
    assert "12.3456" not in refused.to_json()


async def test_a_stream_is_one_span(spans: InMemorySpanExporter, live: Live) -> None:
    stub: Any = geolocation_pb2_grpc.GeolocationServiceStub(live[1])
    images = (encoded_image(1), b"", encoded_image(2))
    items = [pb.LocateStreamRequest(requests=[pb.LocateRequest(image=image)]) for image in images]
    assert len([item async for item in results(stub.LocateStream(iter(items)))]) == 3
    [call] = spans.get_finished_spans()
    assert call.attributes is not None
    assert call.attributes["geosurge.items"] == 3
    assert call.attributes["geosurge.failed_items"] == 1


PROGRAM = """
    from geosurge.errors import ConfigurationError
    from geosurge.server import tracing
    from geosurge.v1 import geolocation_pb2

    try:
        tracing.configure_tracing()
    except ConfigurationError as error:
        raise SystemExit(str(error))
    with tracing.span("call", metadata=[("traceparent", "00-{trace}-{parent}-01")]):
        tracing.annotate({{"geosurge.request_id": "a"}}, failed=True)
        tracing.record_stages(geolocation_pb2.Timings(decode_ms=2.0), begun_ns=1)
"""


def run(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    program = textwrap.dedent(program).format(trace=TRACE_ID, parent=PARENT_ID)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")} | variables
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_environment_says_where_spans_go() -> None:
    process = run(PROGRAM, OTEL_TRACES_EXPORTER="console", OTEL_SERVICE_NAME="a service")
    assert process.returncode == 0, process.stderr
    decoder, text, spans = json.JSONDecoder(), process.stdout.strip(), []
    while text:
        span, end = decoder.raw_decode(text)
        spans.append(span)
        text = text[end:].strip()
    assert [span["name"] for span in spans] == ["decode", "call"]
    assert {span["context"]["trace_id"] for span in spans} == {f"0x{TRACE_ID}"}
    assert spans[1]["kind"] == "SpanKind.SERVER"
    assert spans[1]["status"] == {"status_code": "ERROR"}
    assert spans[1]["resource"]["attributes"]["service.name"] == "a service"


@pytest.mark.parametrize("variables", [{}, {"OTEL_TRACES_EXPORTER": "none"}])
def test_nothing_is_sent_unless_it_does(variables: dict[str, str]) -> None:
    process = run(PROGRAM + "    import sys; assert 'opentelemetry.sdk.trace' not in sys.modules\n", **variables)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


def test_an_exporter_that_is_not_there_is_a_configuration_error() -> None:
    process = run(PROGRAM, OTEL_TRACES_EXPORTER="pigeons")
    assert process.returncode == 1
    assert "OTEL_TRACES_EXPORTER is 'pigeons', which is not installed; install geosurge[tracing]" in process.stderr
    assert "console, none" in process.stderr


def test_without_opentelemetry_nothing_happens() -> None:
    process = run("import sys; sys.modules['opentelemetry'] = None\n" + textwrap.dedent(PROGRAM))
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
