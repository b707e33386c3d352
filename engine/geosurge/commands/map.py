"""``geosurge map``: answers of ``geosurge locate --json`` in a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from geosurge.commands.index_flag import IndexPath
from geosurge.errors import BundleError, UsageError
from geosurge.store import default_store


def draw(
    results: Annotated[
        typer.FileText, typer.Argument(metavar="RESULTS", help="What locate --json printed; - is standard input.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="PNG file to write.")],
    truth: Annotated[
        Path | None,
        typer.Option(metavar="CSV", help="Where the images were really taken: path, latitude_deg, longitude_deg."),
    ] = None,
    index: IndexPath = None,
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
