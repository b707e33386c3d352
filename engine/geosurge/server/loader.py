"""Opens and closes index versions beside live traffic, on one thread of its own.

Before a version may answer anything it passes this gate, step by step:

1. the manifest is of a readable schema and every file is there with its size;
2. every byte has the recorded SHA-256, and is copied into a private directory while it is read: what was checked is
   what is served, whatever happens to the bundle's own files afterwards;
3. the indexes and the tree open, and every id of every list is where it belongs;
4. the encoder is the one that the indexes were built with; a loaded version with the same files of it shares it;
5. manifest, tree and indexes agree, golden queries and golden images get their recorded answers;
6. a batch of the largest size goes through.

Reading is throttled to half of the thread's time. What computes with all cores (the last two steps) takes its turn
between two batches of the live versions, because two computations at once take many times as long as one after the
other.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import io
import logging
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from PIL import Image

from geosurge.bundle import Bundle, open_bundle
from geosurge.bundle.manifest import ENCODER_DIRECTORY, Manifest
from geosurge.bundle.verifying import check_encoder_identity, check_golden_images, check_index
from geosurge.encoder.model import ImageEncoder
from geosurge.errors import (
    BundleCorruptError,
    BundleError,
    BundleInconsistentError,
    BundlePartialError,
    EncoderError,
    GeoSurgeError,
    LoadImpossibleError,
)
from geosurge.images import ImageLimits
from geosurge.location import LocateOptions
from geosurge.locator import Locator
from geosurge.server.failures import PRIVATE_COPY_PREFIX
from geosurge.server.handle import LoadProgress, Needs, VersionHandle

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_EncoderKey: TypeAlias = tuple[str, ...]

_CHUNK_BYTES: Final = 1 << 20
_REST_RATIO: Final = 1.0
"""Seconds of rest for each second of reading, while other versions have traffic."""

_READ_SHARE: Final = 0.6
"""Share of a load's progress that reading makes up."""


class Loader:
    """Opens and closes versions; one thread does both, because FAISS must not do them at the same time.

    Attributes:
        device: Device that versions are loaded onto.
    """

    def __init__(
        self,
        between_batches: Callable[[Callable[[], None]], Future[None]],
        *,
        device: str,
        limits: ImageLimits,
        max_batch_size: int,
        scratch: Path | None = None,
    ) -> None:
        """Starts the thread.

        Args:
            between_batches: Runs a function on the thread that encodes for the live versions, between two batches.
            device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
            limits: Limits of the images that versions accept.
            max_batch_size: Size of the largest batch, which a version must answer before it serves.
            scratch: Directory for the private copies; by default the system's directory for temporary files.
        """
        self.device = device
        self._between_batches = between_batches
        self._limits = limits
        self._max_batch_size = max_batch_size
        self._scratch = Path(tempfile.gettempdir()) if scratch is None else scratch
        self._thread = ThreadPoolExecutor(1, "geosurge-loader")
        self._encoders: weakref.WeakValueDictionary[_EncoderKey, ImageEncoder] = weakref.WeakValueDictionary()
        self._thread.submit(_remove_abandoned_copies, self._scratch)

    async def needs(self, path: Path) -> Needs:
        """Reads what loading a bundle takes.

        Raises:
            BundleError: It cannot be opened.
            LoadImpossibleError: The machine is at fault.
        """
        return await self._on_thread(self._needs, path)

    async def open(self, name: str, path: Path, progress: LoadProgress, *, beside_traffic: bool) -> VersionHandle:
        """Loads a bundle through the gate.

        Args:
            name: The name that it must have.
            path: The bundle.
            progress: Gets each step reported, and may end the load.
            beside_traffic: Rest between reads, because other versions have traffic.

        Raises:
            BundleError: The bundle cannot be used.
            EncoderError: Its encoder cannot be loaded.
            LoadImpossibleError: The machine is at fault: its scratch directory, or its limit of open files.
            LoadSupersededError: The load was given up.
        """
        return await self._on_thread(self._open, name, path, progress, _REST_RATIO if beside_traffic else 0.0)

    async def close(self, handle: VersionHandle) -> None:
        """Frees a version that no request uses."""
        await self._on_thread(handle.close)

    def stop(self) -> None:
        """Finishes the work that is queued, then ends the thread."""
        self._thread.shutdown(wait=True)

    async def _on_thread(self, function: Callable[..., _Result], *arguments: Any) -> _Result:  # noqa: ANN401
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def _needs(self, path: Path) -> Needs:
        with _telling_the_machine_apart(self._scratch):
            manifest = open_bundle(path).manifest
        encoder = manifest.encoder
        shared = _encoder_key(manifest) in self._encoders
        memory = sum(info.size for name, info in manifest.files.items() if not name.startswith(f"{ENCODER_DIRECTORY}/"))
        # Exact searches decode the leaves.
        memory += 4 * manifest.levels[-1].cells * manifest.dimension
        if encoder is not None and not shared:
            memory += 4 * encoder.parameters
        return Needs(
            memory_bytes=memory,
            available_bytes=available_memory_bytes(self.device),
            create_time=manifest.create_time,
            encoder_sha256="" if encoder is None else encoder.sha256,
        )

    def _open(self, name: str, path: Path, progress: LoadProgress, rest_ratio: float) -> VersionHandle:
        # On a thread that ends afterwards. While more than one thread has an OpenMP team, the members of each sleep
        # between two operations instead of spinning, and encoding takes twice as long: the team of the encoding thread
        # has to be the only one.
        with _telling_the_machine_apart(self._scratch), ThreadPoolExecutor(1, "geosurge-loader") as thread:
            return thread.submit(self._pass_gate, name, path, progress, rest_ratio).result()

    def _pass_gate(self, name: str, path: Path, progress: LoadProgress, rest_ratio: float) -> VersionHandle:
        progress.report("reading the manifest", 0.0)
        bundle = open_bundle(path)
        if bundle.manifest.name != name:
            raise BundleInconsistentError(
                f"{path} holds the bundle {bundle.manifest.name!r}, so that answers would name another version; rename "
                "the directory back, or publish the bundle under a new name"
            )
        info = bundle.manifest.encoder
        key = _encoder_key(bundle.manifest)
        encoder = self._encoders.get(key)
        is_new_encoder = info is not None and encoder is None
        with contextlib.ExitStack() as stack:
            directory = stack.enter_context(_private_directory(self._scratch))
            private = _copy(bundle, directory, progress, rest_ratio, with_encoder=is_new_encoder)
            if private.encoder_path is not None and is_new_encoder:
                progress.report("loading the encoder", _READ_SHARE)
                encoder = ImageEncoder.load(private.encoder_path, self.device)
                check_encoder_identity(private, encoder)
            progress.report("opening the indexes", 0.8)
            locator = Locator.assemble(private, encoder, self.device, limits=self._limits)
            try:
                locator.index.check()
                steps: list[tuple[str, Callable[[], None]]] = [
                    ("asking golden queries", lambda: check_index(private, locator.tree, locator.index)),
                    ("encoding golden images", lambda: _check_images(private, encoder)),
                    ("warming up", lambda: warm_up(locator, self._max_batch_size, encode=is_new_encoder)),
                ]
                for number, (step, check) in enumerate(steps):
                    progress.report(step, 0.85 + 0.05 * number)
                    self._between_batches(check).result()
                progress.report("ready", 1.0)
            except BaseException:
                locator.close()
                raise
        if encoder is not None:
            self._encoders[key] = encoder
        return VersionHandle(name, locator)


def warm_up(locator: Locator, batch_size: int, *, encode: bool = True) -> None:
    """Encodes and searches one query and a batch, so that the first requests do not pay for allocations and caches.

    Args:
        locator: What to warm up.
        batch_size: Most requests of a batch.
        encode: Encode images; otherwise, or without an encoder, search with embeddings alone.

    Raises:
        GeoSurgeError: A query was not answered.
    """
    query = warm_up_query(locator)
    embedding = np.ones((1, locator.manifest.dimension), dtype=np.float32)
    if encode and isinstance(query, bytes):
        pixels = locator.preprocess(query)[np.newaxis]
        for size in sorted({1, locator.encoder.useful_batch_size(batch_size)}):
            embedding = locator.encode(np.repeat(pixels, size, axis=0))[:1]
    for size in (1, batch_size):
        for outcome in locator.locate_embeddings(np.repeat(embedding, size, axis=0), [LocateOptions()] * size):
            if isinstance(outcome, GeoSurgeError):
                raise outcome


def warm_up_query(locator: Locator) -> bytes | NDArray[np.float32]:
    """A query that a version can answer: a grey image, or an embedding where it has no encoder."""
    if locator.manifest.encoder is None:
        return np.ones(locator.manifest.dimension, dtype=np.float32)
    grey = io.BytesIO()
    Image.new("RGB", (256, 256), (128, 128, 128)).save(grey, "PNG")
    return grey.getvalue()


def available_memory_bytes(device: str) -> int:
    """Memory available to a new version: of the GPU, or of this machine within the limits of control groups (v2)."""
    if device != "cpu":
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    return max(0, min([available, *control_group_headrooms()]))


def control_group_headrooms(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> Iterator[int]:
    """Bytes below the limit of this process's control group (v2) and of each one around it that has a limit.

    Args:
        root: Where the hierarchy is mounted.
        membership: The kernel's list of the process's groups.
    """
    with contextlib.suppress(OSError):
        own = next((line[3:] for line in membership.read_text().splitlines() if line.startswith("0::")), "/")
        group = root / own.strip("/")
        for path in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):
                limit, used = (int((path / name).read_text()) for name in ("memory.max", "memory.current"))
                statistics = dict(line.split() for line in (path / "memory.stat").read_text().splitlines())
                # Cached files count as used, but give way.
                yield limit - used + int(statistics.get("inactive_file", 0))
            if path == root:
                return


def _check_images(bundle: Bundle, encoder: ImageEncoder | None) -> None:
    if encoder is not None:
        check_golden_images(bundle, encoder)


@contextlib.contextmanager
def _private_directory(scratch: Path) -> Iterator[Path]:
    """A directory that is removed afterwards; locked meanwhile, so that other processes can tell that it is in use."""
    directory, descriptor = _make_locked_directory(scratch)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(descriptor)


def _make_locked_directory(scratch: Path) -> tuple[Path, int]:
    while True:
        directory = Path(tempfile.mkdtemp(prefix=PRIVATE_COPY_PREFIX, dir=scratch))
        # Until it is locked, a server that starts takes it for abandoned.
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(directory, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if directory.exists():
                return directory, descriptor
            os.close(descriptor)


def _remove_abandoned_copies(scratch: Path) -> None:
    """Removes the copies of processes that were killed while they loaded."""
    for directory in scratch.glob(f"{PRIVATE_COPY_PREFIX}*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(directory, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def _telling_the_machine_apart(scratch: Path) -> Iterator[None]:
    """Has nobody look for a fault in a bundle that is the machine's.

    What is wrong with the bundle's own files is a `BundleError` already, so whatever else the system refuses is about
    the private copy.
    """
    try:
        yield
    except (OSError, BundleError, EncoderError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE):
            raise LoadImpossibleError(
                f"the server may open no more files ({cause.strerror}); raise its limit of open files"
            ) from error
        if isinstance(error, OSError):
            raise LoadImpossibleError(
                f"the private copy in {scratch} cannot be made: {error}; make room there, or start the server with "
                "another directory (scratch)"
            ) from error
        raise


def _encoder_key(manifest: Manifest) -> _EncoderKey:
    """What two bundles must have in common to share an encoder: its identity, and the files that hold it.

    By the identity alone, a bundle whose files hold another encoder than it says would pass beside the right one, and
    fail when it is loaded alone.
    """
    identity = "" if manifest.encoder is None else manifest.encoder.sha256
    prefix = f"{ENCODER_DIRECTORY}/"
    files = [f"{name}:{info.sha256}" for name, info in manifest.files.items() if name.startswith(prefix)]
    return identity, *sorted(files)


@dataclass
class _Throttle:
    """Rests in proportion to the time that was spent working."""

    rest_ratio: float
    begun: float

    def pause(self) -> None:
        """Rests for the work since the last pause."""
        worked = time.perf_counter() - self.begun
        if self.rest_ratio:
            time.sleep(self.rest_ratio * worked)
        self.begun = time.perf_counter()


def _copy(bundle: Bundle, directory: Path, progress: LoadProgress, rest_ratio: float, *, with_encoder: bool) -> Bundle:
    """Reads every file and copies those that will be opened.

    Raises:
        BundleCorruptError: A file is not what the manifest says, or cannot be read.
        BundlePartialError: A file vanished.
        OSError: The copy cannot be written.
    """
    total = max(sum(info.size for info in bundle.manifest.files.values()), 1)
    done = 0
    throttle = _Throttle(rest_ratio, time.perf_counter())
    for relative, info in bundle.manifest.files.items():
        is_wanted = with_encoder or not relative.startswith(f"{ENCODER_DIRECTORY}/")
        target = directory / relative if is_wanted else Path(os.devnull)
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with target.open("wb") as writer:
            for chunk in _read_chunks(bundle.path / relative):
                digest.update(chunk)
                writer.write(chunk)
                done += len(chunk)
                progress.report(f"reading {relative}", _READ_SHARE * done / total)
                throttle.pause()
        if digest.hexdigest() != info.sha256:
            raise BundleCorruptError(
                f"{bundle.path / relative} has another SHA-256 than recorded; publish the bundle again"
            )
    return replace(bundle, path=directory)


def _read_chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as reader:
            while chunk := reader.read(_CHUNK_BYTES):
                yield chunk
    except FileNotFoundError as error:
        raise BundlePartialError(f"{path} vanished while it was loaded") from error
    except OSError as error:
        raise BundleCorruptError(f"{path} cannot be read: {error}") from error
