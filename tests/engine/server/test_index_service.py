from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from datetime import UTC
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from support.answers import question, reason_of
from support.bundles import CREATE_TIME, make_store
from support.processes import geolocation
from support.servers import embedding, running, settings_for

from geosurge import store as stores
from geosurge.v1 import index_pb2 as index
from geosurge.v1 import index_pb2_grpc

Code = grpc.StatusCode


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path / "store", {"a": None, "b": None})


@pytest.fixture
async def channel(store: Path) -> AsyncIterator[grpc.aio.Channel]:
    async with running(settings_for(store, scratch=store.parent)) as (_, channel):
        yield channel


def service(channel: grpc.aio.Channel) -> Any:
    return index_pb2_grpc.IndexServiceStub(channel)  # type: ignore[no-untyped-call]


async def failure(call: Any) -> tuple[Code, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), reason_of(caught.value)


async def states(channel: grpc.aio.Channel) -> dict[str, str]:
    response = await service(channel).ListVersions(index.ListVersionsRequest())
    return {
        version.name: index.VersionState.Name(version.state).removeprefix("VERSION_STATE_")
        for version in response.versions
    }


async def until(channel: grpc.aio.Channel, name: str, state: str) -> None:
    async with asyncio.timeout(60):
        while (await states(channel))[name] != state:
            await asyncio.sleep(0.01)


async def answering(channel: grpc.aio.Channel, version: str = "") -> str:
    answer = await geolocation(channel).Locate(question(embedding(0), version=version), timeout=60)
    return str(answer.index_version)


async def test_a_version_is_loaded_pinned_activated_rolled_back_and_unloaded(
    channel: grpc.aio.Channel, store: Path
) -> None:
    stub = service(channel)
    listed = await stub.ListVersions(index.ListVersionsRequest())
    assert listed.active_version == "a"
    assert [version.name for version in listed.versions] == ["a", "b"]
    assert listed.versions[1].create_time.ToDatetime(tzinfo=UTC) == CREATE_TIME
    assert await states(channel) == {"a": "ACTIVE", "b": "UNLOADED"}

    assert (await stub.LoadVersion(index.LoadVersionRequest(name="b"))).version.name == "b"
    await until(channel, "b", "READY")
    assert (await answering(channel), await answering(channel, "b")) == ("a", "b")

    activated = await stub.ActivateVersion(index.ActivateVersionRequest(name="b"))
    assert (activated.version.name, activated.previous_version) == ("b", "a")
    assert activated.version.state == index.VERSION_STATE_ACTIVE
    assert await answering(channel) == stores.current(store) == "b"

    rolled_back = await stub.RollbackVersion(index.RollbackVersionRequest())
    assert (rolled_back.version.name, rolled_back.previous_version) == ("a", "b")
    assert await answering(channel) == stores.current(store) == "a"

    await stub.UnloadVersion(index.UnloadVersionRequest(name="b"))
    await until(channel, "b", "UNLOADED")
    seen = (await stub.GetVersion(index.GetVersionRequest(name="b"))).version
    assert (seen.request_count, seen.state) == (0, index.VERSION_STATE_UNLOADED)
    assert seen.memory_bytes > 0


async def test_a_canary_gets_its_share_until_it_is_ended(channel: grpc.aio.Channel) -> None:
    stub = service(channel)
    await stub.LoadVersion(index.LoadVersionRequest(name="b"))
    await until(channel, "b", "READY")
    canary = await stub.SetCanary(index.SetCanaryRequest(name="b", share=0.5))
    assert canary.version.canary_share == 0.5

    async def versions() -> list[str]:
        asked = [question(embedding(0), request_id=str(number)) for number in range(100)]
        answers = await asyncio.gather(*(geolocation(channel).Locate(request, timeout=60) for request in asked))
        return [answer.index_version for answer in answers]

    first = await versions()
    assert 30 < first.count("b") < 70
    assert await versions() == first
    assert await failure(stub.UnloadVersion(index.UnloadVersionRequest(name="b"))) == (
        Code.FAILED_PRECONDITION,
        "VERSION_IN_USE",
    )
    assert not (await stub.SetCanary(index.SetCanaryRequest())).HasField("version")
    assert await versions() == ["a"] * 100


async def test_what_cannot_be_done_is_refused_with_its_reason(channel: grpc.aio.Channel, store: Path) -> None:
    stub = service(channel)
    level = store / "b" / "level-2.faiss"
    level.write_bytes(level.read_bytes()[:-1] + b"x")
    for call, expected in (
        (stub.GetVersion(index.GetVersionRequest()), (Code.INVALID_ARGUMENT, "OPTION_OUT_OF_RANGE")),
        (stub.GetVersion(index.GetVersionRequest(name="x" * 256)), (Code.INVALID_ARGUMENT, "OPTION_OUT_OF_RANGE")),
        (stub.SetCanary(index.SetCanaryRequest(name="x" * 256)), (Code.INVALID_ARGUMENT, "OPTION_OUT_OF_RANGE")),
        (stub.LoadVersion(index.LoadVersionRequest(name="c")), (Code.NOT_FOUND, "BUNDLE_NOT_FOUND")),
        (stub.UnloadVersion(index.UnloadVersionRequest(name="a")), (Code.FAILED_PRECONDITION, "VERSION_IN_USE")),
        (stub.SetCanary(index.SetCanaryRequest(name="b")), (Code.FAILED_PRECONDITION, "VERSION_NOT_LOADED")),
        (stub.SetCanary(index.SetCanaryRequest(name="b", share=2)), (Code.INVALID_ARGUMENT, "OPTION_OUT_OF_RANGE")),
        (stub.RollbackVersion(index.RollbackVersionRequest()), (Code.FAILED_PRECONDITION, "STORE_INVALID")),
        (stub.ActivateVersion(index.ActivateVersionRequest(name="b")), (Code.FAILED_PRECONDITION, "BUNDLE_CORRUPT")),
    ):
        assert await failure(call) == expected
    seen = (await stub.GetVersion(index.GetVersionRequest(name="b"))).version
    info = error_details_pb2.ErrorInfo()
    assert seen.state == index.VERSION_STATE_FAILED
    assert seen.failure.details[0].Unpack(info)
    assert info.reason == "BUNDLE_CORRUPT"
    assert "level-2.faiss" in seen.failure.message
    assert await answering(channel) == "a"
    shutil.rmtree(store / "b")
    assert await failure(stub.ActivateVersion(index.ActivateVersionRequest(name="b"))) == (
        Code.NOT_FOUND,
        "BUNDLE_NOT_FOUND",
    )


async def test_clients_are_told_names_and_no_paths(channel: grpc.aio.Channel, store: Path) -> None:
    stub = service(channel)
    level = store / "b" / "level-2.faiss"
    level.write_bytes(level.read_bytes()[:-1] + b"x")
    (store / "c").mkdir()
    said = []
    for method, request in (
        (stub.ActivateVersion, index.ActivateVersionRequest(name="b")),
        (stub.ActivateVersion, index.ActivateVersionRequest(name="c")),
        (stub.LoadVersion, index.LoadVersionRequest(name="nowhere")),
        (stub.RollbackVersion, index.RollbackVersionRequest()),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await method(request)
        said.append(str(caught.value.details()))
    said += [version.failure.message for version in (await stub.ListVersions(index.ListVersionsRequest())).versions]
    assert not [text for text in said if str(store.parent) in text]
    for expected in (
        "b/level-2.faiss has another SHA-256 than recorded",
        "the store has no bundle 'nowhere'",
        "no bundle of the store was active before 'a'",
        "c has no manifest.json",
    ):
        assert any(expected in text for text in said), (expected, said)


async def test_a_full_scratch_directory_is_not_named(store: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "private"
    scratch.mkdir()
    async with running(settings_for(store, scratch=scratch)) as (_, channel):
        scratch.rmdir()
        scratch.write_text("in the way")
        with pytest.raises(grpc.aio.AioRpcError, match="the private copy in the scratch directory") as caught:
            await service(channel).ActivateVersion(index.ActivateVersionRequest(name="b"))
    assert str(tmp_path) not in str(caught.value.details())
