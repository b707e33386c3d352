from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from support.bundles import make_bundle
from support.processes import results
from support.servers import background_server, embedding, encoded_image, running, settings_for

from geosurge.errors import BundleError, ConfigurationError, GeoSurgeError
from geosurge.server.app import INDEX_SERVICE_NAME, SERVICE_NAMES, Server
from geosurge.v1 import geolocation_pb2 as pb
from geosurge.v1 import geolocation_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING


NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def geolocation(channel: grpc.aio.Channel) -> Any:
    return geolocation_pb2_grpc.GeolocationServiceStub(channel)


async def health_of(channel: grpc.aio.Channel, service: str = "") -> int:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    response = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    return int(response.status)


def request(request_id: str = "") -> pb.LocateRequest:
    return pb.LocateRequest(request_id=request_id, embedding=pb.Embedding(values=embedding(0).tolist()))


async def test_health_is_serving_only_after_a_real_inference(bundle: Path) -> None:
    server = Server(settings_for(bundle))
    try:
        await server.listen()
        async with grpc.aio.insecure_channel(server.address) as channel:
            for service in ("", *SERVICE_NAMES):
                assert await health_of(channel, service) == NOT_SERVING
            await server.warm_up()
            for service in ("", *SERVICE_NAMES):
                assert await health_of(channel, service) == SERVING
            with pytest.raises(grpc.aio.AioRpcError) as unknown:
                await health_of(channel, "no.such.Service")
            assert unknown.value.code() == grpc.StatusCode.NOT_FOUND
    finally:
        await server.stop(grace_seconds=0)


async def test_a_failing_warm_up_never_reports_serving(bundle: Path) -> None:
    server = Server(settings_for(bundle))
    try:
        await server.listen()
        server._versions.active.locator.index.close()
        async with grpc.aio.insecure_channel(server.address) as channel:
            with pytest.raises(GeoSurgeError):
                await server.warm_up()
            assert await health_of(channel) == NOT_SERVING
    finally:
        await server.stop(grace_seconds=0)


async def test_reflection_lists_the_services_and_describes_their_messages(bundle: Path) -> None:
    with background_server(settings_for(bundle)) as address, grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = set(database.get_services())
        assert services == {
            *SERVICE_NAMES,
            INDEX_SERVICE_NAME,
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        pool = DescriptorPool(database)
        for name in SERVICE_NAMES:
            assert pool.FindServiceByName(name).methods
        assert "region_tokens" in pool.FindMessageTypeByName("geosurge.v1.LocateOptions").fields_by_name


async def test_stopping_turns_health_first_and_still_answers_while_draining(bundle: Path) -> None:
    async with running(settings_for(bundle)) as (server, channel):
        assert await health_of(channel) == SERVING
        stopping = asyncio.create_task(server.stop(drain_seconds=1.5))
        await asyncio.sleep(0.1)
        assert await health_of(channel) == NOT_SERVING
        assert (await geolocation(channel).Locate(request())).index_version == "tiny"
        await stopping
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await geolocation(channel).Locate(request(), timeout=5)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_stop_answers_what_a_stream_has_sent_and_then_ends_it(bundle: Path) -> None:
    async with running(settings_for(bundle, grace_seconds=20)) as (server, channel):
        endless = asyncio.Event()
        release = asyncio.Event()
        loop = asyncio.get_running_loop()
        blocking = asyncio.wrap_future(
            server._batcher._search.call(lambda: asyncio.run_coroutine_threadsafe(release.wait(), loop).result())
        )

        async def send() -> AsyncIterator[pb.LocateStreamRequest]:
            for number in range(3):
                yield pb.LocateStreamRequest(requests=[request(str(number))])
            await endless.wait()

        call = geolocation(channel).LocateStream(send())
        while server._admission.in_use < 3:
            await asyncio.sleep(0.01)
        begun = time.monotonic()
        stopping = asyncio.create_task(server.stop())
        await asyncio.sleep(0.1)
        assert not stopping.done()
        release.set()
        answered = results(call)
        assert [(await anext(answered)).response.request_id for _ in range(3)] == ["0", "1", "2"]
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await anext(answered)
        await stopping
        await blocking
        assert time.monotonic() - begun < 15
        assert ended.value.code() == grpc.StatusCode.UNAVAILABLE
        assert b"SHUTTING_DOWN" in dict(ended.value.trailing_metadata())["grpc-status-details-bin"]


async def test_a_stop_that_is_abandoned_drains_no_longer(bundle: Path) -> None:
    async with running(settings_for(bundle)) as (server, channel):
        stopping = asyncio.create_task(server.stop(drain_seconds=300))
        await asyncio.sleep(0.1)
        assert (await geolocation(channel).Locate(request())).index_version == "tiny"
        assert not stopping.done()
        await server.abandon()
        await asyncio.wait_for(stopping, 20)


async def test_an_open_health_watch_does_not_hold_up_a_stop(bundle: Path) -> None:
    async with running(settings_for(bundle, grace_seconds=20)) as (server, channel):
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        begun = time.monotonic()
        await server.stop()
        assert time.monotonic() - begun < 15
        assert (await watch.read()).status == NOT_SERVING
        assert await watch.code() == grpc.StatusCode.UNAVAILABLE


async def test_calls_that_outlast_the_grace_are_cancelled(bundle: Path) -> None:
    async with running(settings_for(bundle)) as (server, channel):
        held = [server._admission.take() for _ in range(server.settings.max_concurrent_requests)]
        call = geolocation(channel).LocateStream(iter([pb.LocateStreamRequest(requests=[request()])]))
        await asyncio.sleep(0.1)
        await asyncio.wait_for(server.stop(grace_seconds=0.2), 20)
        assert await call.code() != grpc.StatusCode.OK
        for permit in held:
            permit.release()


async def test_two_servers_do_not_share_a_port(bundle: Path) -> None:
    async with running(settings_for(bundle)) as (server, _):
        port = int(server.address.rpartition(":")[2])
        with pytest.raises(ConfigurationError, match=f"cannot listen on 127.0.0.1:{port}"):
            await Server(settings_for(bundle, port=port)).start()


async def test_a_bad_bundle_is_refused_before_anything_is_served(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "tiny")
    level = bundle / "level-3.faiss"
    level.write_bytes(level.read_bytes()[:-7])
    with pytest.raises(BundleError, match=r"level-3\.faiss"):
        await Server(settings_for(bundle)).start()
    with pytest.raises(BundleError), background_server(settings_for(tmp_path / "missing")):
        pytest.fail("it must not start")


async def test_an_image_over_the_limit_gets_its_own_reason_and_a_huge_message_that_of_the_transport(
    bundle: Path,
) -> None:
    async with running(settings_for(bundle, max_image_bytes=100_000)) as (_, channel):
        stub = geolocation(channel)
        with pytest.raises(grpc.aio.AioRpcError) as over:
            await stub.Locate(pb.LocateRequest(image=encoded_image(1) + bytes(200_000)))
        assert over.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.aio.AioRpcError) as huge:
            await stub.Locate(pb.LocateRequest(image=bytes(3_000_000)))
        assert huge.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "grpc-status-details-bin" not in dict(huge.value.trailing_metadata())
        assert (await stub.Locate(request())).index_version == "tiny"
