"""Runs over tiny archives in this process, with an index whose work is counted and can be made to fail."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

from geosurge.archive.backends import Backend, LocalBackend, Query
from geosurge.archive.locating import Progress
from geosurge.archive.outputs import read_rows
from geosurge.archive.rows import Row
from geosurge.archive.run import Job, Plan, Result, run
from geosurge.errors import GeoSurgeError, ServiceError
from geosurge.location import LocateOptions, Location
from geosurge.locator import Locator


@dataclass(frozen=True)
class WatchedBackend(LocalBackend):
    """An index that is opened here.

    Attributes:
        batches: Sizes of the batches that it located.
        fails_after: Pictures after which it cannot go on.
        before: Called before each batch.
    """

    batches: list[int] = field(default_factory=list)
    fails_after: int | None = None
    before: Callable[[], object] = bool

    @property
    def count(self) -> int:
        """Pictures that it located."""
        return sum(self.batches)

    def locate(self, queries: Sequence[Query], options: LocateOptions) -> list[Location | GeoSurgeError]:
        self.before()
        if self.fails_after is not None and self.count >= self.fails_after:
            raise ServiceError("the GPU is lost; mend it")
        self.batches.append(len(queries))
        return super().locate(queries, options)


@dataclass
class Watcher:
    """Notes what a run tells its observer.

    Attributes:
        plans: The plans.
        steps: How often each phase moved on.
        failures: How often it said that a picture failed.
    """

    plans: list[Plan] = field(default_factory=list)
    steps: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)

    def phase(self, name: str, total: int | None) -> Progress:
        def advance(*, failed: bool = False) -> None:
            self.steps[name] += 1
            self.failures[name] += failed

        return advance

    def plan(self, plan: Plan) -> None:
        self.plans.append(plan)


@dataclass(frozen=True)
class Archive:
    """A folder of pictures and a run over it.

    Attributes:
        folder: The pictures.
        out: The run's directory.
        locators: Opened indexes by name; the first one is used unless another is asked for.
    """

    folder: Path
    out: Path
    locators: dict[str, Locator]

    def backend(self, name: str = "", batch_size: int = 4) -> WatchedBackend:
        return WatchedBackend(self.locators[name or next(iter(self.locators))], batch_size)

    def job(self, **changes: object) -> Job:
        return replace(Job((str(self.folder),), self.out, workers=1), **changes)  # type: ignore[arg-type]

    def run(
        self,
        backend: WatchedBackend | None = None,
        watcher: Watcher | None = None,
        *,
        dry_run: bool = False,
        **job: object,
    ) -> Result:
        """Does a run; of a dry one the result is empty."""
        backend, watcher = backend or self.backend(), watcher or Watcher()
        result = run(self.job(**job), opening(backend), watcher, dry_run=dry_run)
        return result or Result({}, {}, {}, 0.0, 0, [])

    def rows(self, out: Path | None = None) -> dict[str, Row]:
        """The rows without timings, by the name of the picture relative to the folder, or else by its path."""
        rows = list(read_rows((out or self.out) / "results.parquet"))
        prefix = f"{self.folder.resolve()}/"
        named = {row.path.removeprefix(prefix): replace(row, timings=None) for row in rows}
        assert len(named) == len(rows), "no picture has two rows"
        return named


def opening(backend: Backend) -> Callable[[], AbstractContextManager[Backend]]:
    """What opens a backend, which stays open."""
    return lambda: contextlib.nullcontext(backend)


def never() -> AbstractContextManager[Backend]:
    """What opens a backend, where none may be needed."""
    raise AssertionError("there was nothing to locate")
