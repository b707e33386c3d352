"""What a server counts and measures, for Prometheus.

| metric | labels | meaning |
|---|---|---|
| `geosurge_calls_total` | method, code | calls that ended, by the name of their gRPC status code |
| `geosurge_call_seconds` | method | histogram of their durations; a stream lasts until its client ends it |
| `geosurge_refusals_total` | reason | calls ended on purpose with an error, by `ErrorInfo.reason` |
| `geosurge_failed_items_total` | reason | items of streams answered with an error, by `ErrorInfo.reason` |
| `geosurge_stage_seconds` | stage | histogram of times: decode and queue of a request, encode and search of a batch |
| `geosurge_batch_size` | stage | histogram of the number of requests in a batch; its `_sum` counts requests |
| `geosurge_load_seconds` | outcome | histogram of the time of loads (ready, failed, superseded); `_count` counts them |
| `geosurge_swaps_total` | kind | changes of what is served: activate, rollback, unload, ... |
| `geosurge_active_version` | version | 1 for the version that answers requests which name none; no other is listed |
| `geosurge_queue_length` | | requests that wait for a batch |
| `geosurge_permits_in_use` | | requests admitted and not yet answered |
| `geosurge_versions_loaded` | | index versions in memory |
| `process_*`, `python_*` | | resident memory (`process_resident_memory_bytes`), CPU, files, garbage collector |

What gRPC refuses by itself is not seen as such: a unary message over the transport's limit is not counted at all, and a
stream with one counts as CANCELLED or OK.

The values of every label come from the engine, never from a client: a method that the API does not have is ``other``,
and so is a reason that `geosurge.errors` does not have.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Final, Literal

import grpc
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)

from geosurge.errors import GeoSurgeError
from geosurge.v1 import cell_pb2, geolocation_pb2, index_pb2

Stage = Literal["decode", "queue", "encode", "search"]
LoadOutcome = Literal["ready", "failed", "superseded"]
Watched = Literal["queue_length", "permits_in_use", "versions_loaded"]

OTHER: Final = "other"
"""Label of whatever the engine does not know."""

METHODS: Final = frozenset(
    f"/{service.full_name}/{method.name}"
    for file in (geolocation_pb2, cell_pb2, index_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
)
"""Methods of the engine's own services, as gRPC names them."""

_CODES: Final = frozenset(code.name for code in grpc.StatusCode)
_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_LOAD_SECONDS: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_BATCH_SIZES: Final = tuple(float(1 << power) for power in range(13))
_WATCHED: Final[dict[Watched, str]] = {
    "queue_length": "Requests that wait for a batch.",
    "permits_in_use": "Requests admitted and not yet answered.",
    "versions_loaded": "Index versions in memory.",
}


class Metrics:
    """The numbers of one server, in a registry of their own; every method may be called from any thread."""

    def __init__(self) -> None:
        self.registry: Final = CollectorRegistry()
        """What a scrape reads."""
        self._reasons = frozenset(_reasons(GeoSurgeError))
        self._calls = Counter("geosurge_calls", "Calls that ended.", ["method", "code"], registry=self.registry)
        self._call_seconds = Histogram(
            "geosurge_call_seconds", "Duration of calls.", ["method"], registry=self.registry, buckets=_SECONDS
        )
        self._refusals = Counter(
            "geosurge_refusals", "Calls ended on purpose with an error.", ["reason"], registry=self.registry
        )
        self._failed_items = Counter(
            "geosurge_failed_items", "Items of streams answered with an error.", ["reason"], registry=self.registry
        )
        self._stage_seconds = Histogram(
            "geosurge_stage_seconds", "Time of each stage.", ["stage"], registry=self.registry, buckets=_SECONDS
        )
        self._batch_size = Histogram(
            "geosurge_batch_size",
            "Requests worked on together.",
            ["stage"],
            registry=self.registry,
            buckets=_BATCH_SIZES,
        )
        self._load_seconds = Histogram(
            "geosurge_load_seconds",
            "Time of loads of index versions.",
            ["outcome"],
            registry=self.registry,
            buckets=_LOAD_SECONDS,
        )
        self._swaps = Counter("geosurge_swaps", "Changes of what is served.", ["kind"], registry=self.registry)
        self._active_version = Gauge(
            "geosurge_active_version",
            "1 for the version that answers requests which name none.",
            ["version"],
            registry=self.registry,
        )
        self._activating = threading.Lock()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def call_ended(self, method: str, code: str, seconds: float) -> None:
        """Counts a call of ``/package.Service/Method`` that ended with a gRPC status code."""
        method = method if method in METHODS else OTHER
        self._calls.labels(method, code if code in _CODES else OTHER).inc()
        self._call_seconds.labels(method).observe(seconds)

    def refused(self, reason: str) -> None:
        """Counts a call that ended on purpose with an error."""
        self._refusals.labels(self._known(reason)).inc()

    def item_failed(self, reason: str) -> None:
        """Counts an item of a stream that was answered with an error."""
        self._failed_items.labels(self._known(reason)).inc()

    def stage(self, name: Stage, seconds: float) -> None:
        """Measures the time that a request, or a batch, spent in a stage."""
        self._stage_seconds.labels(name).observe(seconds)

    def batch(self, stage: Stage, size: int) -> None:
        """Measures how many requests a stage worked on together."""
        self._batch_size.labels(stage).observe(size)

    def load_ended(self, outcome: LoadOutcome, seconds: float) -> None:
        """Measures the load of an index version."""
        self._load_seconds.labels(outcome).observe(seconds)

    def swapped(self, kind: str) -> None:
        """Counts a change of what is served; ``kind`` is a word of the engine's own, never a client's."""
        self._swaps.labels(kind).inc()

    def set_active(self, version: str) -> None:
        """Names the active version; empty when there is none."""
        with self._activating:
            self._active_version.clear()
            if version:
                self._active_version.labels(version).set(1)

    def watch(self, name: Watched, read: Callable[[], float]) -> None:
        """Publishes a number that every scrape reads afresh.

        Args:
            name: What it is; each can be watched once.
            read: Returns it; called on the threads that scrape, so that it must not wait for the event loop.
        """
        Gauge(f"geosurge_{name}", _WATCHED[name], registry=self.registry).set_function(read)

    def _known(self, reason: str) -> str:
        return reason if reason in self._reasons else OTHER


def _reasons(error: type[GeoSurgeError]) -> Iterator[str]:
    yield error.reason
    for kind in error.__subclasses__():
        yield from _reasons(kind)
