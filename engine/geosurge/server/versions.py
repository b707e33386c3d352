"""The index versions of a server: the state of each, what to do next, and who is using them.

| state | meaning | leads to |
|---|---|---|
| LOADING | read and checked beside the others | READY, FAILED |
| READY | loaded; answers requests that name it | ACTIVE, DRAINING |
| ACTIVE | loaded; answers requests that name no version | READY, DRAINING (only to make room for its successor) |
| DRAINING | takes no new requests | UNLOADED, once its requests are answered |
| UNLOADED | in the store, but not in memory | LOADING |
| FAILED | could not be loaded; the reason is kept | LOADING |

A request acquires one handle when it begins and keeps it to its end, so that everything in an answer comes from one
version however many are loaded and activated meanwhile. A handle is immutable; what changes is which one is active.

`geosurge.server.policy` decides what has to be done before a version can be loaded. A load that fails, for whatever
reason, changes nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

from geosurge import store as stores
from geosurge.bundle import read_manifest
from geosurge.bundle.manifest import MANIFEST_FILE
from geosurge.description import IndexVersion, VersionState
from geosurge.errors import (
    BundleError,
    BundleNotFoundError,
    EncoderError,
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
from geosurge.server.handle import LoadProgress, Needs, VersionHandle
from geosurge.server.metrics import Metrics
from geosurge.server.policy import LOADED_STATES, Load, Refuse, Resident, Step, Unload, next_step

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class VersionLoader(Protocol):
    """What opens and closes versions; `geosurge.server.loader.Loader` is the one that does."""

    async def needs(self, path: Path) -> Needs:
        """Reads what loading a bundle takes."""

    async def open(self, name: str, path: Path, progress: LoadProgress, *, beside_traffic: bool) -> VersionHandle:
        """Reads and checks a bundle."""

    async def close(self, handle: VersionHandle) -> None:
        """Frees a version."""


@dataclass(eq=False)
class _Version:
    """The mutable record of one version."""

    name: str
    state: VersionState = VersionState.UNLOADED
    state_time: datetime | None = None
    handle: VersionHandle | None = None
    failure: GeoSurgeError | None = None
    progress: LoadProgress | None = None
    needs: Needs | None = None
    users: int = 0
    unused: asyncio.Event = field(default_factory=asyncio.Event)
    drain: asyncio.Task[None] | None = None
    last_requested: int = 0

    def enter(self, state: VersionState) -> None:
        """Changes the state."""
        self.state, self.state_time = state, datetime.now(UTC)


_LoadTask: TypeAlias = asyncio.Task[None]


class Versions:
    """The versions of one server; all methods belong to one event loop.

    Changes are made one after the other. A newer one makes a load that is under way for an older one give up.
    """

    def __init__(
        self,
        source: Path,
        loader: VersionLoader,
        *,
        max_versions: int = 2,
        metrics: Metrics,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """Records where the bundles are; nothing is loaded yet.

        Args:
            source: A store, or one bundle, which is then the only version.
            loader: Opens and closes versions.
            max_versions: Versions that may be in memory at once.
            metrics: Counts loads and swaps.
            on_change: Called when another version, or none, has become active.
        """
        is_bundle = (source / MANIFEST_FILE).exists()
        self._store = None if is_bundle else source
        self._bundle = (read_manifest(source).name, source) if is_bundle else None
        self._loader = loader
        self._max_versions = max_versions
        self._metrics = metrics
        self._on_change = on_change
        self._versions: dict[str, _Version] = {}
        self._active: _Version | None = None
        # Nothing is active while it is exchanged for another; should that fail, it is brought back.
        self._exchanged: _Version | None = None
        self._canary: tuple[_Version, float] | None = None
        self._loading: tuple[_Version, _LoadTask] | None = None
        self._pointer_lock = asyncio.Lock()
        self._request_numbers = itertools.count(1)
        self._latest_switch = ""
        self._successor: _Version | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False

    @property
    def active(self) -> VersionHandle:
        """The version that answers requests which name none.

        Raises:
            NoActiveVersionError: There is none at the moment.
        """
        if self._active is None or self._active.handle is None:
            raise _no_active_version()
        return self._active.handle

    @property
    def is_serving(self) -> bool:
        """Whether requests that name no version are answered."""
        return self._active is not None and not self._closing

    @property
    def loaded(self) -> tuple[VersionHandle, ...]:
        """All versions that requests may name."""
        return tuple(
            version.handle
            # In one step: the metrics are read on another thread.
            for version in list(self._versions.values())
            if version.handle is not None and version.state in LOADED_STATES
        )

    @contextlib.contextmanager
    def acquire(self, name: str = "", request_id: str = "") -> Iterator[VersionHandle]:
        """Keeps a version in use inside the ``with`` block.

        Args:
            name: Name of a loaded version; empty means the active one, or the canary for its share of the requests.
            request_id: Decides between the two: equal ids get the same version, an empty one gets the active version.

        Raises:
            IndexVersionUnknownError: No loaded version has this name.
            NoActiveVersionError: There is no active version at the moment.
        """
        version = self._choose(name, request_id)
        assert version.handle is not None
        version.users += 1
        try:
            yield version.handle
        finally:
            version.users -= 1
            if version.users == 0:
                version.unused.set()

    def status(self, name: str) -> IndexVersion:
        """What is known of a version.

        Raises:
            BundleNotFoundError: Neither the server nor its store has it.
        """
        version = self._versions.get(name)
        if version is None:
            self._path(name)
            return IndexVersion(name, VersionState.UNLOADED)
        needs, progress = version.needs, version.progress
        return IndexVersion(
            name=name,
            state=version.state,
            state_time=version.state_time,
            failure=version.failure,
            load_step=progress.step if progress is not None else "",
            load_progress=progress.fraction if progress is not None else 0.0,
            request_count=version.users,
            memory_bytes=0 if needs is None else needs.memory_bytes,
            canary_share=self._canary[1] if self._canary is not None and self._canary[0] is version else 0.0,
            create_time=None if needs is None else needs.create_time,
            encoder_sha256="" if needs is None else needs.encoder_sha256,
        )

    async def statuses(self) -> list[IndexVersion]:
        """All versions that were ever asked for and all bundles of the store, by name."""
        known = {name: self.status(name) for name in self._versions}
        if self._store is not None:
            for entry in await asyncio.to_thread(stores.list_bundles, self._store):
                if entry.name not in known:
                    failure = None if entry.problem is None else BundleError(entry.problem)
                    known[entry.name] = IndexVersion(
                        entry.name, VersionState.UNLOADED, failure=failure, create_time=entry.create_time
                    )
        return [known[name] for name in sorted(known)]

    async def start(self) -> VersionHandle:
        """Loads and activates what the source says is active.

        Where that cannot be used, a version that was active before serves. The store's pointer stays, so that the next
        start tries again what it names.

        Raises:
            BundleError: Neither that bundle nor any that was active before can be used; this is why that one cannot.
            StoreError: As above, when the store's pointer is damaged.
            EncoderError: As above, when the encoder cannot be loaded.
        """
        try:
            await self._switch(self._current(), lambda: None, kind="start")
        except (BundleError, EncoderError) as error:
            if not await self._start_with_an_older_one(error):
                raise
        return self.active

    def load(self, name: str) -> IndexVersion:
        """Starts to load a version; does nothing when it is loaded or being loaded.

        Raises:
            BundleNotFoundError: The store has no such bundle.
            ShuttingDownError: The server is stopping.
        """
        self._request(name)
        self._start_load(name, unload_first=False)
        return self.status(name)

    async def activate(self, name: str, *, unload_first: bool = False) -> str:
        """Makes a version the active one, here and in the store, after loading it where it is not.

        Goes on to its end when the caller is cancelled.

        Returns:
            The version that was active before; empty when none was.

        Raises:
            GeoSurgeError: It cannot be used, does not fit, or a newer request wants another one. Nothing has changed.
        """
        switch = self._switch(name, lambda: self._write_pointer(name), unload_first=unload_first, kind="activate")
        return await asyncio.shield(self._track(switch))

    async def rollback(self) -> tuple[str, str]:
        """Activates the version that the store says was active before.

        Returns:
            The version that is active now, and the one that was until now.

        Raises:
            StoreError: There is none to go back to.
            GeoSurgeError: As `activate`.
        """
        if self._store is None:
            raise StoreError("this server serves one bundle and no store, so there is nothing to go back to")
        store = self._store
        target = await asyncio.to_thread(stores.rollback_target, store)
        switch = self._switch(target, lambda: stores.rollback(store, to=target), kind="rollback")
        return target, await asyncio.shield(self._track(switch))

    async def follow_store(self) -> None:
        """Activates what the store's pointer names now, such as after somebody else has moved it.

        Raises:
            GeoSurgeError: As `activate`.
        """
        await asyncio.shield(self._track(self._follow()))

    def unload(self, name: str) -> IndexVersion:
        """Frees a version as soon as its requests are answered; makes a load of it give up.

        Raises:
            VersionInUseError: It is the active version, about to be, or the canary.
            BundleNotFoundError: Neither the server nor its store has it.
        """
        version = self._versions.get(name)
        if version is None:
            return self.status(name)
        if version is self._active:
            raise VersionInUseError(f"version {name!r} is active; activate another one first")
        if version is self._successor:
            raise VersionInUseError(f"version {name!r} is being activated; activate another one first")
        if self._canary is not None and version is self._canary[0]:
            raise VersionInUseError(f"version {name!r} is the canary; end the canary first")
        if version.progress is not None:
            version.progress.give_up(_superseded("it was asked to be unloaded"))
        if version.state is VersionState.READY:
            self._drain(version)
        return self.status(name)

    def set_canary(self, name: str, share: float) -> IndexVersion | None:
        """Sends a share of the requests that name no version to a second one.

        Args:
            name: A loaded version; empty ends the canary.
            share: From 0 to 1.

        Raises:
            OptionOutOfRangeError: The share is not a number from 0 to 1.
            VersionNotLoadedError: The version is not loaded.
            VersionInUseError: It is the active version.
        """
        if not 0.0 <= share <= 1.0:
            raise OptionOutOfRangeError(f"the share of a canary is {share}; it must be from 0 to 1")
        if not name:
            self._canary = None
            return None
        version = self._versions.get(name)
        if version is None or version.state not in LOADED_STATES:
            raise VersionNotLoadedError(f"version {name!r} is not loaded; load it before it becomes a canary")
        if version is self._active:
            raise VersionInUseError(f"version {name!r} is active and has all the traffic; a canary is another one")
        self._canary = (version, share)
        return self.status(name)

    def give_up(self) -> None:
        """Ends loads under way and refuses every further change; what is loaded goes on answering."""
        self._closing = True
        for version in self._versions.values():
            if version.progress is not None:
                version.progress.give_up(_shutting_down())

    async def close(self) -> None:
        """Gives up loads, waits until no request uses any version, and frees all."""
        self.give_up()
        if self._loading is not None:
            await asyncio.wait([self._loading[1]])
        self._active = None
        for version in list(self._versions.values()):
            if version.state in LOADED_STATES:
                self._drain(version)
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _choose(self, name: str, request_id: str) -> _Version:
        if name:
            version = self._versions.get(name)
            if version is None or version.state not in LOADED_STATES:
                loaded = ", ".join(handle.name for handle in self.loaded)
                raise IndexVersionUnknownError(
                    f"index version {name!r} is not loaded; loaded: {loaded}. Leave it empty for the active one"
                )
            return version
        if self._canary is not None and request_id and _hash_fraction(request_id) < self._canary[1]:
            return self._canary[0]
        if self._active is None:
            raise _no_active_version()
        return self._active

    def _request(self, name: str) -> None:
        """Records a request for a version, and makes a load for an older request give up."""
        if self._closing:
            raise _shutting_down()
        self._path(name)
        if self._loading is not None:
            other = self._loading[0]
            if other.name != name and other.progress is not None:
                other.progress.give_up(_superseded(f"version {name!r} was asked for after it"))
        version = self._versions.setdefault(name, _Version(name))
        version.last_requested = next(self._request_numbers)

    def _start_load(self, name: str, *, unload_first: bool) -> _LoadTask | None:
        """The task that loads a version; ``None`` when it is loaded."""
        version = self._versions[name]
        if version.state in LOADED_STATES:
            return None
        if self._loading is not None and self._loading[0] is version:
            progress = version.progress
            if progress is not None and not progress.is_given_up:
                progress.unload_first |= unload_first
                return self._loading[1]
        previous = None if self._loading is None else self._loading[1]
        version.progress, version.failure = LoadProgress(unload_first=unload_first), None
        if version.state is not VersionState.DRAINING:
            version.enter(VersionState.LOADING)
        task = self._track(self._load(version, version.progress, previous))
        self._loading = (version, task)
        return task

    def _track(self, work: Coroutine[Any, Any, _Result]) -> asyncio.Task[_Result]:
        """Runs something that goes on when its caller is cancelled; `close` waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # Whoever waits for it is told; when nobody does, the state of the version says it.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return task

    async def _load(self, version: _Version, progress: LoadProgress, previous: _LoadTask | None) -> None:
        """Loads a version after the load before it has ended; brings the active one back if it left in vain."""
        begun = time.perf_counter()
        failure: GeoSurgeError | None = None
        try:
            if previous is not None:
                await asyncio.wait([previous])
            if version.drain is not None:
                await asyncio.wait([version.drain])
            if version.state in LOADED_STATES:
                # The load before this one was asked to give up too late, or brought this version back.
                return
            version.enter(VersionState.LOADING)
            await self._make_room(version, progress)
            await self._open(version, progress)
            if progress.unload_first:
                self._successor = version
        except Exception as error:  # noqa: BLE001
            failure = _to_failure(error)
            is_foreseen = isinstance(error, GeoSurgeError)
            self._report_failure(version, failure, time.perf_counter() - begun, unexpected=not is_foreseen)
            if version.progress is progress:
                # Whoever asks for it from now on wants another load.
                version.progress, version.failure = None, failure
                version.enter(VersionState.FAILED)
            await self._bring_back()
        finally:
            if version.progress is progress:
                version.progress = None
            if self._loading is not None and self._loading[1] is asyncio.current_task():
                self._loading = None
        # Raised here, it has no context: the exception before it would keep alive what the load had opened.
        if failure is not None:
            raise failure
        self._metrics.load_ended("ready", time.perf_counter() - begun)
        logger.info("loaded", extra={"index_version": version.name})

    async def _open(self, version: _Version, progress: LoadProgress) -> None:
        beside_traffic = self._active is not None
        path = self._path(version.name)
        handle = await self._loader.open(version.name, path, progress, beside_traffic=beside_traffic)
        if progress.is_given_up:
            await self._loader.close(handle)
            progress.report("ready", 1.0)
        version.handle = handle
        version.enter(VersionState.READY)
        if version is self._exchanged:
            self._point_at(version, "activate")

    def _report_failure(self, version: _Version, failure: GeoSurgeError, seconds: float, *, unexpected: bool) -> None:
        self._metrics.load_ended("superseded" if isinstance(failure, LoadSupersededError) else "failed", seconds)
        fields = {"index_version": version.name, "reason": str(failure)}
        if unexpected:
            logger.exception("load failed unexpectedly", extra=fields)
        else:
            logger.warning("load failed", extra=fields)

    async def _make_room(self, version: _Version, progress: LoadProgress) -> None:
        """Unloads what has to go, the active version only where the request allows it."""
        while True:
            progress.report("making room", 0.0)
            version.needs = await self._loader.needs(self._path(version.name))
            # What is READY while the pointer moves may be ACTIVE afterwards.
            async with self._pointer_lock:
                step = self._next_step(version.needs, unload_first=progress.unload_first)
                leaving = self._versions[step.name] if isinstance(step, Unload) else None
                if leaving is not None and leaving is self._active:
                    self._exchanged, self._active = leaving, None
                    self._metrics.set_active("")
                    self._on_change()
                if leaving is not None:
                    self._drain(leaving)
            match step:
                case Load():
                    return
                case Refuse(reason):
                    raise VersionDoesNotFitError(f"version {version.name!r} was not loaded: {reason}")
            drains = [other.drain for other in self._versions.values() if other.drain is not None]
            await asyncio.wait(drains, return_when=asyncio.FIRST_COMPLETED)

    def _next_step(self, needs: Needs, *, unload_first: bool) -> Step:
        canary = None if self._canary is None else self._canary[0]
        residents = [
            Resident(other.name, other.state, other.last_requested, has_traffic=other in (canary, self._successor))
            for other in self._versions.values()
            if other.state in LOADED_STATES or other.state is VersionState.DRAINING
        ]
        return next_step(
            needs.memory_bytes,
            needs.available_bytes,
            residents,
            max_versions=self._max_versions,
            unload_first=unload_first,
        )

    async def _bring_back(self) -> None:
        """Loads a version again that made room for one that cannot be used, whatever else is in memory."""
        replaced = self._exchanged
        # With a successor, it is not decided yet.
        if replaced is None or self._successor is not None or self._closing:
            return
        if replaced.drain is not None:
            await asyncio.wait([replaced.drain])
        try:
            replaced.enter(VersionState.LOADING)
            await self._open(replaced, LoadProgress())
        except Exception as error:
            replaced.failure = _to_failure(error)
            replaced.enter(VersionState.FAILED)
            logger.exception("the version before could not be loaded again", extra={"index_version": replaced.name})

    async def _switch(
        self, name: str, write_pointer: Callable[[], object], *, kind: str, unload_first: bool = False
    ) -> str:
        self._request(name)
        self._latest_switch = name
        loading = self._start_load(name, unload_first=unload_first)
        before = "" if self._active is None else self._active.name
        if loading is not None:
            await asyncio.shield(loading)
        version = self._versions[name]
        try:
            async with self._pointer_lock:
                before = await self._move_pointer(version, write_pointer, kind) or before
        except GeoSurgeError:
            await self._undo_exchange(version)
            raise
        return "" if before == name else before

    async def _move_pointer(self, version: _Version, write_pointer: Callable[[], object], kind: str) -> str:
        """Makes a loaded version the active one; returns which other one was, empty when none was."""
        name = version.name
        try:
            if self._closing:
                raise _shutting_down()
            # Where nothing is active, this one is better than none until the newer one is loaded.
            if name != self._latest_switch and self._active is not None:
                raise LoadSupersededError(
                    f"version {name!r} was not activated, because another version was asked for after it"
                )
            if version.state not in LOADED_STATES:
                raise LoadSupersededError(f"version {name!r} was unloaded before it could be activated")
            self._successor = version
            # The store first: a server that dies here starts with the new version, which has passed every check.
            await asyncio.to_thread(_write, write_pointer)
        finally:
            self._successor = None
        before = "" if self._active is None or self._active is version else self._active.name
        # A server that stops has freed it meanwhile.
        if version.state in LOADED_STATES:
            self._point_at(version, kind)
        return before

    async def _undo_exchange(self, version: _Version) -> None:
        """Loads the version again that made room for one that was then not activated."""
        replaced = self._exchanged
        if replaced is None or self._closing:
            return
        if version.state is VersionState.READY:
            self._drain(version)
        loading = self._start_load(replaced.name, unload_first=False)
        if loading is not None:
            await asyncio.wait([loading])

    async def _start_with_an_older_one(self, error: GeoSurgeError) -> bool:
        """Activates the newest usable version of the store's history; returns whether there is one."""
        names: list[str] = []
        if self._store is not None:
            with contextlib.suppress(StoreError):
                names = stores.history(self._store)
        for name in names:
            if name in self._versions:
                continue
            with contextlib.suppress(BundleError, EncoderError):
                await self._switch(name, lambda: None, kind="start")
                logger.error(
                    "what the store names cannot be used, so a version that was active before serves: %s; %s",
                    error,
                    self._how_to_repair(),
                    extra={"index_version": name},
                )
                return True
        return False

    async def _follow(self) -> None:
        async with self._pointer_lock:
            # Not while it is being moved here; and no other request may come between reading it and asking for it.
            name = self._current()
        if self._active is not None and self._active.name == name:
            return
        try:
            await self._switch(name, lambda: self._check_current(name), kind="reload")
        except (LoadSupersededError, ShuttingDownError):
            raise
        except GeoSurgeError as error:
            raise type(error)(f"{error}; the store still names {name!r}: {self._how_to_repair()}") from error

    def _check_current(self, name: str) -> None:
        if self._current() != name:
            raise LoadSupersededError(f"version {name!r} was not activated, because the store names another by now")

    def _how_to_repair(self) -> str:
        active = "NAME" if self._active is None else self._active.name
        return f"to keep what serves, geosurge index activate {active} --store {self._store}"

    def _point_at(self, version: _Version, kind: str) -> None:
        before = self._active
        if version is before:
            return
        if before is not None:
            before.enter(VersionState.READY)
        if self._canary is not None and self._canary[0] is version:
            self._canary = None
        version.enter(VersionState.ACTIVE)
        self._active, self._exchanged = version, None
        self._metrics.set_active(version.name)
        self._metrics.swapped(kind)
        self._on_change()
        logger.info(
            "activated", extra={"index_version": version.name, "previous_version": before.name if before else ""}
        )

    def _drain(self, version: _Version) -> asyncio.Task[None]:
        """Withdraws a version from new requests; the task frees it when it has none left."""
        version.enter(VersionState.DRAINING)
        if self._canary is not None and self._canary[0] is version:
            self._canary = None
        version.drain = self._track(self._free(version))
        return version.drain

    async def _free(self, version: _Version) -> None:
        while version.users:
            version.unused.clear()
            await version.unused.wait()
        handle, version.handle = version.handle, None
        try:
            if handle is not None:
                await self._loader.close(handle)
        finally:
            version.enter(VersionState.UNLOADED)
            version.drain = None
        self._metrics.swapped("unload")
        logger.info("unloaded", extra={"index_version": version.name})

    def _path(self, name: str) -> Path:
        """Where a version's bundle is."""
        if self._store is not None:
            return stores.bundle_path(self._store, name)
        assert self._bundle is not None
        only, path = self._bundle
        if name != only:
            raise BundleNotFoundError(f"this server serves the one bundle {only!r} and no store; it has no {name!r}")
        return path

    def _current(self) -> str:
        """The version that the source says is active."""
        if self._store is not None:
            return stores.resolve_bundle(self._store).name
        assert self._bundle is not None
        return self._bundle[0]

    def _write_pointer(self, name: str) -> None:
        if self._store is not None:
            stores.activate(self._store, name)


def _to_failure(error: Exception) -> GeoSurgeError:
    """The error without its traceback, which would keep alive what the load had opened."""
    if isinstance(error, GeoSurgeError):
        return type(error)(str(error))
    return GeoSurgeError(f"{type(error).__name__}: {error}")


def _hash_fraction(request_id: str) -> float:
    """A hash of the id, uniform in [0, 1)."""
    digest = hashlib.blake2b(request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def _no_active_version() -> NoActiveVersionError:
    return NoActiveVersionError("no index version is active while one is exchanged for another; try again soon")


def _superseded(reason: str) -> LoadSupersededError:
    return LoadSupersededError(f"the load gave up: {reason}; ask again if it is still wanted")


def _shutting_down() -> ShuttingDownError:
    return ShuttingDownError("the server is stopping")


def _write(write_pointer: Callable[[], object]) -> None:
    try:
        write_pointer()
    except OSError as error:
        raise StoreError(f"the store cannot be written, so nothing was activated: {error}") from error
