"""The answers on a map of the world, as SVG that needs no script to be seen.

The projection is Equal Earth, in which the same number of dots in the same area means the same density everywhere.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Final

import numpy as np

from geosurge.archive.report.coastlines import read_coastlines
from geosurge.archive.report.tally import Dot, radius_class
from geosurge.geodesy import Float64Array, Int64Array
from geosurge.projections import equal_earth
from geosurge.tables import coordinate_text

WIDTH: Final = 3600
HEIGHT: Final = 1752
"""Size of the drawing in its own units, each a tenth of a degree at the equator."""

_MAX_PATH: Final = 60


def world_svg(dots: Sequence[Dot], label: str) -> str:
    """Draws dots over the land.

    The dots have the classes ``rN``, N the class of their radius, and ``nK``, K the decimal digits of their count; the
    page's style sheet gives these colour and size. Each has a title that says what it stands for.

    Args:
        dots: What to draw; those with small radii and many pictures come to lie on top.
        label: What the drawing shows, for those who do not see it.

    Returns:
        An ``svg`` element.
    """
    lines = [
        f'<svg id="world" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)}">',
        f'<path class="sea" d="{_ring(_globe())}"/>',
        f'<path class="land" d="{"".join(_ring(ring) for ring in read_coastlines())}"/>',
        f'<path class="grid" d="{"".join(_line(line) for line in _graticule())}"/>',
        '<g class="dots">',
    ]
    upward = sorted(dots, key=lambda dot: (-radius_class(dot.radius_km), dot.count))
    positions = _project(np.array([(dot.latitude_deg, dot.longitude_deg) for dot in upward]).reshape(-1, 2))
    lines.extend(_circle(dot, x, y) for dot, (x, y) in zip(upward, positions.tolist(), strict=True))
    return "\n".join([*lines, "</g>", "</svg>"])


def _circle(dot: Dot, x: int, y: int) -> str:
    kind = f"r{radius_class(dot.radius_km)} n{len(str(dot.count))}"
    return f'<circle class="{kind}" cx="{x}" cy="{y}"><title>{html.escape(_title(dot))}</title></circle>'


def _title(dot: Dot) -> str:
    place = f", near {dot.place.city}, {dot.place.country}" if dot.place and dot.place.city else ""
    where = f"{coordinate_text(dot.latitude_deg, dot.longitude_deg)}{place}"
    path = dot.example if len(dot.example) <= _MAX_PATH else f"…{dot.example[-_MAX_PATH:]}"
    if dot.count == 1:
        return f"{path}\n{where}\nradius {dot.radius_km:,.0f} km"
    return f"{dot.count:,} pictures\naround {where}\nradius about {dot.radius_km:,.0f} km\nfor example {path}"


def _project(points: Float64Array) -> Int64Array:
    """(k, 2) latitudes and longitudes in degrees to (k, 2) x and y in whole units of the drawing, y downwards."""
    edge, _ = equal_earth(np.array(0.0), np.array(180.0))
    x, y = equal_earth(points[:, 0], points[:, 1])
    scale = WIDTH / (2.0 * float(edge))
    return np.rint(np.stack([WIDTH / 2.0 + scale * x, HEIGHT / 2.0 - scale * y], axis=-1)).astype(np.int64)


def _ring(points: Float64Array) -> str:
    line = _line(points)
    return f"{line}z" if line else ""


def _line(points: Float64Array) -> str:
    """SVG path data: the first point, then the way from each to the next, less points that fall onto the one before."""
    projected = _project(points)
    steps = np.diff(projected, axis=0)
    moves = steps[(steps != 0).any(axis=1)].tolist()
    way = " ".join(f"{right} {down}" for right, down in moves).replace(" -", "-")
    return f"M{projected[0, 0]} {projected[0, 1]}l{way}" if moves else ""


def _globe() -> Float64Array:
    meridian = np.linspace(-90.0, 90.0, 91)
    return np.stack([np.concatenate([meridian, meridian[::-1]]), np.repeat([180.0, -180.0], len(meridian))], axis=-1)


def _graticule() -> list[Float64Array]:
    meridian = np.linspace(-90.0, 90.0, 91)
    lines = [np.stack(np.broadcast_arrays(meridian, float(east)), axis=-1) for east in range(-150, 180, 30)]
    # A parallel is a straight line in this projection.
    return lines + [np.array([(float(north), -180.0), (float(north), 180.0)]) for north in range(-60, 90, 30)]
