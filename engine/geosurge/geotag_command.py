"""``geosurge geotag``: a whole archive in, one row for each picture out."""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperCommand

from geosurge.archive.rows import Format
from geosurge.connection_options import Connect, check_server, with_connection
from geosurge.cores import usable_cores
from geosurge.errors import InputError, UsageError
from geosurge.locate_flags import BeamWidth, ConfidenceLevel, Exact, Region, TopK, locate_options
from geosurge.location import LocateOptions
from geosurge.store import default_store, resolve_bundle
from geosurge.tables import print_content

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from rich.progress import Task
    from rich.text import Text

    from geosurge.archive.audit import Audit
    from geosurge.archive.cluster import Cluster
    from geosurge.archive.engines import Engine
    from geosurge.archive.run import Plan, Result
    from geosurge.connection import Connection

logger = logging.getLogger(__name__)

_LOG_SECONDS: Final = 60.0
_SHOWN_MISSES: Final = 10
_RAY_ADDRESS: Final = re.compile(r"auto|local|[^\s/]+:[0-9]{1,5}")


class GeotagCommand(TyperCommand):
    """Lets ``--ray`` stand without its address: what follows it and is none is a source or another option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - typer's own type is private
        """Gives a lone ``--ray`` an empty address."""
        words = [
            "--ray=" if word == "--ray" and not _RAY_ADDRESS.fullmatch(following) else word
            for word, following in itertools.pairwise([*args, ""])
        ]
        return super().parse_args(ctx, words)


def check_ray(address: str | None) -> str | None:
    """Checks the form of an address of Ray, for typer."""
    if address and not _RAY_ADDRESS.fullmatch(address):
        raise typer.BadParameter(f"{address!r} is neither HOST:PORT, such as 10.0.0.1:6379, nor auto nor local")
    return address


@with_connection
def geotag(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE...",
            help="Folders, pictures, lists of paths (.txt, .csv, .parquet) and tar shards.",
            show_default=False,
        ),
    ] = None,
    *,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where results, ledger and backups go; the same one again resumes."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and stop.")] = False,
    undo: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Take back every position that the run in DIR wrote.")
    ] = None,
    write: Annotated[
        Literal["xmp", "exif"] | None,
        typer.Option(help="Also write positions: xmp into sidecars, exif into the pictures (with --in-place)."),
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Allow --write exif to change the pictures' metadata.")
    ] = False,
    min_probability: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Withhold guesses that are less probable.")
    ] = 0.0,
    max_radius_km: Annotated[
        float | None, typer.Option(min=0.0, help="Withhold guesses with a larger radius.", show_default=False)
    ] = None,
    output_format: Annotated[
        list[Format] | None,
        typer.Option("--format", help="What results are written as; may be repeated.", show_default="parquet"),
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Also write report.html, a page for people.")] = False,
    audit: Annotated[
        bool,
        typer.Option("--audit", help="Locate the pictures that have a position, and compare; nothing is written."),
    ] = False,
    relocate: Annotated[
        bool, typer.Option("--relocate", help="Locate again what another index version has located.")
    ] = False,
    glob: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="What of the sources is wanted, as in .gitignore; may be repeated."),
    ] = None,
    index: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Index store or bundle; GEOSURGE_INDEX or indexes/ by default.", show_default=False
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", callback=check_server, help="Ask a running server instead of an index."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where encoder and index live: cpu (the default), cuda or cuda:N.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=1024, help="Pictures encoded together.")] = 32,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that decode; one for each core by default.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[HOST:PORT]",
            callback=check_ray,
            help="Locate on a Ray cluster, which sees sources, index and DIR under the same paths; without an address "
            "on the one that is there, or else on one that is started here (as with local).",
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.001, metavar="SECONDS", help="Time that a server has for its next answer.")
    ] = 30.0,
    top_k: TopK = LocateOptions.top_k,
    beam_width: BeamWidth = None,
    exact: Exact = False,
    confidence_level: ConfidenceLevel = LocateOptions.confidence_level,
    region: Region = None,
    connection: Connect,
) -> None:
    """Locates a whole archive: one row for each picture in DIR/results.parquet.

    Pictures that have a position already are skipped. Whatever cannot be used is a row with its reason; the exit code
    is then 1. A run that was interrupted goes on when the same command is given again.
    """
    if undo is not None:
        others = (
            sources,
            out,
            dry_run,
            write,
            in_place,
            output_format,
            report,
            audit,
            relocate,
            glob,
            index,
            server,
            ray,
        )
        if any(other not in (None, False) for other in others):
            raise UsageError("--undo DIR stands alone: it takes back what the run in DIR wrote; leave out the rest")
        _undo(undo)
        return
    if not sources or out is None:
        raise UsageError("geotag needs at least one SOURCE and --out DIR; see geosurge geotag --help")
    if (write == "exif") != in_place:
        raise UsageError("--write exif changes the pictures themselves and needs --in-place; --write xmp does not")
    if audit and (write is not None or min_probability > 0 or max_radius_km is not None):
        raise UsageError("--audit compares every guess and writes none; leave out --write and the thresholds")
    if server is not None and (index is not None or device is not None):
        raise UsageError("--server has its own index and device; leave out --index and --device, or --server")
    if ray is not None and server is not None:
        raise UsageError("--ray opens the index on the cluster's machines; leave out --server, or --ray")
    options = locate_options(
        top_k=top_k, beam_width=beam_width, exact=exact, confidence_level=confidence_level, region=region
    )
    from geosurge.archive.locating import Asked  # noqa: PLC0415
    from geosurge.archive.run import Job, run  # noqa: PLC0415

    job = Job(
        sources=tuple(sources),
        directory=out,
        globs=tuple(glob or ()),
        asked=Asked(options, min_probability, max_radius_km),
        write=write,
        formats=tuple(dict.fromkeys(output_format or [Format.PARQUET])),
        report=report,
        audit=audit,
        relocate=relocate,
        workers=workers or usable_cores(),
        cluster=None if ray is None else _cluster(ray, index, device or "cpu", batch_size),
    )
    # The GPUs are the cluster's then; here the index is only asked for its version.
    here = "cpu" if ray is not None else device or "cpu"
    open_engine = _engine(index, here, batch_size, server=server, connection=connection(), timeout=timeout)
    try:
        with _observer() as observer:
            result = run(job, open_engine, observer, dry_run=dry_run)
    except KeyboardInterrupt:
        typer.echo("interrupted; give the same command again to do the rest", err=True)
        raise
    if result is not None:
        _print_result(result)
        if sum(result.failures.values()):
            raise typer.Exit(InputError.exit_code)


def _engine(
    index: Path | None,
    device: str,
    batch_size: int,
    *,
    server: str | None,
    connection: Connection | None,
    timeout: float,
) -> Callable[[], AbstractContextManager[Engine]]:
    from geosurge.archive.engines import open_index, open_server  # noqa: PLC0415

    if server is not None:
        return lambda: open_server(server, connection, batch_size, timeout)
    path = index or default_store()
    resolve_bundle(path)  # A wrong path is told before the archive is searched.
    return lambda: open_index(path, device, batch_size)


def _cluster(address: str, index: Path | None, device: str, batch_size: int) -> Cluster:
    from geosurge.archive.cluster import Cluster  # noqa: PLC0415

    # The store may get another active bundle before all actors are there.
    return Cluster(address, resolve_bundle(index or default_store()).resolve(), device, batch_size)


def _undo(directory: Path) -> None:
    from geosurge.archive.ledger import Ledger  # noqa: PLC0415
    from geosurge.archive.tagging import undo_writes  # noqa: PLC0415

    undone, kept = 0, 0
    with Ledger.reopen(directory) as ledger:
        for name, error in undo_writes(ledger, directory):
            if error is None:
                undone += 1
            else:
                kept += 1
                typer.echo(f"{name}: left as it is: {error}")
    typer.echo(f"taken back from {undone:,} files; {kept:,} left as they are")
    if kept:
        raise typer.Exit(InputError.exit_code)


def _print_plan(plan: Plan) -> None:
    others = ", ".join(f"{count:,} {status}" for status, count in plan.counts.items() if count)
    over = plan.passed_over
    typer.echo(f"{plan.found:,} pictures found: {plan.to_locate:,} to locate{f'; {others}' if others else ''}")
    if over.other_files or over.ignored:
        typer.echo(f"passed over: {over.other_files:,} files that are no pictures, {over.ignored:,} hidden or ignored")


def _print_result(result: Result) -> None:
    counts = ", ".join(f"{count:,} {status}" for status, count in result.counts.items())
    rate = result.located / result.seconds
    typer.echo(f"{sum(result.counts.values()):,} pictures: {counts}")
    typer.echo(f"{result.located:,} located in {result.seconds:,.0f} s, {rate:,.1f} a second")
    if result.failures:
        table = Table("reason", title="failed", title_justify="left")
        table.add_column("pictures", justify="right")
        for reason, count in result.failures.items():
            table.add_row(escape(reason), f"{count:,}")
        print_content(table)
    if result.audit is not None:
        _print_audit(result.audit)
    for path in result.files:
        typer.echo(f"written: {path}")


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


class _Bar:
    """Shows how a run goes on, to somebody who looks at it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def phase(self, name: str, total: int | None) -> Callable[[], None]:
        """Begins a bar."""
        task = self._progress.add_task(name, total=total)
        return lambda: self._progress.advance(task)

    def plan(self, plan: Plan) -> None:
        """Prints the plan above the bars."""
        self._progress.stop()
        _print_plan(plan)
        self._progress.start()


class _Log:
    """Logs how a run goes on, a line a minute."""

    def phase(self, name: str, total: int | None) -> Callable[[], None]:
        """Begins to count."""
        done, begun, last = 0, time.monotonic(), time.monotonic()

        def advance() -> None:
            nonlocal done, last
            done += 1
            now = time.monotonic()
            if now - last >= _LOG_SECONDS:
                last = now
                rate = done / (now - begun)
                of = "" if total is None else f" of {total:,}, {(total - done) / rate / 60:,.0f} minutes left"
                typer.echo(f"{name}: {done:,}{of}, {rate:,.1f} a second", err=True)

        return advance

    def plan(self, plan: Plan) -> None:
        """Prints the plan."""
        _print_plan(plan)


@contextlib.contextmanager
def _observer() -> Iterator[_Bar | _Log]:
    if not sys.stderr.isatty():
        yield _Log()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield _Bar(progress)
