"""``geosurge locate``: images in, places out."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from geosurge.commands.connection_options import Connect, check_server, with_connection
from geosurge.commands.index_flag import IndexPath
from geosurge.commands.locate_flags import BeamWidth, ConfidenceLevel, Exact, Region, TopK, locate_options
from geosurge.errors import EncoderMissingError, GeoSurgeError, InputError, UsageError
from geosurge.location import LocateOptions, Location
from geosurge.store import default_store, resolve_bundle
from geosurge.tables import location_table, print_content

if TYPE_CHECKING:
    from geosurge.client.connection import Connection


BATCH_SIZE: Final = 32
"""Images located together when no server does it."""


@with_connection
def locate(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Image files; - is standard input.")],
    *,
    index: IndexPath = None,
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


def _ask_index(
    queries: Sequence[str | bytes], options: LocateOptions, index: Path, device: str
) -> Iterator[Location | GeoSurgeError]:
    resolve_bundle(index)  # A wrong path is told before PyTorch is loaded.
    from geosurge.images import OWN_LIMITS  # noqa: PLC0415
    from geosurge.locator import Locator  # noqa: PLC0415

    with Locator.open(index, device, limits=OWN_LIMITS) as locator:
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
