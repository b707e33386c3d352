"""Tasks that end well or badly, for the processes of a `TaskPool`; in a module that those can import."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from geosurge.archive.rows import Position
from geosurge.archive.tasks import Looked
from geosurge.errors import InputNotReadableError


@dataclass(frozen=True)
class Fine:
    """Goes well, and says which process did it.

    Attributes:
        seconds: Time that it takes.
    """

    key: int
    seconds: float = 0.0

    def run(self) -> Looked:
        time.sleep(self.seconds)
        return Looked(Position(float(self.key), float(os.getpid()), "exif"))


@dataclass(frozen=True)
class Crashing:
    """Ends its process by a signal: SIGKILL as the system does when memory is short, SIGABRT as codecs do.

    Attributes:
        once: A file that is made first; the next time all goes well.
    """

    key: int
    signal: signal.Signals = signal.SIGKILL
    once: Path | None = None

    def run(self) -> Looked:
        if self.once is not None:
            try:
                self.once.touch(exist_ok=False)
            except FileExistsError:
                return Looked(None)
        os.kill(os.getpid(), self.signal)
        time.sleep(60)
        return Looked(None)


@dataclass(frozen=True)
class Unlucky:
    """Goes well, but the first processes that receive it end before they begin it.

    Attributes:
        folder: Where each of them leaves a file.
    """

    times: ClassVar[int] = 3

    key: int
    folder: Path

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        for number in range(self.times):
            with contextlib.suppress(FileExistsError):
                (self.folder / str(number)).touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)

    def run(self) -> Looked:
        return Looked(None)


@dataclass(frozen=True)
class Hungry:
    """Takes memory.

    Attributes:
        count: Bytes; none of them is ever touched.
    """

    key: int
    count: int

    def run(self) -> Looked:
        return Looked(Position(float(len(bytearray(self.count)) > 0), float(os.getpid()), "exif"))


@dataclass(frozen=True)
class Endless:
    """Never ends."""

    key: int

    def run(self) -> Looked:
        while True:
            time.sleep(60)


@dataclass(frozen=True)
class Raising:
    """Raises an error: one of the engine's, or one that shows a defect."""

    key: int
    is_defect: bool = False

    def run(self) -> Looked:
        if self.is_defect:
            raise ZeroDivisionError("a defect")
        raise InputNotReadableError("the disk has gone")
