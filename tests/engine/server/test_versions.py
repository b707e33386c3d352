from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from geosurge.errors import IndexVersionUnknownError
from geosurge.locator import Locator
from geosurge.server.versions import VersionHandle, Versions


@pytest.fixture(scope="module")
def handle(bundle: Path) -> VersionHandle:
    return VersionHandle("tiny", Locator.open(bundle))


async def test_the_active_version_answers_with_and_without_its_name(handle: VersionHandle) -> None:
    versions = Versions(handle)
    async with versions.acquire() as unnamed, versions.acquire("tiny") as named:
        assert unnamed is named is handle is versions.active
        assert versions.users("tiny") == 2
    assert versions.users("tiny") == 0


async def test_an_unknown_version_is_refused_and_the_loaded_ones_are_named(handle: VersionHandle) -> None:
    versions = Versions(handle)
    with pytest.raises(IndexVersionUnknownError, match=r"'nope'.*loaded: tiny"):
        async with versions.acquire("nope"):
            pass
    assert versions.users("tiny") == 0


async def test_unused_is_reached_when_the_last_user_has_gone_however_it_went(handle: VersionHandle) -> None:
    versions = Versions(handle)
    begun = asyncio.Event()

    async def use() -> None:
        async with versions.acquire():
            begun.set()
            await asyncio.Event().wait()

    user = asyncio.create_task(use())
    await begun.wait()
    waiting = asyncio.create_task(versions.wait_until_unused())
    await asyncio.sleep(0)
    assert not waiting.done()
    user.cancel()
    await asyncio.wait_for(waiting, 1)
