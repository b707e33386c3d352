"""The index versions that requests can be answered from, and who is using them.

A request acquires one handle when it begins and keeps it to its end, so that everything in an answer comes from one
version however many are loaded meanwhile. A handle is immutable; what changes is which one is active.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from geosurge.errors import IndexVersionUnknownError
from geosurge.locator import Locator


@dataclass(frozen=True, eq=False)
class VersionHandle:
    """One loaded index bundle.

    Attributes:
        name: Name of the bundle; every answer carries it.
        locator: The bundle, opened.
    """

    name: str
    locator: Locator


class Versions:
    """The loaded versions with the number of requests on each; all methods belong to one event loop."""

    def __init__(self, active: VersionHandle) -> None:
        self._loaded = {active.name: active}
        self._active = active
        self._users: Counter[VersionHandle] = Counter()
        self._unused = asyncio.Event()
        self._unused.set()

    @property
    def active(self) -> VersionHandle:
        """The version that answers requests which name none."""
        return self._active

    @property
    def loaded(self) -> tuple[VersionHandle, ...]:
        """All versions that requests may name."""
        return tuple(self._loaded.values())

    @asynccontextmanager
    async def acquire(self, name: str = "") -> AsyncIterator[VersionHandle]:
        """Keeps a version in use inside the ``with`` block.

        Args:
            name: Name of a loaded version; empty means the active one.

        Raises:
            IndexVersionUnknownError: No loaded version has this name.
        """
        handle = self._loaded.get(name) if name else self._active
        if handle is None:
            raise IndexVersionUnknownError(
                f"index version {name!r} is not loaded; loaded: {', '.join(self._loaded)}. Leave it empty for the "
                "active one"
            )
        self._users[handle] += 1
        self._unused.clear()
        try:
            yield handle
        finally:
            self._users[handle] -= 1
            if self._users[handle] == 0:
                del self._users[handle]
            if not self._users:
                self._unused.set()

    def users(self, name: str) -> int:
        """Number of requests that are using a version."""
        return sum(count for handle, count in self._users.items() if handle.name == name)

    async def wait_until_unused(self) -> None:
        """Returns when no request uses any version."""
        await self._unused.wait()
