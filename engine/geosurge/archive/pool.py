"""Processes that carry out tasks, so that decoding uses all cores and a crash costs one picture.

A codec may crash its process, or be killed for the memory that it takes. The pool then starts another process, gives
the picture that was being worked on one more try, and fails it when that process ends too. A picture that takes
`MAX_SECONDS` fails likewise. Those that a process had at hand and had not begun are no suspects, whatever ended it: a
process leaves a byte in a pipe for each task that it begins.
"""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import subprocess
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Final, Self

from geosurge.archive.tasks import Failure, Outcome, Task
from geosurge.errors import GeoSurgeError, StageCrashedError

MAX_SECONDS: Final = 120.0
"""Time that one picture may take; one of 50 million pixels takes a few seconds."""

_QUEUED_TASKS: Final = 8
"""Tasks that each process has at hand, so that it never waits for the next."""

_TRIES: Final = 2
_MAX_IDLE_LOST: Final = 5
"""Processes in a row that may end before they begin a picture."""

_WATCH_SECONDS: Final = 1.0
_NICENESS: Final = 5

_MAX_TASK_BYTES: Final = 4 * 2**30
"""Memory that a process may take on top of what it has when it is ready; a picture of the limit takes 0.7 GB."""

_DATA_PAGES: Final = 5
"""Place of the size of what can be written, in pages, in /proc/self/statm."""


class _Worker:
    """A process, the pipe to it, and what it has been asked to do; it works on the first.

    It is a fresh interpreter that imports this module, and no program. `multiprocessing` would have it run the main
    script of whoever uses the pool.
    """

    def __init__(self) -> None:
        """Starts the process."""
        self.tasks: deque[Task] = deque()
        self.head_since = time.monotonic()
        self.pipe, theirs = Pipe()
        self._begun, theirs_begun = Pipe(duplex=False)
        descriptors = theirs.fileno(), theirs_begun.fileno()
        program = f"from geosurge.archive.pool import work; work{descriptors}"
        self.process = subprocess.Popen(  # noqa: S603 - the interpreter that runs this
            [sys.executable, "-c", program],
            pass_fds=descriptors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            # Ctrl-C is for the process that uses the pool, which ends this one; even while it starts it would complain.
            process_group=0,
        )
        theirs.close()
        theirs_begun.close()

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
            return None
        os.read(self._begun.fileno(), 1)
        return self.tasks.popleft().key, outcome

    def has_begun(self) -> bool:
        """Whether it has begun the first of its tasks; asked once, before it is stopped, because the byte is read."""
        return self._begun.poll() and os.read(self._begun.fileno(), 1) != b""

    def stop(self) -> None:
        """Ends the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        self.pipe.close()
        self._begun.close()


class TaskPool:
    """Processes that carry out tasks; a context manager. Neither torch nor FAISS is loaded in them."""

    def __init__(self, size: int) -> None:
        """Starts nothing yet.

        Args:
            size: Number of processes.
        """
        self._size = size
        self._workers: list[_Worker] = []
        # Kept, because making one for every outcome costs as much as receiving it.
        self._selector = selectors.DefaultSelector()
        self._idle_lost = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the processes and what they are doing; `run` starts others."""
        for worker in [*self._workers]:
            self._drop(worker)

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[int, Outcome]]:
        """Carries out tasks, which are pulled as processes become free.

        Args:
            tasks: What is to be done.

        Yields:
            The key of a task and what came of it, in the order in which they end. Stopping early leaves tasks undone.

        Raises:
            StageCrashedError: Processes end, or stand still, time after time before they begin a picture.
        """
        source, tries = iter(tasks), Counter[int]()
        again: deque[Task] = deque()
        while True:
            self._feed(source, again)
            if not any(worker.tasks for worker in self._workers):
                return
            for ready, _ in self._selector.select(_WATCH_SECONDS):
                worker: _Worker = ready.data
                try:
                    taken = worker.take()
                except (EOFError, OSError):
                    code = worker.process.wait()
                    if not worker.has_begun():
                        self._lose_idle(worker, f"ended before they began a picture (exit code {code})", again)
                    else:
                        what = f"ended the process that decoded it (exit code {code})"
                        yield from self._lose_working(worker, what, tries, again)
                else:
                    if taken is not None:
                        self._idle_lost = 0
                        yield taken
            for worker in self._overdue():
                if not worker.has_begun():
                    self._lose_idle(worker, f"had not begun a picture after {MAX_SECONDS:.0f} s", again)
                else:
                    yield from self._lose_working(worker, f"took more than {MAX_SECONDS:.0f} s", tries, again)

    def _overdue(self) -> list[_Worker]:
        """Processes that have worked on one picture, or started, for too long."""
        latest = time.monotonic() - MAX_SECONDS
        late = [worker for worker in self._workers if worker.tasks and worker.head_since < latest]
        # The outcome may have come while whoever takes the outcomes was busy.
        return [worker for worker in late if not worker.pipe.poll()]

    def _lose_idle(self, worker: _Worker, what: str, again: deque[Task]) -> None:
        """Drops a process that worked on nothing, as the system may end it when memory is short.

        Raises:
            StageCrashedError: Too many did so in a row.
        """
        self._drop(worker)
        again.extend(worker.tasks)
        self._idle_lost += 1
        if self._idle_lost >= _MAX_IDLE_LOST:
            raise StageCrashedError(
                f"{_MAX_IDLE_LOST} decoding processes in a row {what}; what they printed, or how busy this "
                "machine is, says why"
            )

    def _lose_working(
        self, worker: _Worker, what: str, tries: Counter[int], again: deque[Task]
    ) -> Iterator[tuple[int, Outcome]]:
        """Drops a process for what it did to the first of its tasks, which gets one more try; yields its failure."""
        self._drop(worker)
        suspect = worker.tasks.popleft()
        again.extend(worker.tasks)
        tries[suspect.key] += 1
        if tries[suspect.key] < _TRIES:
            again.append(suspect)
            return
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
                self._selector.register(worker.pipe, selectors.EVENT_READ, worker)
            worker.give(task)

    def _drop(self, worker: _Worker) -> None:
        self._selector.unregister(worker.pipe)
        worker.stop()
        self._workers.remove(worker)


def work(pipe_descriptor: int, begun_descriptor: int) -> None:
    """What a process of the pool does, until the other end of its pipe is closed.

    Args:
        pipe_descriptor: The pipe.
        begun_descriptor: Where it leaves a byte for each task that it begins.
    """
    # The encoder goes first where both want a core.
    os.nice(_NICENESS)
    _limit_memory()
    # What Pillow has to say about damaged metadata is no news to the owner of a million pictures.
    warnings.simplefilter("ignore")
    with contextlib.suppress(EOFError, BrokenPipeError), Connection(pipe_descriptor) as pipe:
        pipe.send(None)
        while True:
            task: Task = pipe.recv()
            os.write(begun_descriptor, b"!")
            try:
                outcome = task.run()
            except GeoSurgeError as error:
                outcome = Failure.of(error)
            except MemoryError:
                detail = f"the picture takes more than {_MAX_TASK_BYTES // 2**30} GiB to decode; leave it out"
                outcome = Failure("DECODER_CRASHED", detail)
            except Exception as error:  # noqa: BLE001 - a defect here must not cost the other pictures
                outcome = Failure("INTERNAL", f"the engine failed at this picture: {type(error).__name__}: {error}")
            pipe.send(outcome)


def _limit_memory() -> None:
    """Has allocations fail, or a codec crash, before the system ends some process that has done nothing."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[_DATA_PAGES])
    except OSError:
        return
    most = pages * resource.getpagesize() + _MAX_TASK_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or most < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
