"""The ``geosurge`` command.

Exit codes: 0 all done, 1 some inputs failed (each is a row with its reason), 2 wrong usage or configuration, 3 the
engine could not start; 130 after Ctrl-C.

What a command computes with is imported when it runs, so that ``--help`` and whatever only talks to a server or looks
at files start without PyTorch.
"""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Optional

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from geosurge import __version__
from geosurge.connection_options import Connect, check_server, with_connection
from geosurge.errors import BundleError, EncoderMissingError, GeoSurgeError, InputError, UsageError
from geosurge.geotag_command import GeotagCommand, geotag
from geosurge.index_commands import index_app
from geosurge.locate_flags import BeamWidth, ConfidenceLevel, Exact, Region, TopK, locate_options
from geosurge.location import LocateOptions, Location
from geosurge.settings import ServerSettings, load_settings
from geosurge.store import default_store, resolve_bundle
from geosurge.tables import location_table, print_content

if TYPE_CHECKING:
    from geosurge.connection import Connection
    from geosurge.server.app import Server

BATCH_SIZE: Final = 32
"""Images located together when no server does it."""

BROKEN_PIPE_EXIT_CODE: Final = 141
"""What a shell reports of a program that SIGPIPE ended."""

DEMO_MAP: Final = Path("build", "demo-map.png")


class _Commands(TyperGroup):
    """Turns the errors of all commands into a line on standard error and the exit code that they carry."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401
        try:
            return super().invoke(ctx)
        except (GeoSurgeError, ImportError) as error:
            # A library that is not installed is no fault of the code either; its message says what to install.
            if ctx.params["debug"]:
                traceback.print_exc()
            Console(stderr=True).print(f"[red]error[/red]: {escape(str(error))}", soft_wrap=True, highlight=False)
            raise typer.Exit(getattr(error, "exit_code", GeoSurgeError.exit_code)) from error
        except BrokenPipeError:
            # Python flushes standard output once more when it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(BROKEN_PIPE_EXIT_CODE) from None


app = typer.Typer(
    name="geosurge",
    cls=_Commands,
    help="A geocell search engine: an image in, a place on Earth out.",
    epilog="Exit codes: 0 all done, 1 some inputs failed, 2 wrong usage or configuration, 3 the engine did not start.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(index_app, name="index")
app.command(cls=GeotagCommand)(geotag)

_Index = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Index store, whose active bundle is used, or a bundle; GEOSURGE_INDEX or the indexes/ folder by default.",
        show_default=False,
    ),
]


def main() -> None:
    """Runs the command that the process was started with, and ends the process."""
    # gRPC would print a line of its own about every failed handshake, which the command says better.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        app()
    except Exception:  # noqa: BLE001
        # Python's own exit code for it, 1, would say that only some inputs failed.
        traceback.print_exc()
        sys.exit(GeoSurgeError.exit_code)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"geosurge {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="GEOSURGE_DEBUG", help="Show where in the code an error arose.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    pass


@app.command()
@with_connection
def locate(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Image files; - is standard input.")],
    *,
    index: _Index = None,
    server: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", callback=check_server, help="Ask a running server instead of an index."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line and nothing else.")] = False,
    top_k: TopK = LocateOptions.top_k,
    beam_width: BeamWidth = None,
    exact: Exact = False,
    confidence_level: ConfidenceLevel = LocateOptions.confidence_level,
    h3_resolution: Annotated[
        int | None, typer.Option(min=0, max=15, help="Also return the H3 cell of this resolution.")
    ] = None,
    region: Region = None,
    device: Annotated[
        str | None, typer.Option(help="Where encoder and index live: cpu (the default), cuda or cuda:N.")
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(min=0.001, metavar="SECONDS", help="Time that a server has for its next answer; 30 by default."),
    ] = None,
    connection: Connect,
) -> None:
    """Says where images were taken.

    An input that fails is a row, or with --json a line, with its reason in its place; the exit code is then 1.
    The output is the same whether a server answers or the index is opened here.
    """
    options = locate_options(
        top_k=top_k,
        beam_width=beam_width,
        exact=exact,
        confidence_level=confidence_level,
        region=region,
        h3_resolution=h3_resolution,
    )
    if server is not None and (index is not None or device is not None):
        raise UsageError("--server has its own index and device; leave out --index and --device, or --server")
    if server is None and timeout is not None:
        raise UsageError("--timeout is for the answers of a server; name one with --server, or leave it out")
    server_connection = connection()
    if images.count("-") > 1:
        raise UsageError("- is given more than once, but standard input can be read only once")
    queries = [sys.stdin.buffer.read() if image == "-" else image for image in images]
    if server is None:
        answers = _ask_index(queries, options, index or default_store(), device or "cpu")
    else:
        answers = _ask_server(queries, options, server, timeout, server_connection)
    # Names of files need not be text; what is printed has to be.
    names = [os.fsencode(image).decode("utf-8", "replace") for image in images]
    rows = zip(names, answers, strict=True)
    failed = _print_json_lines(rows) if as_json else _print_table(rows)
    if failed:
        raise typer.Exit(InputError.exit_code)


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command that takes ``**flags`` one option for each field of `ServerSettings`.

    No value is checked or filled in here, because flags are but one of the sources of `load_settings`.
    """
    flags = []
    for name, field in ServerSettings.model_fields.items():
        computed = field.default_factory is not None or field.default is None or field.default is False
        option = typer.Option(
            metavar=None if field.annotation is bool else name.rpartition("_")[2].upper(),
            help=field.description,
            show_default=False if computed else str(field.default),
        )
        annotation = Annotated[Optional[field.annotation], option]  # type: ignore[name-defined]  # noqa: UP045
        flags.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    signature = inspect.signature(command, eval_str=True)
    own = [value for value in signature.parameters.values() if value.kind is not inspect.Parameter.VAR_KEYWORD]
    command.__signature__ = signature.replace(parameters=[*own, *flags])  # type: ignore[attr-defined]
    return command


@app.command()
@_with_settings
def serve(
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TOML file with settings as its keys.", show_default=False)
    ] = None,
    **flags: Any,  # noqa: ANN401
) -> None:
    """Serves an index over gRPC until SIGTERM or Ctrl-C.

    Every option but --config is also an environment variable and a key of the configuration file:
    --max-batch-size is GEOSURGE_MAX_BATCH_SIZE and max_batch_size.
    Options win over the environment, which wins over the file.
    """
    settings = load_settings(config, **flags)
    resolve_bundle(settings.index)  # A wrong path is told before PyTorch is loaded.
    from geosurge.server.app import serve as run  # noqa: PLC0415

    def announce(server: Server) -> None:
        extras = {"administration": server.admin_address, "monitoring": server.metrics_address}
        named = [f", {name} on {address}" for name, address in extras.items() if address not in ("", server.address)]
        typer.echo(f"serving {settings.index} on {server.address}{''.join(named)}", err=True)

    run(settings, on_ready=announce)


@app.command()
def demo(
    index: _Index = None,
    views: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Images, and a truth.csv with path, latitude_deg and longitude_deg; the sample views by default.",
            show_default=False,
        ),
    ] = None,
    map_file: Annotated[Path, typer.Option("--map", metavar="FILE", help="PNG file to write the map to.")] = DEMO_MAP,
) -> None:
    """Serves an index, locates sample views through the client, and shows the answers against the truth."""
    from geosurge import demo as steps  # noqa: PLC0415

    index = index or default_store()
    sample = steps.read_views(views or steps.default_views())
    typer.echo(f"starting a server with the index {index}")
    with steps.server_process(index) as address:
        typer.echo(f"locating {len(sample)} views at {address}")
        outcomes = steps.locate_views(address, sample)
        print_content(steps.outcome_table(outcomes))
        typer.echo(steps.summary(outcomes))
        typer.echo(f"map: {_draw_outcomes(outcomes, index, map_file)}")
    typer.echo("the server has stopped")
    if any(isinstance(outcome.answer, GeoSurgeError) for outcome in outcomes):
        raise typer.Exit(InputError.exit_code)


@app.command("map")
def map_command(
    results: Annotated[
        typer.FileText, typer.Argument(metavar="RESULTS", help="What locate --json printed; - is standard input.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="PNG file to write.")],
    truth: Annotated[
        Path | None,
        typer.Option(metavar="CSV", help="Where the images were really taken: path, latitude_deg, longitude_deg."),
    ] = None,
    index: _Index = None,
) -> None:
    """Draws the answers of locate --json on a map, against the truth where it is known.

    The shape of the land is that of the index's cells.
    """
    from geosurge.map import draw_map, read_land, read_marks  # noqa: PLC0415
    from geosurge.truth import read_truth  # noqa: PLC0415

    marks = read_marks(results, None if truth is None else read_truth(truth))
    if not marks:
        raise UsageError(f"{results.name} holds no answer to draw")
    try:
        land = read_land(index or default_store())
    except BundleError as error:
        if index is not None:
            raise
        typer.echo(f"drawn without land, for which an index is needed (--index): {error}", err=True)
        land = None
    draw_map(marks, out, land=land)
    typer.echo(f"{len(marks)} answers drawn to {out}")


def _ask_index(
    queries: Sequence[str | bytes], options: LocateOptions, index: Path, device: str
) -> Iterator[Location | GeoSurgeError]:
    resolve_bundle(index)  # A wrong path is told before PyTorch is loaded.
    from geosurge.locator import Locator  # noqa: PLC0415

    with Locator.open(index, device) as locator:
        for start in range(0, len(queries), BATCH_SIZE):
            batch = queries[start : start + BATCH_SIZE]
            try:
                yield from locator.locate(batch, options)
            except EncoderMissingError as error:
                yield from [error] * len(batch)


def _ask_server(
    queries: Sequence[str | bytes],
    options: LocateOptions,
    address: str,
    timeout: float | None,
    connection: Connection | None,
) -> Iterator[Location | GeoSurgeError]:
    from geosurge.client import DEFAULT_TIMEOUT_SECONDS, Client  # noqa: PLC0415

    with Client(address, timeout_seconds=timeout or DEFAULT_TIMEOUT_SECONDS, connection=connection) as client:
        yield from client.locate_many(queries, options)


def _print_json_lines(rows: Iterable[tuple[str, Location | GeoSurgeError]]) -> bool:
    """Prints a line for each answer as it comes; tells whether there were failures."""
    from geosurge.wire import error_to_json, location_to_response, response_to_json  # noqa: PLC0415

    failed = False
    for name, answer in rows:
        if isinstance(answer, Location):
            typer.echo(response_to_json(location_to_response(answer, name)))
        else:
            typer.echo(error_to_json(answer, name))
            failed = True
    return failed


def _print_table(rows: Iterable[tuple[str, Location | GeoSurgeError]]) -> bool:
    """Prints all answers in one table; tells whether there were failures."""
    collected = list(rows)
    print_content(location_table(collected))
    return any(isinstance(answer, GeoSurgeError) for _, answer in collected)


def _draw_outcomes(outcomes: Sequence[Any], index: Path, path: Path) -> Path:
    from geosurge.map import Mark, draw_map, read_land  # noqa: PLC0415

    located = [outcome for outcome in outcomes if isinstance(outcome.answer, Location)]
    marks = [Mark(outcome.view.path.stem, outcome.answer, outcome.view.truth) for outcome in located]
    versions = sorted({outcome.answer.index_version for outcome in located})
    return draw_map(marks, path, land=read_land(index), title=f"Sample views located by {', '.join(versions)}")


if __name__ == "__main__":
    main()
