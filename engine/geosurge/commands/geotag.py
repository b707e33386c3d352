"""``geosurge geotag``: a whole archive in, one row for each picture out."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer
from typer.core import TyperCommand

from geosurge.archive.rows import Format
from geosurge.bundle import read_manifest
from geosurge.commands.connection_options import Connect, check_server, with_connection
from geosurge.commands.geotag_display import observer, print_result
from geosurge.commands.locate_flags import BeamWidth, ConfidenceLevel, Exact, Region, TopK, locate_options
from geosurge.cores import usable_cores
from geosurge.devices import check_torch_device, device_to_gpu
from geosurge.errors import EncoderError, EncoderMissingError, InputError, UsageError
from geosurge.location import LocateOptions
from geosurge.store import default_store, resolve_bundle

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from geosurge.archive.backends import Backend
    from geosurge.archive.cluster import Cluster
    from geosurge.client.connection import Connection

_RAY_ADDRESS: Final = re.compile(r"auto|local|[^\s/]+:[0-9]{1,5}")


class GeotagCommand(TyperCommand):
    """Lets ``--ray`` stand without its address, and nothing stand beside ``--undo``.

    What follows ``--ray`` and is no address is a source or another option.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - typer's own type is private
        """Gives a lone ``--ray`` an empty address.

        Raises:
            typer.BadParameter: A word is empty, which would mean the current folder.
            UsageError: Anything is given beside ``--undo``.
        """
        if any(word in {"", "--out=", "--undo="} for word in args):
            raise typer.BadParameter("an argument is empty: is a variable not set? A dot is the current folder.")
        words = [
            "--ray=" if word == "--ray" and not _RAY_ADDRESS.fullmatch(following) else word
            for word, following in itertools.pairwise([*args, ""])
        ]
        rest = super().parse_args(ctx, words)
        given = [
            parameter.opts[0] if parameter.param_type_name == "option" else str(parameter.metavar)
            for parameter in self.params
            if ctx.get_parameter_source(parameter.name).name == "COMMANDLINE"
        ]
        if "--undo" in given and len(given) > 1:
            others = ", ".join(name for name in given if name != "--undo")
            raise UsageError(f"--undo DIR stands alone: it takes back what the run in DIR wrote; leave out {others}")
        return rest


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
            metavar="SOURCE",
            help="Folders, pictures, lists of paths (.txt, .csv, .parquet) and tar shards.",
            show_default=False,
        ),
    ] = None,
    *,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where results, ledger and backups go; the same one again resumes."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print what would be done, and stop; exit code 0 whatever fails already."),
    ] = False,
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
        typer.Option(
            "--format",
            help="What results are written as; may be repeated. What the run put out in other formats is renewed.",
            show_default="parquet",
        ),
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
        str | None,
        typer.Option(help="Where encoder and index live: cpu (the default), cuda or cuda:N."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=1024, help="Pictures encoded together at most.")] = 32,
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

    Pictures that have a position already are skipped. What cannot be used is a
    row with its reason. A run that was interrupted goes on when the same command
    is given again.

    Exit codes: 0 all done, or only planned; 1 some pictures failed; 2 wrong
    usage, no picture at all, or DIR cannot be written; 3 the index, the server
    or the ledger in DIR cannot be used. A full disk under DIR ends the run with
    2 or 3; once there is room, the same command does the rest.
    """
    if undo is not None:
        _undo(undo)
        return
    if not sources:
        raise UsageError("name at least one SOURCE, such as a folder of pictures; see geosurge geotag --help")
    if out is None:
        raise UsageError("name a directory for the results: --out DIR")
    contradictions = {
        "--write exif changes the pictures themselves and needs --in-place; --write xmp does not": (
            write == "exif" and not in_place
        ),
        "--in-place belongs to --write exif, which alone changes pictures; leave it out, or add that": (
            in_place and write != "exif"
        ),
        "--audit compares every guess and writes none; leave out --write and the thresholds": (
            audit and (write is not None or min_probability > 0 or max_radius_km is not None)
        ),
        "--server has its own index and device; leave out --index and --device, or --server": (
            server is not None and (index is not None or device is not None)
        ),
        "--ray opens the index on the cluster's machines; leave out --server, or --ray": (
            ray is not None and server is not None
        ),
    }
    for message, is_there in contradictions.items():
        if is_there:
            raise UsageError(message)
    options = locate_options(
        top_k=top_k, beam_width=beam_width, exact=exact, confidence_level=confidence_level, region=region
    )
    from geosurge.archive.locating import Thresholds  # noqa: PLC0415
    from geosurge.archive.run import Job, run  # noqa: PLC0415

    job = Job(
        sources=tuple(sources),
        directory=out,
        globs=tuple(glob or ()),
        options=options,
        thresholds=Thresholds(min_probability, max_radius_km),
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
    open_backend = _backend(index, here, batch_size, server=server, connection=connection(), timeout=timeout)
    try:
        with observer() as watching:
            result = run(job, open_backend, watching, dry_run=dry_run)
    except KeyboardInterrupt:
        typer.echo("interrupted; give the same command again to do the rest", err=True)
        raise
    if result is not None:
        print_result(result, out, audit=audit)
        if sum(result.failures.values()):
            raise typer.Exit(InputError.exit_code)


def _backend(
    index: Path | None,
    device: str,
    batch_size: int,
    *,
    server: str | None,
    connection: Connection | None,
    timeout: float,
) -> Callable[[], AbstractContextManager[Backend]]:
    from geosurge.archive.backends import open_index, open_server  # noqa: PLC0415

    if server is not None:
        return lambda: _with_encoder(open_server(server, connection, batch_size, timeout))
    path = index or default_store()
    # What is wrong with the index is told before the archive is searched.
    if read_manifest(resolve_bundle(path)).encoder is None:
        raise EncoderError(f"the index {path} has no encoder and cannot read images; name one that has: --index DIR")
    check_torch_device(device)
    return lambda: open_index(path, device, batch_size)


@contextlib.contextmanager
def _with_encoder(opened: AbstractContextManager[Backend]) -> Iterator[Backend]:
    """A backend; where there is no encoder, it is the run that cannot be done, and not one of its pictures."""
    with contextlib.ExitStack() as stack:
        try:
            backend = stack.enter_context(opened)
        except EncoderMissingError as error:
            raise EncoderError(str(error)) from error
        yield backend


def _cluster(address: str, index: Path | None, device: str, batch_size: int) -> Cluster:
    from geosurge.archive.cluster import Cluster  # noqa: PLC0415

    device_to_gpu(device)  # refuses a name that there is not
    # The store may get another active bundle before all actors are there.
    return Cluster(address, resolve_bundle(index or default_store()).resolve(), device, batch_size)


def _undo(directory: Path) -> None:
    from geosurge.archive.ledger import Ledger  # noqa: PLC0415
    from geosurge.archive.writes.run_writes import undo_writes  # noqa: PLC0415

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
