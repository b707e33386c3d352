"""``geosurge demo``: the whole engine once through."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from geosurge.commands.index_flag import IndexPath
from geosurge.errors import GeoSurgeError, InputError
from geosurge.location import Location
from geosurge.store import default_store
from geosurge.tables import print_content

DEMO_MAP: Final = Path("build", "demo-map.png")


def demo(
    index: IndexPath = None,
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
    from geosurge.commands import demo_steps as steps  # noqa: PLC0415

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


def _draw_outcomes(outcomes: Sequence[Any], index: Path, path: Path) -> Path:
    from geosurge.map import Mark, draw_map, read_land  # noqa: PLC0415

    located = [outcome for outcome in outcomes if isinstance(outcome.answer, Location)]
    marks = [Mark(outcome.view.path.stem, outcome.answer, outcome.view.truth) for outcome in located]
    versions = sorted({outcome.answer.index_version for outcome in located})
    return draw_map(marks, path, land=read_land(index), title=f"Sample views located by {', '.join(versions)}")
