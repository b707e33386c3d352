from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.bundles import CREATE_TIME, make_store
from support.processes import wait_until
from support.servers import background_server, embedding, settings_for

from geosurge.client import Client, IndexClient
from geosurge.errors import (
    BundleCorruptError,
    BundleNotFoundError,
    OptionOutOfRangeError,
    ServiceError,
    StoreError,
    VersionInUseError,
    VersionNotLoadedError,
)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path / "store", {"a": None, "b": None})


@pytest.fixture
def address(store: Path) -> Iterator[str]:
    with background_server(settings_for(store, scratch=store.parent)) as address:
        yield address


def test_an_administrator_loads_activates_rolls_back_and_unloads(address: str) -> None:
    with IndexClient(address) as index, Client(address) as client:
        assert {version.name: version.state for version in index.versions()} == {"a": "active", "b": "unloaded"}
        assert index.load("b").state in ("loading", "ready")
        ready = wait_until(lambda: next((v for v in index.versions() if v.state == "ready"), None), "b is loaded")
        assert ready is not None
        assert (ready.name, ready.failure, ready.create_time) == ("b", None, CREATE_TIME)
        assert ready.state_time is not None
        assert ready.memory_bytes > 0
        assert index.activate("b").state == "active"
        assert client.locate_embedding(embedding(0)).index_version == "b"
        assert index.rollback().name == "a"
        assert client.locate_embedding(embedding(0)).index_version == "a"
        canary = index.set_canary("b", 1.0)
        assert canary is not None
        assert canary == replace(index.version("b"), canary_share=1.0)
        assert index.set_canary("", 0.0) is None
        assert index.unload("b").state in ("draining", "unloaded")
        wait_until(lambda: index.version("b").state == "unloaded", "b is unloaded")


def test_refusals_are_the_errors_that_the_server_raised(address: str, store: Path) -> None:
    level = store / "b" / "level-2.faiss"
    level.write_bytes(level.read_bytes()[:-1] + b"x")
    with IndexClient(address) as index:
        with pytest.raises(BundleNotFoundError, match="'c'"):
            index.load("c")
        with pytest.raises(VersionInUseError, match="'a' is active"):
            index.unload("a")
        with pytest.raises(VersionNotLoadedError, match="'b' is not loaded"):
            index.set_canary("b", 0.5)
        with pytest.raises(OptionOutOfRangeError, match="share"):
            index.set_canary("b", -1.0)
        with pytest.raises(StoreError):
            index.rollback()
        with pytest.raises(BundleCorruptError, match=r"level-2\.faiss") as refused:
            index.activate("b")
        seen = index.version("b")
        assert (seen.state, str(seen.failure)) == ("failed", str(refused.value))
        assert isinstance(seen.failure, BundleCorruptError)


def test_a_server_that_is_not_there_is_a_service_error() -> None:
    with IndexClient("127.0.0.1:1", timeout_seconds=5) as index, pytest.raises(ServiceError):
        index.versions()
