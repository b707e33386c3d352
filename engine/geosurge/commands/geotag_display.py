"""What ``geosurge geotag`` shows: the plan, how the run goes on, and what it has done."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from geosurge.archive.rows import Status
from geosurge.archive.sources.paths import shown
from geosurge.tables import print_content

if TYPE_CHECKING:
    from rich.progress import Task
    from rich.text import Text

    from geosurge.archive.audit import Audit
    from geosurge.archive.locating import Progress as Advance
    from geosurge.archive.run import Observer, Plan, Result

_LOG_SECONDS: Final = 60.0
_SHOWN_MISSES: Final = 10


def _print_plan(plan: Plan) -> None:
    counts = plan.counts
    parts = [
        f"{plan.to_locate:,} to locate",
        f"{counts[Status.SKIPPED]:,} {'without' if plan.audit else 'with'} a position",
        f"{counts[Status.DONE]:,} done",
    ]
    if counts[Status.WITHHELD]:
        parts.append(f"{counts[Status.WITHHELD]:,} withheld")
    if plan.failures:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in plan.failures.items())
        parts.append(f"{counts[Status.FAILED]:,} failed ({reasons})")
    typer.echo(f"{_pictures(plan.found)} found: {', '.join(parts)}")
    if passed_over := str(plan.passed_over):
        typer.echo(f"passed over: {passed_over}")


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count:,} pictures"


def print_result(result: Result, directory: Path, *, audit: bool) -> None:
    """Prints what a run has done.

    Args:
        result: What it has done.
        directory: Where its files are.
        audit: Whether it was to compare guesses with the truth.
    """
    counts = ", ".join(f"{count:,} {status}" for status, count in result.counts.items())
    typer.echo(f"{_pictures(sum(result.counts.values()))}: {counts}")
    if result.located:
        rate = result.located / result.seconds
        typer.echo(f"{result.located:,} located in {result.seconds:,.0f} s, {rate:,.1f} a second")
    if result.written is not None:
        positions = "1 position" if result.written == 1 else f"{result.written:,} positions"
        typer.echo(f"{positions} written; to take back what was: geosurge geotag --undo {_shown(directory)}")
    if result.failures:
        table = Table("reason", title="failed", title_justify="left")
        table.add_column("pictures", justify="right")
        table.add_column("for example", overflow="fold")
        for reason, count in result.failures.items():
            table.add_row(escape(reason), f"{count:,}", escape(result.examples[reason]))
        print_content(table)
    if result.audit is not None:
        _print_audit(result.audit)
    elif audit:
        typer.echo("nothing to compare: no picture has a position, other than guesses, and could be located")
    for path in result.files:
        typer.echo(f"written: {_shown(path)}")


def _shown(path: Path) -> str:
    # A terminal takes no name that is not UTF-8.
    return shown(os.fsencode(path))


def _print_audit(audit: Audit) -> None:
    shares = ", ".join(f"{share:.1%} within {limit:,} km" for limit, share in audit.within_km.items())
    typer.echo(
        f"{audit.count:,} compared: median error {audit.median_km:,.0f} km, mean {audit.mean_km:,.0f} km; {shares}"
    )
    typer.echo(f"{audit.inside_radius:.1%} lie inside the radius, which claims {audit.confidence_level:.0%}")
    table = Table(title="if only guesses of at least this probability were kept", title_justify="left")
    for heading in ("probability", "kept", "median error km", "within 200 km", "inside radius"):
        table.add_column(heading, justify="right")
    for kept in audit.kept:
        if kept.median_km is not None:
            shares_text = (f"{kept.within_200_km:.1%}", f"{kept.inside_radius:.1%}")
            table.add_row(f"{kept.min_probability:.1f}", f"{kept.share:.1%}", f"{kept.median_km:,.0f}", *shares_text)
    print_content(table)
    worst = Table("picture", title="worst misses", title_justify="left")
    for heading in ("error km", "radius km", "probability"):
        worst.add_column(heading, justify="right")
    for miss in audit.worst[:_SHOWN_MISSES]:
        worst.add_row(escape(miss.path), f"{miss.error_km:,.0f}", f"{miss.radius_km:,.0f}", f"{miss.probability:.3f}")
    print_content(worst)


class _Rate(ProgressColumn):
    """Pictures a second."""

    def render(self, task: Task) -> Text:
        from rich.text import Text  # noqa: PLC0415

        return Text(f"{task.speed:,.1f}/s" if task.speed else "")


class _Failures(ProgressColumn):
    """Pictures that failed."""

    def render(self, task: Task) -> Text:
        from rich.text import Text  # noqa: PLC0415

        return Text(_failed(task.fields["failures"]))


def _failed(count: int) -> str:
    return f"{count:,} failed" if count else ""


class _Bar:
    """Shows how a run goes on, to somebody who looks at it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def phase(self, name: str, total: int | None) -> Advance:
        """Begins a bar."""
        task = self._progress.add_task(name, total=total, failures=0)
        failures = 0

        def advance(*, failed: bool = False) -> None:
            nonlocal failures
            failures += failed
            self._progress.update(task, advance=1, failures=failures)

        return advance

    def plan(self, plan: Plan) -> None:
        """Prints the plan above the bars."""
        self._progress.stop()
        _print_plan(plan)
        self._progress.start()


class _Log:
    """Logs how a run goes on, a line a minute."""

    def phase(self, name: str, total: int | None) -> Advance:
        """Begins to count."""
        done, failures, begun, last = 0, 0, time.monotonic(), time.monotonic()

        def advance(*, failed: bool = False) -> None:
            nonlocal done, failures, last
            done += 1
            failures += failed
            now = time.monotonic()
            if now - last >= _LOG_SECONDS:
                last = now
                rate = done / (now - begun)
                parts = [f"{name}: {done:,}" if total is None else f"{name}: {done:,} of {total:,}"]
                if failures:
                    parts.append(_failed(failures))
                if total is not None:
                    parts.append(f"{(total - done) / rate / 60:,.0f} minutes left")
                typer.echo(", ".join([*parts, f"{rate:,.1f} a second"]), err=True)

        return advance

    def plan(self, plan: Plan) -> None:
        """Prints the plan."""
        _print_plan(plan)


@contextlib.contextmanager
def observer() -> Iterator[Observer]:
    """What shows how a run goes on: bars on a terminal, and elsewhere a line a minute."""
    if not sys.stderr.isatty():
        yield _Log()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Failures(),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield _Bar(progress)
