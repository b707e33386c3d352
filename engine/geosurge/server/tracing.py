"""OpenTelemetry spans, where OpenTelemetry is installed: one for each call, and below it one for each stage of it.

``pip install 'geosurge[tracing]'`` installs it; nothing happens without it. Its usual variables say where spans go::

    OTEL_TRACES_EXPORTER=otlp_proto_grpc OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4317 OTEL_SERVICE_NAME=geosurge

``OTEL_TRACES_EXPORTER=console`` prints them, and OTEL_TRACES_SAMPLER says which calls are traced. A process that has a
tracer provider already keeps it. A caller's ``traceparent`` is continued. Spans hold what log lines hold: methods,
codes, request ids and index versions; never what an image showed or where it was.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Final

from geosurge.errors import ConfigurationError
from geosurge.v1 import geolocation_pb2

try:
    from opentelemetry import propagate, trace
except ImportError:
    _installed = False
else:
    _installed = True

TRACER: Final = "geosurge"
EXPORTER_VARIABLE: Final = "OTEL_TRACES_EXPORTER"
EXPORTER_GROUP: Final = "opentelemetry_traces_exporter"

Attribute = str | int | float | bool


def configure_tracing() -> None:
    """Sends spans where the environment says; does nothing where it says nothing or the process has a provider.

    Raises:
        ConfigurationError: What the environment asks for is not installed.
    """
    name = os.environ.get(EXPORTER_VARIABLE, "none")
    if name == "none" or _is_enabled():
        return
    exporters = entry_points(group=EXPORTER_GROUP)
    if name not in exporters.names:
        raise ConfigurationError(
            f"{EXPORTER_VARIABLE} is {name!r}, which is not installed; install geosurge[tracing], or choose one of "
            f"{', '.join(sorted({'none', *exporters.names}))}"
        )
    from opentelemetry.sdk.trace import TracerProvider, export  # noqa: PLC0415 - only an exporter needs the SDK

    provider = TracerProvider()
    provider.add_span_processor(export.BatchSpanProcessor(exporters[name].load()()))
    trace.set_tracer_provider(provider)


@contextmanager
def span(name: str, *, metadata: Iterable[tuple[str, str | bytes]] | None = None) -> Iterator[None]:
    """Traces a ``with`` block; one that answers a call continues the trace that the call's metadata names."""
    if not _is_enabled():
        yield
        return
    with trace.get_tracer(TRACER).start_as_current_span(
        name,
        context=propagate.extract({key: value for key, value in metadata or () if isinstance(value, str)}),
        kind=trace.SpanKind.SERVER if metadata is not None else trace.SpanKind.INTERNAL,
        # Messages of errors quote what a client sent.
        record_exception=False,
        set_status_on_exception=False,
    ):
        yield


def annotate(attributes: Mapping[str, Attribute], *, failed: bool = False) -> None:
    """Adds attributes to the current span; ``failed`` marks it as an error of the engine."""
    if _is_enabled():
        current = trace.get_current_span()
        current.set_attributes(attributes)
        if failed:
            current.set_status(trace.StatusCode.ERROR)


def record_stages(timings: geolocation_pb2.Timings, *, begun_ns: int) -> None:
    """Adds a span for each stage below the current one, end to end from ``begun_ns`` (nanoseconds since the epoch)."""
    if not (_is_enabled() and trace.get_current_span().is_recording()):
        return
    for stage in ("decode", "queue", "encode", "search", "posterior"):
        if duration_ns := round(1e6 * getattr(timings, f"{stage}_ms")):
            child = trace.get_tracer(TRACER).start_span(stage, start_time=begun_ns)
            begun_ns += duration_ns
            child.end(begun_ns)


def _is_enabled() -> bool:
    return _installed and not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
