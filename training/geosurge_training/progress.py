"""Progress of a long loop: a bar for a person at a terminal, a line a minute for a log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_LOGGER = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 60.0


class Tracker(Protocol):
    """Counts steps."""

    def advance(self, **figures: float) -> None:
        """One more step is done; `figures` are shown beside the count."""
        ...


@contextmanager
def track(name: str, total: int, done: int = 0) -> Iterator[Tracker]:
    """Shows how far a loop is.

    Args:
        name: What is being done.
        total: Number of steps.
        done: Steps already done.

    Yields:
        The tracker to advance.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _LogTracker(name, total, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=console) as bar:
        yield _BarTracker(bar, name, total, done)


class _BarTracker:
    def __init__(self, bar: Progress, name: str, total: int, done: int) -> None:
        self._bar = bar
        self._task = bar.add_task(name, total=total, completed=done, figures="")

    def advance(self, **figures: float) -> None:
        self._bar.update(self._task, advance=1, figures=_format(figures))


class _LogTracker:
    def __init__(self, name: str, total: int, done: int) -> None:
        self._name, self._total, self._done = name, total, done
        self._started, self._first = time.monotonic(), done
        self._last_line = self._started

    def advance(self, **figures: float) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES or self._done == self._total:
            self._last_line = now
            rate = (self._done - self._first) / max(now - self._started, 1e-9)
            left = (self._total - self._done) / rate
            _LOGGER.info(
                "%s %d/%d, %.2f a second, %.0f s left, %s",
                self._name,
                self._done,
                self._total,
                rate,
                left,
                _format(figures),
            )


def _format(figures: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in figures.items())
