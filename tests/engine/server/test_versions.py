from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.bundles import make_bundle, tiny_encoder

from geosurge import store as stores
from geosurge.errors import (
    BundleCorruptError,
    BundleNotFoundError,
    IndexVersionUnknownError,
    OptionOutOfRangeError,
    StoreError,
    VersionInUseError,
    VersionNotLoadedError,
)
from geosurge.images import DEFAULT_LIMITS
from geosurge.server.batcher import Batcher
from geosurge.server.loader import Loader
from geosurge.server.versions import Load, Refuse, Resident, Unload, Versions, VersionState, WaitForDrain, next_step

READY, ACTIVE, DRAINING = VersionState.READY, VersionState.ACTIVE, VersionState.DRAINING


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three versions with one encoder; the first is active."""
    store, encoder = tmp_path_factory.mktemp("versions") / "store", tiny_encoder()
    for seed, name in enumerate(("one", "two", "three")):
        source = make_bundle(store.parent / name, encoder=encoder, seed=seed, name=name)
        stores.publish(store, source, activate=name == "one")
    return store


@pytest.fixture
def store(published: Path, tmp_path: Path) -> Path:
    return shutil.copytree(published, tmp_path / "store")


@asynccontextmanager
async def opened(source: Path, *, max_versions: int = 2) -> AsyncIterator[Versions]:
    batcher = Batcher(max_batch_size=4, decode_workers=1)
    batcher.start()
    loader = Loader(batcher.between_batches, device="cpu", limits=DEFAULT_LIMITS, max_batch_size=4)
    versions = Versions(source, loader, max_versions=max_versions)
    try:
        await versions.start()
        yield versions
    finally:
        await versions.close()
        loader.stop()
        await batcher.stop()


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_so():
            await asyncio.sleep(0.002)


def states(versions: Versions) -> dict[str, VersionState]:
    return {name: versions.status(name).state for name in ("one", "two", "three")}


@pytest.mark.parametrize(
    ("residents", "needed", "unload_first", "expected"),
    [
        ([], 5, False, Load),
        ([Resident("a", ACTIVE, 1)], 5, False, Load),
        ([Resident("a", ACTIVE, 2), Resident("b", READY, 1)], 5, False, Unload),
        ([Resident("a", ACTIVE, 2), Resident("b", DRAINING, 1)], 5, False, WaitForDrain),
        ([Resident("a", ACTIVE, 2), Resident("b", READY, 1, is_canary=True)], 5, False, Refuse),
        ([Resident("a", ACTIVE, 1)], 50, False, Refuse),
        ([Resident("a", ACTIVE, 1)], 50, True, Unload),
        ([], 50, True, Refuse),
    ],
)
def test_what_is_done_to_make_room(
    residents: list[Resident], needed: int, unload_first: bool, expected: type[object]
) -> None:
    assert type(next_step(needed, 10, residents, max_versions=2, unload_first=unload_first)) is expected


def test_what_was_wanted_longest_ago_goes_first() -> None:
    residents = [Resident("a", ACTIVE, 1), Resident("b", READY, 3), Resident("c", READY, 2)]
    assert next_step(1, 10, residents, max_versions=3) == Unload("c")


@given(
    kinds=st.lists(st.sampled_from([READY, DRAINING]), max_size=6),
    has_active=st.booleans(),
    has_canary=st.booleans(),
    needed=st.integers(0, 20),
    free=st.integers(0, 20),
    max_versions=st.integers(1, 6),
    unload_first=st.booleans(),
)
def test_making_room_ends_and_spares_what_has_traffic(
    kinds: Sequence[VersionState],
    has_active: bool,
    has_canary: bool,
    needed: int,
    free: int,
    max_versions: int,
    unload_first: bool,
) -> None:
    residents = [Resident(str(age), kind, age) for age, kind in enumerate(kinds)]
    residents += [Resident("active", ACTIVE, 99)] * has_active + [Resident("canary", READY, 98, True)] * has_canary
    for _ in range(2 * len(residents) + 1):
        step = next_step(needed, free, residents, max_versions=max_versions, unload_first=unload_first)
        if isinstance(step, Load):
            assert needed <= free
            assert len(residents) < max_versions
            return
        if isinstance(step, Refuse):
            assert not any(v.state is READY and not v.is_canary for v in residents)
            return
        if isinstance(step, Unload):
            assert step.name != "canary"
            assert step.name != "active" or unload_first
            residents = [v for v in residents if v.name != step.name]
        else:
            residents = [v for v in residents if v.state is not DRAINING]
        free += 1
    pytest.fail("it did not end")


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
    damaged = bytearray((store / "two" / "level-3.faiss").read_bytes())
    damaged[-9] ^= 1
    (store / "two" / "level-3.faiss").write_bytes(damaged)
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
            assert versions.users("one") == 1
            _ = 1 // 0
        assert versions.users("one") == 0
