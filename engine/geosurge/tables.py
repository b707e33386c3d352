"""What people read: answers as tables, laid out by `rich`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Final

import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

from geosurge.errors import GeoSurgeError
from geosurge.location import Location, PathCell, Place

WIDE: Final = 200
"""Columns of a table that goes to a file or a pipe, where there is no window to fit into."""


def print_content(content: RenderableType) -> None:
    """Prints a table, or anything else that rich lays out, to standard output."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=WIDE)
    # rich would end the process itself when nobody reads any more.
    with console.capture() as capture:
        console.print(content)
    typer.echo(capture.get(), nl=False)


def location_table(answers: Iterable[tuple[str, Location | GeoSurgeError]]) -> Table:
    """One row an input: where it was located, or why it was not.

    Args:
        answers: Names of inputs, each with its answer.

    Returns:
        The table.
    """
    table = Table("input", "place")
    for heading in ("latitude", "longitude", "radius km", "probability"):
        table.add_column(heading, justify="right")
    table.add_column("path", overflow="fold")
    for name, answer in answers:
        if isinstance(answer, Location):
            table.add_row(
                escape(name),
                place_text(answer.place),
                f"{answer.latitude_deg:.4f}",
                f"{answer.longitude_deg:.4f}",
                f"{answer.radius_km:,.0f}",
                f"{answer.probability:.3f}",
                path_text(answer.path),
            )
        else:
            table.add_row(escape(name), failure_text(answer))
    return table


def coordinate_text(latitude_deg: float, longitude_deg: float) -> str:
    """A coordinate in degrees with two decimals, about a kilometre."""
    north, east = "S" if latitude_deg < 0 else "N", "W" if longitude_deg < 0 else "E"
    return f"{abs(latitude_deg):.2f} {north} {abs(longitude_deg):.2f} {east}"


def place_text(place: Place | None) -> str:
    """A place with its country and how far it is, as rich markup; empty when none is known."""
    if place is None:
        return ""
    return escape(f"{place.city}, {place.country} ({place.distance_km:,.0f} km)")


def path_text(path: Iterable[PathCell]) -> str:
    """Tokens of a path, coarsest first, as rich markup."""
    return escape(" ".join(cell.token for cell in path))


def failure_text(error: GeoSurgeError) -> str:
    """Why there is no answer, as rich markup."""
    return f"[red]{error.reason}[/red] {escape(str(error))}"
