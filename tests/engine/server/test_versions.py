from __future__ import annotations

import asyncio
import fcntl
import gc
import io
import shutil
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.bundles import make_bundle, make_store, tiny_encoder

from geosurge import store as stores
from geosurge.bundle import finish_bundle, read_manifest
from geosurge.description import VersionState
from geosurge.encoder import ImageEncoder
from geosurge.errors import (
    BundleCorruptError,
    BundleInconsistentError,
    BundleNotFoundError,
    BundlePartialError,
    GeoSurgeError,
    IndexVersionUnknownError,
    LoadSupersededError,
    NoActiveVersionError,
    OptionOutOfRangeError,
    ShuttingDownError,
    StoreError,
    VersionDoesNotFitError,
    VersionInUseError,
    VersionNotLoadedError,
)
from geosurge.images import DEFAULT_LIMITS
from geosurge.locator import Locator
from geosurge.server.batcher import Batcher
from geosurge.server.handle import LoadProgress, Needs, VersionHandle
from geosurge.server.loader import Loader
from geosurge.server.metrics import Metrics
from geosurge.server.versions import Versions, _Version

READY, ACTIVE, DRAINING = VersionState.READY, VersionState.ACTIVE, VersionState.DRAINING
LOADING, UNLOADED, FAILED = VersionState.LOADING, VersionState.UNLOADED, VersionState.FAILED
TRANSITIONS = {
    LOADING: {LOADING, READY, FAILED},
    READY: {ACTIVE, DRAINING},
    ACTIVE: {READY, DRAINING},
    DRAINING: {UNLOADED},
    UNLOADED: {LOADING},
    FAILED: {LOADING},
}
"""The table of `geosurge.server.versions`; a load that waited says again that it loads."""


@pytest.fixture(autouse=True)
def transitions(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[VersionState, VersionState]]]:
    """Every change of state of a test, which must be one of the table."""
    seen: set[tuple[VersionState, VersionState]] = set()
    enter = _Version.enter

    def record(version: _Version, state: VersionState) -> None:
        seen.add((version.state, state))
        enter(version, state)

    monkeypatch.setattr(_Version, "enter", record)
    yield seen
    assert {(before, after) for before, after in seen if after not in TRANSITIONS[before]} == set()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three versions with one encoder; the first is active."""
    store = tmp_path_factory.mktemp("versions") / "store"
    return make_store(store, dict.fromkeys(("one", "two", "three"), tiny_encoder()))


@pytest.fixture
def store(published: Path, tmp_path: Path) -> Path:
    return shutil.copytree(published, tmp_path / "store")


class HeldLoader(Loader):
    """A loader of which some loads wait for an event before they begin."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.held: dict[str, asyncio.Event] = {}
        self.begun: list[str] = []

    def hold(self, name: str) -> asyncio.Event:
        """Makes loads of a version wait until the event is set."""
        self.held[name] = asyncio.Event()
        return self.held[name]

    async def open(self, name: str, path: Path, progress: LoadProgress, *, beside_traffic: bool) -> VersionHandle:
        self.begun.append(name)
        if name in self.held:
            await self.held[name].wait()
        return await super().open(name, path, progress, beside_traffic=beside_traffic)


@asynccontextmanager
async def opened_with_loader(source: Path, *, max_versions: int = 2) -> AsyncIterator[tuple[Versions, HeldLoader]]:
    batcher = Batcher(max_batch_size=4, decode_workers=1, metrics=Metrics())
    batcher.start()
    loader = HeldLoader(batcher.between_batches, device="cpu", limits=DEFAULT_LIMITS, max_batch_size=4)
    versions = Versions(source, loader, max_versions=max_versions, metrics=Metrics())
    try:
        await versions.start()
        yield versions, loader
    finally:
        for event in loader.held.values():
            event.set()
        await versions.close()
        loader.stop()
        await batcher.stop()


@asynccontextmanager
async def opened(source: Path, *, max_versions: int = 2) -> AsyncIterator[Versions]:
    async with opened_with_loader(source, max_versions=max_versions) as (versions, _):
        yield versions


@contextmanager
def pointer_held(store: Path) -> Iterator[None]:
    """Makes whoever moves the store's pointer wait, as another process that moves it does."""
    with (store / ".activate.lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_so():
            await asyncio.sleep(0.002)


def flip(file: Path) -> None:
    """Changes one bit; again, and the file is as before."""
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


def is_freed(reference: weakref.ref[Any]) -> bool:
    gc.collect()
    return reference() is None


def states(versions: Versions) -> dict[str, VersionState]:
    return {name: versions.status(name).state for name in ("one", "two", "three")}


async def test_a_version_goes_through_its_states(store: Path) -> None:
    async with opened(store) as versions:
        assert states(versions) == {"one": ACTIVE, "two": VersionState.UNLOADED, "three": VersionState.UNLOADED}
        assert versions.load("two").state is VersionState.LOADING
        await until(lambda: states(versions)["two"] is READY)
        assert versions.active.name == "one"
        assert await versions.activate("two") == "one"
        assert states(versions) == {"one": READY, "two": ACTIVE, "three": VersionState.UNLOADED}
        assert stores.current(store) == "two"
        assert await versions.rollback() == ("one", "two")
        assert stores.current(store) == "one"
        with versions.acquire("two"):
            assert versions.unload("two").state is DRAINING
            with pytest.raises(IndexVersionUnknownError), versions.acquire("two"):
                pytest.fail("it takes no new requests")
            await asyncio.sleep(0.05)
            assert states(versions)["two"] is DRAINING
        await until(lambda: states(versions)["two"] is VersionState.UNLOADED)
        assert await versions.activate("three") == "one"
        assert [status.name for status in await versions.statuses()] == ["one", "three", "two"]


async def test_versions_with_one_encoder_share_it(store: Path) -> None:
    async with opened(store) as versions:
        first = versions.active.locator.encoder
        await versions.activate("two")
        assert versions.active.locator.encoder is first


async def test_the_oldest_idle_version_makes_room(store: Path) -> None:
    async with opened(store) as versions:
        await versions.activate("two")
        await versions.activate("three")
        assert states(versions) == {"one": VersionState.UNLOADED, "two": READY, "three": ACTIVE}


async def test_a_newer_request_makes_an_older_load_give_up(store: Path) -> None:
    async with opened(store) as versions:
        older = asyncio.create_task(versions.activate("two"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        newer = asyncio.create_task(versions.activate("three"))
        outcomes = await asyncio.gather(older, newer, return_exceptions=True)
        assert type(outcomes[0]).__name__ == "LoadSupersededError"
        assert outcomes[1] == "one"
        assert versions.active.name == stores.current(store) == "three"


@pytest.mark.parametrize("unload_first", [False, True])
async def test_a_bad_version_changes_nothing(store: Path, unload_first: bool) -> None:
    flip(store / "two" / "level-3.faiss")
    async with opened(store, max_versions=1 if unload_first else 2) as versions:
        with pytest.raises(BundleCorruptError, match=r"level-3\.faiss"):
            await versions.activate("two", unload_first=unload_first)
        await until(lambda: versions.is_serving)
        assert versions.active.name == stores.current(store) == "one"
        status = versions.status("two")
        assert status.state is VersionState.FAILED
        assert isinstance(status.failure, BundleCorruptError)
        with pytest.raises(BundleNotFoundError):
            await versions.activate("four")


async def test_one_version_is_exchanged_for_another_where_both_do_not_fit(store: Path) -> None:
    async with opened(store, max_versions=1) as versions:
        assert await versions.activate("two", unload_first=True) == "one"
        assert versions.active.name == stores.current(store) == "two"
        assert states(versions)["one"] is VersionState.UNLOADED


async def test_what_happens_to_the_files_of_a_loaded_version_does_not_matter(store: Path) -> None:
    async with opened(store) as versions:
        await versions.activate("two")
        for name in ("one", "two"):
            for file in (store / name).rglob("*.*"):
                if file.is_file():
                    file.write_bytes(b"")
            shutil.rmtree(store / name)
        for name in ("one", "two"):
            with versions.acquire(name) as handle:
                assert handle.locator.tree.cell(1, 0).token
                assert handle.locator.tree.cell(3, 0).token


async def test_the_store_can_be_followed(store: Path) -> None:
    async with opened(store) as versions:
        stores.activate(store, "three")
        await versions.follow_store()
        assert versions.active.name == "three"


async def test_a_canary_gets_its_share_and_a_request_id_always_the_same_version(store: Path) -> None:
    def asked(number: int) -> str:
        with versions.acquire(request_id=f"request {number}") as handle:
            return handle.name

    async with opened(store) as versions:
        with pytest.raises(VersionNotLoadedError):
            versions.set_canary("two", 0.2)
        versions.load("two")
        await until(lambda: states(versions)["two"] is READY)
        with pytest.raises(VersionInUseError):
            versions.set_canary("one", 0.2)
        with pytest.raises(OptionOutOfRangeError):
            versions.set_canary("two", float("nan"))
        versions.set_canary("two", 0.2)
        names = [asked(number) for number in range(5000)]
        assert [asked(number) for number in range(5000)] == names
        assert 900 < names.count("two") < 1100
        with pytest.raises(VersionInUseError):
            versions.unload("two")
        versions.set_canary("", 0.0)
        assert {asked(number) for number in range(100)} == {"one"}


async def test_a_server_of_one_bundle_has_one_version(store: Path) -> None:
    async with opened(store / "two") as versions:
        assert versions.active.name == "two"
        with pytest.raises(BundleNotFoundError):
            await versions.activate("one")
        with pytest.raises(StoreError):
            await versions.rollback()


async def test_users_are_counted_however_they_leave(store: Path) -> None:
    async with opened(store) as versions:
        with suppress(ZeroDivisionError), versions.acquire():
            assert versions.status("one").request_count == 1
            _ = 1 // 0
        assert versions.status("one").request_count == 0


async def test_a_load_that_gave_up_and_is_asked_for_again_is_done(store: Path) -> None:
    async with opened_with_loader(store, max_versions=3) as (versions, loader):
        release = loader.hold("two")
        versions.load("two")
        await until(lambda: "two" in loader.begun)
        versions.load("three")
        versions.load("two")
        release.set()
        await until(lambda: states(versions)["two"] is READY)
        assert isinstance(versions.status("three").failure, LoadSupersededError)
        assert loader.begun.count("two") == 2
        assert versions.status("two").failure is None

        release = loader.hold("three")
        versions.load("three")
        await until(lambda: "three" in loader.begun)
        assert versions.unload("three").state is LOADING
        assert versions.load("three").state is LOADING
        release.set()
        await until(lambda: states(versions)["three"] is READY)


async def test_a_load_that_waits_for_its_turn_can_be_given_up_too(store: Path) -> None:
    async with opened_with_loader(store, max_versions=3) as (versions, loader):
        release = loader.hold("two")
        versions.load("two")
        await until(lambda: "two" in loader.begun)
        versions.load("three")
        versions.load("two")
        versions.load("three")
        versions.unload("three")
        release.set()
        await until(lambda: states(versions)["three"] is FAILED)
        assert isinstance(versions.status("three").failure, LoadSupersededError)
        assert isinstance(versions.status("two").failure, LoadSupersededError)


async def test_a_load_that_waits_for_its_own_drain_can_be_given_up(store: Path) -> None:
    async with opened(store) as versions:
        await versions.activate("two")
        with versions.acquire("one"):
            versions.unload("one")
            assert versions.load("one").state is DRAINING
            assert versions.unload("one").state is DRAINING
        await until(lambda: states(versions)["one"] is FAILED)
        assert isinstance(versions.status("one").failure, LoadSupersededError)
        assert versions.load("one").state is LOADING
        await until(lambda: states(versions)["one"] is READY)


async def test_the_version_that_is_being_activated_is_not_unloaded(store: Path) -> None:
    async with opened(store) as versions:
        versions.load("two")
        await until(lambda: states(versions)["two"] is READY)
        with pointer_held(store):
            activating = asyncio.create_task(versions.activate("two"))
            await asyncio.sleep(0.05)
            with pytest.raises(VersionInUseError, match="being activated"):
                versions.unload("two")
            versions.load("three")
            await asyncio.sleep(0.05)
            assert states(versions)["two"] is READY
        assert await activating == "one"
        await until(lambda: states(versions)["three"] is READY)
        assert states(versions) == {"one": UNLOADED, "two": ACTIVE, "three": READY}
        with versions.acquire() as handle:
            assert handle.name == "two"


async def test_asking_twice_for_one_version_is_one_load(store: Path) -> None:
    async with opened(store) as versions:
        both = await asyncio.gather(versions.activate("two"), versions.activate("two"))
        assert "one" in both
        assert versions.active.name == "two"


async def test_a_version_that_is_wanted_back_during_its_exchange_is_active_again(store: Path) -> None:
    async with opened_with_loader(store, max_versions=1) as (versions, loader):
        release = loader.hold("two")
        exchange = asyncio.create_task(versions.activate("two", unload_first=True))
        await until(lambda: "two" in loader.begun)
        assert not versions.is_serving
        with pytest.raises(NoActiveVersionError), versions.acquire():
            pytest.fail("none is active")
        back = asyncio.create_task(versions.activate("one", unload_first=True))
        await asyncio.sleep(0)
        release.set()
        with pytest.raises(LoadSupersededError):
            await exchange
        await back
        assert states(versions) == {"one": ACTIVE, "two": FAILED, "three": UNLOADED}
        assert versions.active.name == stores.current(store) == "one"
        assert loader.begun == ["one", "two", "one"]


async def test_an_exchange_that_is_given_up_while_it_drains_brings_the_old_version_back(store: Path) -> None:
    async with opened(store, max_versions=1) as versions:
        with versions.acquire():
            exchange = asyncio.create_task(versions.activate("two", unload_first=True))
            await until(lambda: states(versions)["one"] is DRAINING)
            versions.unload("two")
        with pytest.raises(LoadSupersededError):
            await exchange
        assert versions.active.name == "one"


async def test_an_exchange_for_a_bundle_that_vanishes_meanwhile_brings_the_old_version_back(store: Path) -> None:
    async with opened(store, max_versions=1) as versions:
        with versions.acquire():
            exchange = asyncio.create_task(versions.activate("two", unload_first=True))
            await until(lambda: states(versions)["one"] is DRAINING)
            shutil.rmtree(store / "two")
        with pytest.raises(BundleNotFoundError):
            await exchange
        assert versions.active.name == "one"


async def test_an_exchange_needs_to_be_asked_for(store: Path) -> None:
    async with opened(store, max_versions=1) as versions:
        with pytest.raises(VersionDoesNotFitError, match=r"1 versions are loaded \(one\).*unload first"):
            await versions.activate("two")
        assert states(versions) == {"one": ACTIVE, "two": FAILED, "three": UNLOADED}


async def test_a_canary_is_never_unloaded_to_make_room(store: Path) -> None:
    async with opened(store) as versions:
        versions.load("two")
        await until(lambda: states(versions)["two"] is READY)
        versions.set_canary("two", 0.5)
        with pytest.raises(VersionDoesNotFitError, match="end the canary"):
            await versions.activate("three")
        assert await versions.activate("three", unload_first=True) == "one"
        assert states(versions) == {"one": UNLOADED, "two": READY, "three": ACTIVE}
        assert versions.status("two").canary_share == 0.5
        await versions.activate("two")
        assert versions.status("two").canary_share == 0.0


async def test_requests_without_an_id_get_the_active_version(store: Path) -> None:
    async with opened(store) as versions:
        versions.load("two")
        await until(lambda: states(versions)["two"] is READY)
        versions.set_canary("two", 1.0)
        with versions.acquire() as unnamed, versions.acquire(request_id="a") as named:
            assert (unnamed.name, named.name) == ("one", "two")


async def test_the_store_says_what_is_active_before_requests_do(store: Path) -> None:
    async with opened(store) as versions:
        pointed: list[tuple[str | None, str]] = []
        versions._on_change = lambda: pointed.append((stores.current(store), versions.active.name))
        await versions.activate("two")
        await versions.activate("three")
        await versions.rollback()
    assert pointed == [("two", "two"), ("three", "three"), ("two", "two")]


async def test_a_store_that_cannot_be_written_keeps_everything_as_it_is(store: Path) -> None:
    async with opened(store) as versions:
        (store / ".activate.lock").unlink()
        (store / ".activate.lock").mkdir()
        with pytest.raises(StoreError, match="cannot be written"):
            await versions.activate("two")
        assert versions.active.name == stores.current(store) == "one"
        assert states(versions)["two"] is READY
        (store / ".activate.lock").rmdir()
        await versions.activate("two")
        (store / "HISTORY").unlink()
        with pytest.raises(StoreError, match="was active before"):
            await versions.rollback()
        assert versions.active.name == "two"


async def test_an_exchange_that_cannot_be_written_down_brings_the_old_version_back(store: Path) -> None:
    async with opened(store, max_versions=1) as versions:
        (store / ".activate.lock").unlink()
        (store / ".activate.lock").mkdir()
        with pytest.raises(StoreError, match="cannot be written"):
            await versions.activate("two", unload_first=True)
        assert states(versions) == {"one": ACTIVE, "two": UNLOADED, "three": UNLOADED}
        assert versions.active.name == stores.current(store) == "one"


async def test_a_canary_ends_with_its_version(store: Path) -> None:
    async with opened(store, max_versions=1) as versions:
        with pointer_held(store):
            exchange = asyncio.create_task(versions.activate("two", unload_first=True))
            await until(lambda: states(versions)["two"] is READY)
            versions.set_canary("two", 1.0)
            shutil.rmtree(store / "two")
        with pytest.raises(BundleNotFoundError):
            await exchange
        with versions.acquire(request_id="any") as handle:
            assert handle.name == "one"


async def test_what_is_brought_back_is_loaded_once(store: Path) -> None:
    async with opened_with_loader(store, max_versions=1) as (versions, loader):
        release = loader.hold("one")
        (store / ".activate.lock").unlink()
        (store / ".activate.lock").mkdir()
        exchange = asyncio.create_task(versions.activate("two", unload_first=True))
        await until(lambda: loader.begun == ["one", "two", "one"])
        assert versions.load("one").state is LOADING
        versions.unload("one")
        assert versions.load("one").state is LOADING
        release.set()
        with pytest.raises(StoreError, match="cannot be written"):
            await exchange
        await until(lambda: not versions._tasks)
        assert states(versions) == {"one": ACTIVE, "two": UNLOADED, "three": UNLOADED}
        assert len(versions.loaded) == 1


async def test_room_is_made_for_a_load_as_soon_as_anybody_asks_for_it(store: Path) -> None:
    async with opened(store, max_versions=1) as versions:
        versions.load("two")
        assert await versions.activate("two", unload_first=True) == "one"


async def test_a_load_that_is_given_up_at_its_very_end_is_freed(store: Path) -> None:
    loader = SimulatedLoader(available=3)
    versions = Versions(store, loader, metrics=Metrics())
    await versions.start()
    versions.load("two")
    while len(loader.open_handles) < 2:
        await asyncio.sleep(0)
    assert versions.unload("two").state is LOADING
    await until(lambda: states(versions)["two"] is FAILED)
    assert [handle.name for handle in loader.open_handles] == ["one"]
    await versions.close()


async def test_the_active_version_survives_a_restart(store: Path) -> None:
    async with opened(store) as versions:
        await versions.activate("three")
    async with opened(store) as versions:
        assert versions.active.name == "three"
        assert await versions.rollback() == ("one", "three")
    async with opened(store) as versions:
        assert versions.active.name == "one"


async def test_following_a_store_whose_pointer_names_something_bad_changes_nothing(store: Path) -> None:
    async with opened(store) as versions:
        stores.activate(store, "two")
        (store / "two" / "level-1.faiss").unlink()
        with pytest.raises(BundlePartialError):
            await versions.follow_store()
        (store / "CURRENT").write_text("no such\n")
        with pytest.raises(StoreError):
            await versions.follow_store()
        assert versions.active.name == "one"


async def test_what_cannot_be_followed_is_named_with_its_repair(store: Path) -> None:
    async with opened(store) as versions:
        stores.activate(store, "two")
        (store / "two" / "level-1.faiss").unlink()
        with pytest.raises(BundlePartialError, match=r"still names 'two': .*geosurge index activate one --store"):
            await versions.follow_store()
        await versions.activate("one")
        assert stores.current(store) == "one"


async def test_following_a_store_that_did_not_change_disturbs_nothing(store: Path) -> None:
    async with opened_with_loader(store) as (versions, loader):
        release = loader.hold("two")
        activating = asyncio.create_task(versions.activate("two"))
        await until(lambda: "two" in loader.begun)
        await versions.follow_store()
        release.set()
        assert await activating == "one"


async def test_a_store_that_names_another_version_by_now_is_not_followed(store: Path) -> None:
    async with opened_with_loader(store) as (versions, loader):
        release = loader.hold("two")
        stores.activate(store, "two")
        following = asyncio.create_task(versions.follow_store())
        await until(lambda: "two" in loader.begun)
        stores.activate(store, "one")
        await versions.follow_store()
        release.set()
        with pytest.raises(LoadSupersededError, match="names another"):
            await following
        assert states(versions) == {"one": ACTIVE, "two": READY, "three": UNLOADED}


async def test_a_start_serves_what_was_active_before_where_the_store_names_something_bad(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("two", "three", "one", "two"):
        stores.activate(store, name)
    flip(store / "two" / "level-3.faiss")
    shutil.rmtree(store / "one")
    async with opened(store) as versions:
        assert versions.active.name == "three"
        assert stores.current(store) == "two"
        bad = next(status for status in await versions.statuses() if status.name == "two")
        assert bad.state is FAILED
        assert isinstance(bad.failure, BundleCorruptError)
        logged = next(record.getMessage() for record in caplog.records if record.levelname == "ERROR")
        assert "level-3.faiss" in logged
        assert "geosurge index activate three" in logged
        flip(store / "two" / "level-3.faiss")
        await versions.follow_store()
        assert versions.active.name == "two"


async def test_a_start_fails_with_the_first_reason_where_nothing_can_be_served(store: Path) -> None:
    stores.activate(store, "two")
    flip(store / "two" / "level-3.faiss")
    flip(store / "one" / "level-2.faiss")
    with pytest.raises(BundleCorruptError, match=r"two/level-3\.faiss"):
        async with opened(store):
            pytest.fail("nothing can be served")


async def test_a_bundle_under_another_name_is_refused(store: Path) -> None:
    (store / "two").rename(store / "renamed")
    async with opened(store) as versions:
        versions.load("renamed")
        await until(lambda: versions.status("renamed").state is FAILED)
        failure = versions.status("renamed").failure
        assert isinstance(failure, BundleInconsistentError)
        assert "'two'" in str(failure)
        with pytest.raises(BundleNotFoundError):
            versions.load("two")


async def test_a_repaired_version_can_be_loaded_after_it_failed(store: Path) -> None:
    index = store / "two" / "level-2.faiss"
    sound = index.read_bytes()
    index.write_bytes(sound[:-1])
    async with opened(store) as versions:
        versions.load("two")
        await until(lambda: states(versions)["two"] is FAILED)
        index.write_bytes(sound)
        assert versions.load("two").failure is None
        await until(lambda: states(versions)["two"] is READY)


async def test_an_encoder_lives_as_long_as_a_version_with_it(store: Path) -> None:
    source = make_bundle(store.parent / "four", encoder=tiny_encoder(seed=4), seed=4, name="four")
    stores.publish(store, source)
    async with opened(store, max_versions=3) as versions:
        await versions.activate("four")
        other = weakref.ref(versions.active.locator.encoder)
        with versions.acquire("one") as handle:
            shared = weakref.ref(handle.locator.encoder)
        del handle
        await versions.activate("two")
        with versions.acquire("two") as handle:
            assert handle.locator.encoder is shared()
        del handle
        versions.unload("one")
        await until(lambda: versions.status("one").state is UNLOADED)
        assert shared() is not None
        versions.unload("four")
        await until(lambda: versions.status("four").state is UNLOADED)
        await until(lambda: is_freed(other))
        assert shared() is not None
    await until(lambda: is_freed(shared))


async def test_a_failed_load_keeps_nothing_but_its_reason(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[ImageEncoder]] = []
    load = ImageEncoder.load

    def remember(*arguments: Any) -> ImageEncoder:
        encoder = load(*arguments)
        loaded.append(weakref.ref(encoder))
        return encoder

    source = make_bundle(store.parent / "four", encoder=tiny_encoder(seed=4), seed=4, name="four")
    manifest = read_manifest(source)
    query = manifest.golden_queries[0].model_copy(update={"scores": (9.0,) * 5})
    finish_bundle(source, manifest.model_copy(update={"golden_queries": (query,)}))
    stores.publish(store, source, verify=False)
    async with opened(store) as versions:
        monkeypatch.setattr(ImageEncoder, "load", remember)
        with pytest.raises(BundleInconsistentError):
            await versions.activate("four")
        assert len(loaded) == 1
        await until(lambda: is_freed(loaded[0]))
        assert isinstance(versions.status("four").failure, BundleInconsistentError)


async def test_closing_gives_up_what_is_loading_and_waits_for_requests(store: Path) -> None:
    async with opened_with_loader(store) as (versions, loader):
        release = loader.hold("two")
        activating = asyncio.create_task(versions.activate("two"))
        await until(lambda: "two" in loader.begun)
        with versions.acquire():
            closing = asyncio.create_task(versions.close())
            await asyncio.sleep(0)
            with pytest.raises(ShuttingDownError):
                versions.load("three")
            release.set()
            await asyncio.sleep(0.05)
            assert not closing.done()
        await closing
        with pytest.raises(ShuttingDownError, match="stopping"):
            await activating
        assert states(versions) == {"one": UNLOADED, "two": FAILED, "three": UNLOADED}
        assert not versions.is_serving


async def test_a_server_that_stops_moves_no_pointer(store: Path) -> None:
    async with opened(store) as versions:
        versions.load("two")
        await until(lambda: states(versions)["two"] is READY)
        with pointer_held(store):
            moving = asyncio.create_task(versions.activate("two"))
            await until(versions._pointer_lock.locked)
            waiting = asyncio.create_task(versions.activate("one"))
            await asyncio.sleep(0)
            versions.give_up()
            versions.give_up()
        assert await moving == "one"
        with pytest.raises(ShuttingDownError):
            await waiting
        with pytest.raises(ShuttingDownError):
            await versions.activate("one")
        assert stores.current(store) == "two"
        with versions.acquire() as handle:
            assert handle.name == "two"


async def test_whoever_holds_the_pointer_cannot_keep_a_server_from_stopping(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_ACTIVATE_LOCK_SECONDS", 0.2)
    with pointer_held(store):
        async with opened(store) as versions:
            await until(lambda: versions.load("two").state is READY)
            moves = [asyncio.create_task(versions.activate("two")) for _ in range(2)]
            await until(versions._pointer_lock.locked)
        outcomes = await asyncio.gather(*moves, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [StoreError, ShuttingDownError]


async def test_an_activation_goes_on_when_its_caller_leaves(store: Path) -> None:
    async with opened_with_loader(store) as (versions, loader):
        release = loader.hold("two")
        activating = asyncio.create_task(versions.activate("two"))
        await until(lambda: "two" in loader.begun)
        activating.cancel()
        release.set()
        await until(lambda: versions.active.name == "two")
        assert stores.current(store) == "two"


async def test_progress_can_be_watched(store: Path) -> None:
    async with opened(store) as versions:
        versions.load("two")
        seen: list[tuple[str, float]] = []

        def is_ready() -> bool:
            status = versions.status("two")
            seen.append((status.load_step, status.load_progress))
            return status.state is READY

        await until(is_ready)
        fractions = [fraction for _, fraction in seen[:-1]]
        assert fractions == sorted(fractions)
        assert len({step for step, _ in seen}) > 2
        assert seen[-1] == ("", 0.0)
        assert versions.status("two").memory_bytes > 0
        assert versions.status("two").encoder_sha256 == versions.status("one").encoder_sha256 != ""


async def test_all_transitions_of_the_table_are_seen(
    store: Path, transitions: set[tuple[VersionState, VersionState]]
) -> None:
    (store / "three" / "level-1.faiss").unlink()
    async with opened(store, max_versions=2) as versions:
        await versions.activate("two")
        with pytest.raises(BundlePartialError):
            await versions.activate("three")
        with pytest.raises(BundlePartialError):
            await versions.activate("three")
        versions.unload("one")
        await until(lambda: states(versions)["one"] is UNLOADED)
        await versions.activate("one")
    assert transitions == {(before, after) for before, afters in TRANSITIONS.items() for after in afters}


class SimulatedLoader:
    """Opens versions without reading anything; remembers what is open."""

    def __init__(self, available: int) -> None:
        self.available = available
        self.open_handles: list[VersionHandle] = []
        self.most_open = 0

    async def needs(self, path: Path) -> Needs:
        await asyncio.sleep(0)
        return Needs(1, self.available - len(self.open_handles), datetime.now(UTC), "")

    async def open(self, name: str, path: Path, progress: LoadProgress, *, beside_traffic: bool) -> VersionHandle:
        for step in range(3):
            progress.report("opening", step / 3)
            await asyncio.sleep(0)
        # All that a version asks of its locator here is to be closed.
        handle = VersionHandle(name, cast("Locator", io.BytesIO()))
        self.open_handles.append(handle)
        self.most_open = max(self.most_open, len(self.open_handles))
        await asyncio.sleep(0)
        return handle

    async def close(self, handle: VersionHandle) -> None:
        await asyncio.sleep(0)
        handle.close()
        self.open_handles.remove(handle)


NAMES = st.sampled_from(["one", "two", "three"])
REQUESTS = st.one_of(
    st.tuples(st.just("load"), NAMES),
    st.tuples(st.just("activate"), NAMES),
    st.tuples(st.just("exchange"), NAMES),
    st.tuples(st.just("unload"), NAMES),
    st.tuples(st.just("canary"), NAMES),
    st.tuples(st.sampled_from(["rollback", "follow", "end canary", "pause"]), st.just("")),
)


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    requests=st.lists(st.tuples(REQUESTS, st.integers(0, 12)), max_size=12),
    max_versions=st.integers(1, 3),
    available=st.integers(1, 4),
)
def test_whoever_asks_for_whatever_whenever_one_version_is_active_and_none_leaks(
    published: Path, requests: list[tuple[tuple[str, str], int]], max_versions: int, available: int
) -> None:
    (published / "CURRENT").write_text("one\n")
    (published / "HISTORY").unlink(missing_ok=True)
    asyncio.run(_ask(published, requests, max_versions, SimulatedLoader(available)))


async def _ask(
    store: Path, requests: list[tuple[tuple[str, str], int]], max_versions: int, loader: SimulatedLoader
) -> None:
    versions = Versions(store, loader, max_versions=max_versions, metrics=Metrics())
    await versions.start()
    tasks = []
    for (what, name), steps in requests:
        tasks.append(asyncio.create_task(_request(versions, what, name)))
        for _ in range(steps):
            await asyncio.sleep(0)
        if what == "pause":
            await asyncio.sleep(0.001)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [error for error in outcomes if error is not None and not isinstance(error, GeoSurgeError)] == []
    await until(lambda: not versions._tasks)
    statuses = {status.name: status for status in await versions.statuses()}
    assert [name for name, status in statuses.items() if status.state is ACTIVE] == [versions.active.name]
    assert stores.current(store) == versions.active.name
    loaded = [name for name, status in statuses.items() if status.state in (READY, ACTIVE)]
    assert sorted(handle.name for handle in loader.open_handles) == sorted(loaded)
    assert sorted(handle.name for handle in versions.loaded) == sorted(loaded)
    assert {status.state for status in statuses.values()} <= {READY, ACTIVE, UNLOADED, FAILED}
    assert loader.most_open <= min(max_versions, loader.available)
    await versions.close()
    assert loader.open_handles == []


async def _request(versions: Versions, what: str, name: str) -> None:
    match what:
        case "load":
            versions.load(name)
        case "activate":
            await versions.activate(name)
        case "exchange":
            await versions.activate(name, unload_first=True)
        case "unload":
            versions.unload(name)
        case "canary":
            versions.set_canary(name, 0.5)
        case "end canary":
            versions.set_canary("", 0.0)
        case "rollback":
            await versions.rollback()
        case "follow":
            await versions.follow_store()
