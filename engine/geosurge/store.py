"""Index stores: a directory of bundles with a ``CURRENT`` pointer.

| name | what it is |
|---|---|
| ``<name>/`` | a bundle whose manifest has the same name |
| ``CURRENT`` | name of the active bundle |
| ``HISTORY`` | names of the last 100 bundles that were active before it, oldest first, a line each |
| ``.publish-<name>-<pid>/`` | a bundle on its way in; what a killed publisher leaves is removed by the next one |
| ``.publish.lock``, ``.activate.lock`` | held by a publisher, and by whoever moves ``CURRENT`` |

Readers take no lock: a bundle never changes once it has its name, and ``CURRENT`` is replaced in one step. Whenever a
publisher or an activation is killed, the store opens what it opened before, or what was being activated, and nothing
between.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from geosurge.bundle import Bundle, open_bundle
from geosurge.bundle.golden import Encoder
from geosurge.bundle.manifest import (
    BUNDLE_NAME,
    CURRENT_FILE,
    HISTORY_FILE,
    MANIFEST_FILE,
    Manifest,
    check_bundle_name,
    render_manifest,
)
from geosurge.bundle.verifying import VerifyReport, verify_bundle
from geosurge.durable_files import fsync_path, replace_file
from geosurge.errors import (
    BundleCorruptError,
    BundleError,
    BundleInconsistentError,
    BundleNotFoundError,
    BundlePartialError,
    StoreError,
)

STORE_VARIABLE = "GEOSURGE_INDEX"
"""Environment variable with the default store or bundle."""

_TEMPORARY_PREFIX = ".publish-"
_PUBLISH_LOCK = ".publish.lock"
_ACTIVATE_LOCK = ".activate.lock"
_COPY_BYTES = 1 << 20
_HISTORY_LENGTH = 100
_ACTIVATE_LOCK_SECONDS = 10.0
"""What is done under this lock takes milliseconds, so whoever keeps it for longer is stuck."""
_LOCK_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class StoreEntry:
    """One directory of a store.

    Attributes:
        name: Its name.
        path: Where it is.
        active: Whether ``CURRENT`` names it.
        create_time: When the bundle was built; ``None`` when its manifest cannot be read.
        problem: Why the bundle cannot be used; ``None`` when it can.
    """

    name: str
    path: Path
    active: bool
    create_time: datetime | None
    problem: str | None


def default_store() -> Path:
    """The store that is used when none is named.

    The environment variable ``GEOSURGE_INDEX``; without it the ``indexes`` folder of the checkout that this code runs
    from; and where there is no checkout, ``indexes`` in the working directory.
    """
    named = os.environ.get(STORE_VARIABLE)
    if named:
        return Path(named)
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").is_file() and (checkout / "indexes").is_dir():
        return checkout / "indexes"
    return Path("indexes")


def list_bundles(store: Path) -> list[StoreEntry]:
    """All bundles of a store by name, with what is wrong with those that cannot be used.

    Raises:
        StoreError: The store does not exist.
    """
    _check_store(store)
    active = current(store)
    names = {path.name for path in store.iterdir() if path.is_dir() and not path.name.startswith(".")}
    return [_entry(store, name, active=name == active) for name in sorted(names | ({active} if active else set()))]


def current(store: Path) -> str | None:
    """Name of the active bundle; ``None`` when none was activated.

    Raises:
        StoreError: ``CURRENT`` does not hold a name.
    """
    try:
        name = (store / CURRENT_FILE).read_text().removesuffix("\n")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{store / CURRENT_FILE} cannot be read: {error}; activate a bundle") from error
    return _check_name(name, f"{store / CURRENT_FILE} holds")


def resolve_bundle(path: Path) -> Path:
    """The bundle that a path means: itself when it is one, or the active bundle of a store.

    Raises:
        BundleNotFoundError: There is neither a bundle nor a store with an active bundle.
        BundlePartialError: It is the directory of a bundle without a manifest.
        StoreError: ``CURRENT`` does not hold a name.
    """
    if (path / MANIFEST_FILE).exists():
        return path
    name = current(path)
    if name is not None:
        if not (path / name).is_dir():
            raise BundleNotFoundError(
                f"{path / CURRENT_FILE} names {name!r}, which is not there; "
                f"activate another bundle: geosurge index activate NAME --store {path}"
            )
        return path / name
    if not path.is_dir():
        raise BundleNotFoundError(f"there is no index bundle or store at {path}")
    if (path / "cells.lmdb").exists() or any(path.glob("*.faiss")):
        raise BundlePartialError(f"{path} has no {MANIFEST_FILE}, so it is no finished index bundle")
    raise BundleNotFoundError(f"the store {path} has no active bundle: geosurge index activate NAME --store {path}")


def bundle_path(store: Path, name: str) -> Path:
    """Where a store has a bundle.

    Raises:
        BundleNotFoundError: It has none of this name.
    """
    path = store / name
    if not BUNDLE_NAME.fullmatch(name) or not path.is_dir():
        raise BundleNotFoundError(f"the store {store} has no bundle {name[:200]!r}; list them: geosurge index list")
    return path


def publish(
    store: Path,
    source: Path,
    *,
    name: str | None = None,
    verify: bool = True,
    activate: bool = False,
    encoder_loader: Callable[[Path], Encoder] | None = None,
) -> str:
    """Copies a bundle into a store; nobody sees it before it is whole and on the disk.

    Publishing the very bundle that the store has under the name already is no error, so that a publication that was cut
    off can be repeated.

    Args:
        store: Made when it does not exist.
        source: Directory of the bundle.
        name: Name in the store; the manifest's own by default. The copy's manifest gets it.
        verify: Check the copy entirely before it gets its name; without it, only that every byte was copied.
        activate: Also make it the active bundle.
        encoder_loader: See `geosurge.bundle.verifying.verify_bundle`.

    Returns:
        The name of the bundle in the store.

    Raises:
        StoreError: The name is not allowed, or another bundle has it.
        BundleError: The source is no sound bundle.
    """
    bundle = open_bundle(source)
    name = _check_name(bundle.manifest.name if name is None else name, "a bundle cannot have")
    if not store.exists():
        store.mkdir(parents=True)
        fsync_path(store.parent)
    _check_store(store)
    with _locked(store / _PUBLISH_LOCK):
        # The lock says that no publisher is at work, so whatever is under way belongs to a dead one.
        for stale in store.glob(f"{_TEMPORARY_PREFIX}*"):
            if stale.is_dir():
                shutil.rmtree(stale)
        if _is_published(bundle, store / name):
            if verify:
                _raise_first(verify_bundle(store / name, encoder_loader=encoder_loader))
        else:
            temporary = store / f"{_TEMPORARY_PREFIX}{name}-{os.getpid()}"
            try:
                _copy(bundle, temporary, name)
                if verify:
                    _raise_first(verify_bundle(temporary, encoder_loader=encoder_loader))
                temporary.rename(store / name)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        fsync_path(store)
    if activate:
        _activate(store, name)
    return name


def activate(store: Path, name: str) -> None:
    """Makes a bundle the active one after opening it.

    Raises:
        StoreError: The name is not allowed, or the store does not exist.
        BundleError: The bundle cannot be opened; ``CURRENT`` stays as it was.
    """
    _activate(store, name)


def history(store: Path) -> list[str]:
    """Names of the bundles that were active before, the newest first, each once.

    Raises:
        StoreError: ``HISTORY`` cannot be read.
    """
    return list(dict.fromkeys(reversed(_read_history(store))))


def rollback_target(store: Path) -> str:
    """The bundle that `rollback` would go back to.

    Raises:
        StoreError: There is none.
    """
    _check_store(store)
    return _go_back(store)[0]


def rollback(store: Path, *, to: str | None = None) -> str:
    """Goes back to the bundle that was active before; calling it again goes back further.

    Bundles that are gone or cannot be opened are skipped.

    Args:
        store: The store.
        to: What `rollback_target` said, to go back to this one or not at all.

    Returns:
        The name of the bundle that is active now.

    Raises:
        StoreError: There is none to go back to, or it is another one; ``CURRENT`` stays as it was.
    """
    _check_store(store)
    with _locked(store / _ACTIVATE_LOCK, wait_seconds=_ACTIVATE_LOCK_SECONDS):
        name, before = _go_back(store)
        if to not in (None, name):
            raise StoreError(f"the store {store} was changed meanwhile and goes back to {name!r} and not to {to!r} now")
        # CURRENT first: a rollback that is killed here leaves its target in the history, and the next one skips it.
        replace_file(store / CURRENT_FILE, f"{name}\n".encode())
        _write_history(store, before)
        return name


def _go_back(store: Path) -> tuple[str, list[str]]:
    """The usable bundle that was active last before the current one, and the history before it."""
    active = _current_if_readable(store)
    names = _read_history(store)
    while names:
        name = names.pop()
        if name != active and _entry(store, name, active=False).problem is None:
            return name, names
    raise StoreError(f"no bundle of {store} was active before {active!r}; activate one by name")


def _activate(store: Path, name: str) -> None:
    _check_store(store)
    _check_name(name, "a bundle cannot have")
    with _locked(store / _ACTIVATE_LOCK, wait_seconds=_ACTIVATE_LOCK_SECONDS):
        path = bundle_path(store, name)
        _check_own_name(open_bundle(path).manifest, path)
        active = _current_if_readable(store)
        if active == name:
            return
        if active is not None:
            # HISTORY first: what is killed here has the active bundle in its history, and a rollback skips it.
            _write_history(store, [*_read_history(store), active])
        replace_file(store / CURRENT_FILE, f"{name}\n".encode())


def _current_if_readable(store: Path) -> str | None:
    """The active bundle for those that are about to replace ``CURRENT``: a damaged one is what they repair."""
    try:
        return current(store)
    except StoreError:
        return None


def _is_published(bundle: Bundle, target: Path) -> bool:
    """Whether a store has a bundle under its name already; raises when the name is taken by anything else."""
    if not os.path.lexists(target):
        return False
    # Equal lists of hashes are equal content; the name and the seal over it may differ by a renaming.
    unnamed = {"name": target.name, "manifest_sha256": bundle.manifest.manifest_sha256}
    with contextlib.suppress(BundleError):
        if open_bundle(target).manifest.model_copy(update=unnamed) == bundle.manifest.model_copy(update=unnamed):
            return True
    raise StoreError(f"{target} exists already; a published bundle never changes, so choose another name")


def _copy(bundle: Bundle, target: Path, name: str) -> None:
    """Copies the files that the manifest lists onto the disk, and the manifest last."""
    target.mkdir()
    for relative, info in bundle.manifest.files.items():
        copy = target / relative
        copy.parent.mkdir(parents=True, exist_ok=True)
        if _copy_file(bundle.path / relative, copy) != info.sha256:
            raise BundleCorruptError(
                f"{bundle.path / relative} has another SHA-256 than recorded, so the bundle was not published"
            )
    for folder, _, _ in os.walk(target, topdown=False):
        fsync_path(Path(folder))
    data = (bundle.path / MANIFEST_FILE).read_bytes()
    if name != bundle.manifest.name:
        data = render_manifest(bundle.manifest.model_copy(update={"name": name}))[1]
    replace_file(target / MANIFEST_FILE, data)


def _copy_file(source: Path, target: Path) -> str:
    """Copies a file onto the disk; returns the SHA-256 of what was copied."""
    digest = hashlib.sha256()
    with source.open("rb") as reader, target.open("xb") as writer:
        while chunk := reader.read(_COPY_BYTES):
            digest.update(chunk)
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    return digest.hexdigest()


def _raise_first(report: VerifyReport) -> None:
    if not report.ok:
        error = report.problems[0].error
        more = f" (and {len(report.problems) - 1} more problems)" if len(report.problems) > 1 else ""
        raise type(error)(f"the bundle was not published, because the copy does not verify: {error}{more}") from error


def _entry(store: Path, name: str, *, active: bool) -> StoreEntry:
    path = store / name
    try:
        manifest = open_bundle(path).manifest
    except BundleError as error:
        return StoreEntry(name, path, active, None, str(error))
    try:
        _check_own_name(manifest, path)
    except BundleError as error:
        return StoreEntry(name, path, active, manifest.create_time, str(error))
    return StoreEntry(name, path, active, manifest.create_time, None)


def _check_own_name(manifest: Manifest, path: Path) -> None:
    if manifest.name != path.name:
        raise BundleInconsistentError(
            f"{path} holds the bundle {manifest.name!r}: answers would name another version than the store; "
            "rename the directory back, or publish the bundle under a new name"
        )


def _check_store(store: Path) -> None:
    if not store.is_dir():
        raise StoreError(f"there is no index store at {store}; publish a bundle to make one")
    if (store / MANIFEST_FILE).exists():
        raise StoreError(f"{store} is a bundle and not a store; name the directory that it is to be in, or is in")


def _check_name(name: str, subject: str) -> str:
    try:
        return check_bundle_name(name)
    except ValueError as error:
        raise StoreError(f"{subject} the name {name!r}: {error}") from error


def _read_history(store: Path) -> list[str]:
    try:
        lines = (store / HISTORY_FILE).read_text().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{store / HISTORY_FILE} cannot be read: {error}; remove it") from error
    return [line for line in lines if BUNDLE_NAME.fullmatch(line)]


def _write_history(store: Path, names: list[str]) -> None:
    replace_file(store / HISTORY_FILE, "".join(f"{name}\n" for name in names[-_HISTORY_LENGTH:]).encode())


@contextlib.contextmanager
def _locked(path: Path, *, wait_seconds: float = math.inf) -> Iterator[None]:
    """Holds a lock that no other process or thread can hold; the system lets go of it when the holder dies.

    Raises:
        StoreError: Another one has held it for ``wait_seconds``.
    """
    with path.open("ab") as file:
        deadline = time.monotonic() + wait_seconds
        while not _try_lock(file):
            if time.monotonic() >= deadline:
                raise StoreError(
                    f"another process has held {path} for {wait_seconds:.0f} s, so nothing was changed; end it "
                    f"(fuser {path} names it), and try again"
                )
            time.sleep(_LOCK_POLL_SECONDS)
        yield


def _try_lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
