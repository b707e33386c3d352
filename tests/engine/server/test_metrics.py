from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import pytest
from google.protobuf import descriptor_pool
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from support.processes import results
from support.servers import embedding, encoded_image, running, settings_for

from geosurge.errors import GeoSurgeError, ImageEmptyError, OverloadedError
from geosurge.server import metrics as module
from geosurge.server.app import INDEX_SERVICE_NAME, SERVICE_NAMES
from geosurge.server.metrics import METHODS, Metrics
from geosurge.v1 import geolocation_pb2 as pb
from geosurge.v1 import geolocation_pb2_grpc

LOCATE = "/geosurge.v1.GeolocationService/Locate"

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples_of(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(address: str) -> Samples:
    with urlopen(f"http://{address}/metrics", timeout=10) as response:
        return samples_of(response.read().decode())


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((f"geosurge_{name}", frozenset(labels.items())), 0.0)


def everything(metrics: Metrics) -> Metrics:
    """The metrics after one of everything that they can be told."""
    metrics.call_ended(LOCATE, "OK", 0.002)
    metrics.refused(OverloadedError.reason)
    metrics.item_failed(ImageEmptyError.reason)
    metrics.stage("decode", 0.01)
    metrics.batch("encode", 8)
    metrics.load_ended("ready", 2.0)
    metrics.swapped("activate")
    metrics.set_active("tiny")
    metrics.watch("queue_length", lambda: 3)
    metrics.watch("permits_in_use", lambda: 2)
    metrics.watch("versions_loaded", lambda: 1)
    return metrics


def read(metrics: Metrics) -> Samples:
    return samples_of(generate_latest(metrics.registry).decode())


def test_what_it_is_told_is_what_a_scrape_reads() -> None:
    samples = read(everything(Metrics()))
    assert value(samples, "calls_total", method=LOCATE, code="OK") == 1
    assert value(samples, "call_seconds_sum", method=LOCATE) == 0.002
    assert value(samples, "call_seconds_bucket", method=LOCATE, le="0.001") == 0
    assert value(samples, "call_seconds_bucket", method=LOCATE, le="0.0025") == 1
    assert value(samples, "refusals_total", reason="OVERLOADED") == 1
    assert value(samples, "failed_items_total", reason="IMAGE_EMPTY") == 1
    assert value(samples, "stage_seconds_count", stage="decode") == 1
    assert value(samples, "batch_size_sum", stage="encode") == 8
    assert value(samples, "load_seconds_sum", outcome="ready") == 2
    assert value(samples, "swaps_total", kind="activate") == 1
    assert [value(samples, name) for name in ("queue_length", "permits_in_use", "versions_loaded")] == [3, 2, 1]
    assert samples["process_resident_memory_bytes", frozenset()] > 1e6


def test_the_table_lists_every_metric() -> None:
    families = text_string_to_metric_families(generate_latest(everything(Metrics()).registry).decode())
    exported = {family.name + "_total" * (family.type == "counter") for family in families}
    own = {name for name in exported if name.startswith("geosurge_") and not name.endswith("_created")}
    assert module.__doc__ is not None
    assert set(re.findall(r"^\| `(geosurge_\w+)`", module.__doc__, re.MULTILINE)) == own
    assert {name.split("_")[0] for name in exported - own} == {"geosurge", "process", "python"}


def test_what_a_client_chooses_is_no_label() -> None:
    metrics = Metrics()
    for number in range(100):
        metrics.call_ended(f"/geosurge.v1.Nonsense/{number}", f"CODE_{number}", 0.0)
        metrics.refused(f"REASON_{number}")
        metrics.item_failed(f"REASON_{number}")
    samples = read(metrics)
    assert value(samples, "calls_total", method="other", code="other") == 100
    assert value(samples, "refusals_total", reason="other") == 100
    assert value(samples, "failed_items_total", reason="other") == 100


def test_every_method_and_every_reason_has_its_label() -> None:
    pool = descriptor_pool.Default()
    services = [pool.FindServiceByName(name) for name in (*SERVICE_NAMES, INDEX_SERVICE_NAME)]
    assert {f"/{service.full_name}/{method.name}" for service in services for method in service.methods} == METHODS
    metrics = Metrics()
    for error in (GeoSurgeError, ImageEmptyError, OverloadedError):
        metrics.refused(error.reason)
        assert value(read(metrics), "refusals_total", reason=error.reason) == 1


def test_only_the_active_version_is_listed() -> None:
    metrics = Metrics()
    for version in ("old", "new", ""):
        metrics.set_active(version)
        listed = {
            labels: number for (name, labels), number in read(metrics).items() if name == "geosurge_active_version"
        }
        assert listed == ({frozenset({("version", version)}): 1.0} if version else {})


def test_servers_in_one_process_count_for_themselves() -> None:
    first, second = Metrics(), Metrics()
    first.swapped("activate")
    assert value(read(first), "swaps_total", kind="activate") == 1
    assert value(read(second), "swaps_total", kind="activate") == 0


async def counted(address: str, searched: int) -> Samples:
    """Metrics, once so many requests are counted as searched, and any as encoded."""
    deadline = time.monotonic() + 30
    while True:
        metrics = scrape(address)
        sums = [value(metrics, "batch_size_sum", stage=stage) for stage in ("search", "encode")]
        if (sums[0] >= searched and sums[1] >= 1) or time.monotonic() > deadline:
            return metrics
        await asyncio.sleep(0.01)


async def test_a_scrape_says_what_the_server_did(bundle: Path) -> None:
    async with running(settings_for(bundle, metrics_port=0, max_concurrent_requests=40)) as (server, channel):
        stub: Any = geolocation_pb2_grpc.GeolocationServiceStub(channel)
        # A stage counts a batch after it has handed it on; the first one is that of the warm-up.
        before = await counted(server.metrics_address, 1)
        vector = pb.Embedding(values=embedding(0).tolist())
        await stub.Locate(pb.LocateRequest(image=encoded_image(1)))
        for _ in range(2):
            await stub.Locate(pb.LocateRequest(embedding=vector))
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Locate(pb.LocateRequest(embedding=pb.Embedding(values=[1.0])))
        items = [pb.LocateStreamRequest(requests=[pb.LocateRequest(embedding=vector)])] * 5
        assert len([item async for item in results(stub.LocateStream(iter(items)))]) == 5
        after = await counted(server.metrics_address, 9)

    def grown(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert grown("calls_total", method=LOCATE, code="OK") == 3
    assert grown("calls_total", method=LOCATE, code="INVALID_ARGUMENT") == 1
    assert grown("calls_total", method=LOCATE + "Stream", code="OK") == 1
    assert grown("call_seconds_count", method=LOCATE) == 4
    assert grown("refusals_total", reason="EMBEDDING_INVALID") == 1
    assert grown("stage_seconds_count", stage="decode") == 1
    assert grown("stage_seconds_count", stage="queue") == 8
    assert grown("batch_size_sum", stage="encode") == 1
    assert grown("batch_size_sum", stage="search") == 8
    assert grown("stage_seconds_count", stage="search") == grown("batch_size_count", stage="search")
    assert value(after, "active_version", version="tiny") == 1
    assert value(after, "load_seconds_count", outcome="ready") == 1
    assert value(after, "versions_loaded") == 1
    assert value(after, "queue_length") == 0
    assert value(after, "permits_in_use") == 0
    assert after["process_resident_memory_bytes", frozenset()] > 1e6
