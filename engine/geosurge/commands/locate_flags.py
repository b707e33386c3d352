"""The flags that say how images are located, the same for every command."""

from __future__ import annotations

from typing import Annotated

import typer

from geosurge.errors import UsageError
from geosurge.location import MAX_BEAM_WIDTH, MAX_TOP_K, LocateOptions


def check_confidence(level: float) -> float:
    """Refuses what is no probability.

    Raises:
        typer.BadParameter: It is not greater than 0 and less than 1.
    """
    if not 0.0 < level < 1.0:
        raise typer.BadParameter(f"{level} is not greater than 0 and less than 1")
    return level


TopK = Annotated[int, typer.Option(min=1, max=MAX_TOP_K, help="Alternatives to return.")]
BeamWidth = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_BEAM_WIDTH, help="Cells kept a level, if more than the index's default."),
]
Exact = Annotated[bool, typer.Option("--exact", help="Score every leaf instead of searching with a beam.")]
ConfidenceLevel = Annotated[
    float,
    typer.Option(callback=check_confidence, help="Posterior mass inside the radius and the credible region."),
]
Region = Annotated[
    list[str] | None,
    typer.Option(metavar="TOKEN", help="Cell, of any level, that the answer must lie in; may be repeated."),
]


def locate_options(
    *,
    top_k: int,
    beam_width: int | None,
    exact: bool,
    confidence_level: float,
    region: list[str] | None,
    h3_resolution: int | None = None,
) -> LocateOptions:
    """What the flags say.

    Raises:
        UsageError: Two of them contradict each other.
    """
    if exact and beam_width is not None:
        raise UsageError("--exact scores every leaf, so that --beam-width has no meaning; leave one of them out")
    return LocateOptions(
        top_k=top_k,
        beam_width=beam_width,
        exact=exact,
        confidence_level=confidence_level,
        h3_resolution=h3_resolution,
        region_tokens=tuple(region or ()),
    )
