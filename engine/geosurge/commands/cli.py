"""The ``geosurge`` command.

Exit codes: 0 all done, 1 some inputs failed (each is a row with its reason), 2 wrong usage or configuration, 3 the
engine could not start; 130 after Ctrl-C.

What a command computes with is imported when it runs, so that ``--help`` and whatever only talks to a server or looks
at files start without PyTorch.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from geosurge import __version__
from geosurge.commands.demo import demo
from geosurge.commands.geotag import GeotagCommand, geotag
from geosurge.commands.index import index_app
from geosurge.commands.locate import locate
from geosurge.commands.map import draw
from geosurge.commands.serve import serve
from geosurge.errors import GeoSurgeError

BROKEN_PIPE_EXIT_CODE: Final = 141
"""What a shell reports of a program that SIGPIPE ended."""


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
app.command()(locate)
app.command()(serve)
app.command(cls=GeotagCommand)(geotag)
app.command("map")(draw)
app.command()(demo)


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


if __name__ == "__main__":
    main()
