"""One version as its users see it, what loading it takes, and a load that is under way."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from geosurge.errors import GeoSurgeError, IndexVersionUnknownError
from geosurge.locator import Locator


class VersionHandle:
    """One loaded index bundle.

    A request that is cancelled releases its version at once, while a thread may still work for it. So whatever runs on
    a thread uses the version inside `use`, and `close` waits for it.

    Attributes:
        name: Name of the bundle; every answer carries it.
        locator: The opened bundle.
    """

    def __init__(self, name: str, locator: Locator) -> None:
        self.name: Final = name
        self.locator: Final = locator
        self._changed = threading.Condition()
        self._users = 0
        self._closed = False

    @contextlib.contextmanager
    def use(self) -> Iterator[Locator]:
        """Keeps the version open inside the ``with`` block, on any thread.

        Raises:
            IndexVersionUnknownError: It has been closed.
        """
        with self._changed:
            if self._closed:
                raise IndexVersionUnknownError(f"index version {self.name!r} has been unloaded")
            self._users += 1
        try:
            yield self.locator
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Waits until no thread uses the version, then frees it."""
        with self._changed:
            self._closed = True
            while self._users:
                self._changed.wait()
        self.locator.close()


@dataclass(frozen=True)
class Needs:
    """What loading a version takes, read from its manifest.

    Attributes:
        memory_bytes: Estimate of the memory that it adds.
        available_bytes: Memory that is free on its device.
        create_time: When the bundle was built.
        encoder_sha256: SHA-256 of its encoder; empty when it has none.
    """

    memory_bytes: int
    available_bytes: int
    create_time: datetime
    encoder_sha256: str


class LoadProgress:
    """A load that is under way, shared by its thread and the event loop.

    Attributes:
        unload_first: Whether the active version may be unloaded to make room for it.
        step: What is being done.
        fraction: Fraction of the whole load that is done, 0 to 1.
    """

    def __init__(self, *, unload_first: bool = False) -> None:
        self.unload_first = unload_first
        self.step = "waiting"
        self.fraction = 0.0
        self._end: GeoSurgeError | None = None

    @property
    def is_given_up(self) -> bool:
        """Whether nobody wants the load any more."""
        return self._end is not None

    def give_up(self, end: GeoSurgeError) -> None:
        """Makes the load end with this error at its next step."""
        self._end = end

    def report(self, step: str, fraction: float) -> None:
        """Reports the current step, and the fraction of the whole load that is done, 0 to 1.

        Raises:
            LoadSupersededError: Nobody wants the load any more.
            ShuttingDownError: The server is stopping.
        """
        self.step, self.fraction = step, fraction
        if self._end is not None:
            raise self._end
