"""Processes that read, look at and decode pictures, so that decoding uses all cores and a crash costs one picture.

A codec may crash its process, or be killed for the memory that it takes. The pool then starts another process, gives
the picture that was being worked on one more try, and fails it when that process ends too. A picture that takes
`MAX_SECONDS` fails likewise.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Final, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from geosurge.archive.paths import not_readable
from geosurge.archive.positions import Claim, read_claims, sidecar_paths
from geosurge.archive.rows import Position
from geosurge.archive.sources import Found
from geosurge.errors import GeoSurgeError, ImageError, ImageTooLargeError, InputChangedError, StageCrashedError
from geosurge.images import ImageLimits
from geosurge.preprocessing import Preprocessing

MAX_SECONDS: Final = 120.0
"""Time that one picture may take; one of 50 million pixels takes a few seconds."""

_QUEUED_TASKS: Final = 8
"""Tasks that each process has at hand, so that it never waits for the next."""

_TRIES: Final = 2
_MAX_FAILED_STARTS: Final = 5
_NICENESS: Final = 5
_READ_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class Failure:
    """Why nothing came of a picture.

    Attributes:
        reason: The error's stable string.
        detail: The error's message.
        is_final: Whether the same bytes would fail again.
    """

    reason: str
    detail: str
    is_final: bool = False

    @classmethod
    def of(cls, error: GeoSurgeError) -> Failure:
        """What an error says."""
        return cls(error.reason, str(error), is_final=isinstance(error, ImageError))


@dataclass(frozen=True)
class Looked:
    """What a picture says of itself.

    Attributes:
        position: Its position, if it has any; somebody else's goes before a guess of this engine.
        run_id: The run that guessed the position; empty where it is somebody else's.
    """

    position: Position | None
    run_id: str = ""


@dataclass(frozen=True)
class Decoded:
    """A picture that was read.

    Attributes:
        content_hash: SHA-256 of its bytes.
        query: (3, s, s) uint8 canonical pixels; or the encoded image, where nobody here decodes.
        decode_ms: Time that decoding took.
    """

    content_hash: bytes
    query: NDArray[np.uint8] | bytes
    decode_ms: float = 0.0


@dataclass(frozen=True)
class Unusable:
    """A picture that was read and cannot be decoded."""

    content_hash: bytes
    failure: Failure


Outcome = Looked | Decoded | Unusable | Failure


class Task(Protocol):
    """Something that a process does for a picture."""

    @property
    def key(self) -> int:
        """Tells the outcomes apart."""

    def run(self) -> Outcome:
        """Does it; runs in a process of the pool.

        Raises:
            GeoSurgeError: Nothing came of it.
        """


@dataclass(frozen=True)
class Look:
    """Looks whether a picture has a position; reads no pixels."""

    key: int
    found: Found

    def run(self) -> Looked:
        """Reads the metadata, and those beside the picture."""
        sidecars = [] if self.found.is_member else sidecar_paths(Path(os.fsdecode(self.found.path)))
        try:
            with self.found.open() as file:
                claim = _best(read_claims(file, sidecars))
                return Looked(None) if claim is None else Looked(claim.position, claim.run_id)
        except OSError as error:
            raise not_readable(self.found.path, error) from error


def _best(claims: Iterable[Claim]) -> Claim | None:
    guess: Claim | None = None
    for claim in claims:
        if not claim.run_id:
            return claim
        guess = guess or claim
    return guess


@dataclass(frozen=True)
class Decode:
    """Reads a picture and brings it to canonical pixels.

    Attributes:
        preprocessing: How; ``None`` leaves decoding to somebody else.
        limits: What is accepted.
    """

    key: int
    found: Found
    preprocessing: Preprocessing | None
    limits: ImageLimits

    def run(self) -> Decoded | Unusable:
        """Reads, hashes and decodes."""
        digest, data = hashlib.sha256(), bytearray()
        try:
            with self.found.open() as file:
                while chunk := file.read(_READ_BYTES):
                    digest.update(chunk)
                    # The rest of a huge file is only hashed.
                    if len(data) <= self.limits.max_bytes:
                        data += chunk
            check_unchanged(self.found)
        except OSError as error:
            raise not_readable(self.found.path, error) from error
        content_hash, begun = digest.digest(), time.perf_counter()
        try:
            if len(data) > self.limits.max_bytes:
                raise ImageTooLargeError(
                    f"the image has {self.found.size} bytes, the limit is {self.limits.max_bytes}; send a smaller or "
                    "more compressed picture"
                )
            if self.preprocessing is None:
                return Decoded(content_hash, bytes(data))
            pixels = self.preprocessing.decode(bytes(data), self.limits)
        except ImageError as error:
            return Unusable(content_hash, Failure.of(error))
        return Decoded(content_hash, pixels, 1000 * (time.perf_counter() - begun))


def check_unchanged(found: Found) -> None:
    """Refuses a picture that is another by now than the one that was found.

    Raises:
        InputChangedError: It is.
        InputNotReadableError: It is gone.
    """
    try:
        status = Path(os.fsdecode(found.path)).stat()
    except OSError as error:
        raise not_readable(found.path, error) from error
    if status.st_mtime_ns != found.mtime_ns or not (found.is_member or status.st_size == found.size):
        raise InputChangedError(f"{found.name} changed while the run was under way; run the command again")


class _Worker:
    """A process, the pipe to it, and what it has been asked to do; it works on the first.

    It is a fresh interpreter that imports this module alone. `multiprocessing` would have it run the main script of
    whoever uses the pool.
    """

    def __init__(self) -> None:
        """Starts the process."""
        self.tasks: deque[Task] = deque()
        self.head_since = time.monotonic()
        self.is_ready = False
        self.pipe, theirs = Pipe()
        program = f"from geosurge.archive.decoding import work; work({theirs.fileno()})"
        self.process = subprocess.Popen(  # noqa: S603 - the interpreter that runs this
            [sys.executable, "-c", program],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            # Ctrl-C is for the process that uses the pool, which ends this one; even while it starts it would complain.
            process_group=0,
        )
        theirs.close()

    def give(self, task: Task) -> None:
        """Asks for one thing more."""
        if not self.tasks:
            self.head_since = time.monotonic()
        self.tasks.append(task)
        # A process that has just ended shows when its answer is awaited.
        with contextlib.suppress(ConnectionError):
            self.pipe.send(task)

    def take(self) -> tuple[int, Outcome] | None:
        """Receives what became of the first task; ``None`` when the process says that it is ready.

        Raises:
            EOFError: The process has ended.
        """
        outcome: Outcome | None = self.pipe.recv()
        self.head_since = time.monotonic()
        if outcome is None:
            self.is_ready = True
            return None
        return self.tasks.popleft().key, outcome

    def stop(self) -> None:
        """Ends the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        self.pipe.close()


class DecodePool:
    """Processes that carry out tasks; a context manager. Neither torch nor FAISS is loaded in them."""

    def __init__(self, size: int) -> None:
        """Starts nothing yet.

        Args:
            size: Number of processes.
        """
        self._size = size
        self._workers: list[_Worker] = []
        self._failed_starts = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers.clear()

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[int, Outcome]]:
        """Carries out tasks, which are pulled as processes become free.

        Args:
            tasks: What is to be done.

        Yields:
            The key of a task and what came of it, in the order in which they end. Stopping early leaves tasks undone.

        Raises:
            StageCrashedError: A process cannot be started.
        """
        source, tries = iter(tasks), Counter[int]()
        again: deque[Task] = deque()
        while True:
            self._feed(source, again)
            busy = [worker for worker in self._workers if worker.tasks]
            if not busy:
                return
            wait([worker.pipe for worker in busy], timeout=1.0)
            for worker in busy:
                try:
                    # Looked up one by one: more may have come while whoever takes the outcomes was busy.
                    if worker.pipe.poll():
                        if (taken := worker.take()) is not None:
                            self._failed_starts = 0
                            yield taken
                        continue
                    seconds = time.monotonic() - worker.head_since
                    if seconds < MAX_SECONDS:
                        continue
                    what = f"took more than {MAX_SECONDS:.0f} s"
                except (EOFError, OSError):
                    status = worker.process.wait()
                    if not worker.is_ready:
                        self._failed_start(worker, status)
                        again.extend(worker.tasks)
                        continue
                    what = f"ended the process that decoded it (exit code {status})"
                self._drop(worker)
                suspect = worker.tasks.popleft()
                again.extend(worker.tasks)
                tries[suspect.key] += 1
                if tries[suspect.key] < _TRIES:
                    again.append(suspect)
                else:
                    detail = f"the picture {what}, {_TRIES} times; look at it with another program, or leave it out"
                    yield suspect.key, Failure("DECODER_CRASHED", detail)

    def _feed(self, source: Iterator[Task], again: deque[Task]) -> None:
        while True:
            worker = min(self._workers, key=lambda worker: len(worker.tasks), default=None)
            if worker is not None and len(worker.tasks) >= _QUEUED_TASKS:
                return
            task = again.popleft() if again else next(source, None)
            if task is None:
                return
            if worker is None or (worker.tasks and len(self._workers) < self._size):
                worker = _Worker()
                self._workers.append(worker)
            worker.give(task)

    def _failed_start(self, worker: _Worker, status: int) -> None:
        """Drops a process that ended before it did anything, as the system may have it when memory is short.

        Raises:
            StageCrashedError: It was not the first in a row.
        """
        self._drop(worker)
        self._failed_starts += 1
        if self._failed_starts >= _MAX_FAILED_STARTS:
            raise StageCrashedError(
                f"{_MAX_FAILED_STARTS} decoding processes in a row ended when they started (exit code {status}); what "
                "they printed says why"
            )

    def _drop(self, worker: _Worker) -> None:
        worker.stop()
        self._workers.remove(worker)


def work(descriptor: int) -> None:
    """What a process of the pool does, until the other end of its pipe is closed."""
    # The encoder goes first where both want a core.
    os.nice(_NICENESS)
    # What Pillow has to say about damaged metadata is no news to the owner of a million pictures.
    warnings.simplefilter("ignore")
    with contextlib.suppress(EOFError, BrokenPipeError), Connection(descriptor) as pipe:
        pipe.send(None)
        while True:
            task: Task = pipe.recv()
            try:
                outcome = task.run()
            except GeoSurgeError as error:
                outcome = Failure.of(error)
            except Exception as error:  # noqa: BLE001 - a defect here must not cost the other pictures
                outcome = Failure("INTERNAL", f"the engine failed at this picture: {type(error).__name__}: {error}")
            pipe.send(outcome)
