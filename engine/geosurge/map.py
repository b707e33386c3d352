"""Maps of answers: the world in one picture, and each of a few answers close up.

The land is drawn from the index's own cells (where there are samples, there are cells), so that no map data is needed.
The world is in the Equal Earth projection, in which a cell's colour, its samples by area, can be compared everywhere;
the close-ups are azimuthal equidistant around the truth, in which distances from the centre are true.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from google.protobuf import json_format
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Polygon

from geosurge.bundle import open_bundle
from geosurge.cells import CellTree
from geosurge.description import Coordinate
from geosurge.errors import UsageError
from geosurge.geodesy import Float64Array, Int64Array, great_circle_km
from geosurge.location import Location
from geosurge.projections import Projection, azimuthal_equidistant, circle, equal_earth, great_circle
from geosurge.store import resolve_bundle
from geosurge.truth import error_km
from geosurge.v1 import geolocation_pb2
from geosurge.wire import response_to_location

MAX_LAND_CELLS: Final = 50_000
"""Cells that the land is drawn with at most; an index with more leaves is drawn with a coarser level."""

MAX_CLOSE_UPS: Final = 12
MAX_LABELS: Final = 40

_SEA, _GRID, _ANSWER = "#dce8f0", "#667788", "#d62728"
# Cells with hardly a sample, such as whole oceans around an island, should look nearly like the sea.
_LAND_COLOURS: Final = LinearSegmentedColormap.from_list("land", ["#e6edeb", "#d3dfb4", "#9fbf8a"])
_TRUTH_STYLE: Final[dict[str, Any]] = {"color": "black", "marker": "+", "markersize": 8}
_ANSWER_STYLE: Final[dict[str, Any]] = {"color": _ANSWER, "marker": "o", "markersize": 4}


@dataclass(frozen=True)
class Mark:
    """One answer on a map, with the truth where it is known."""

    label: str
    location: Location
    truth: Coordinate | None = None


@dataclass(frozen=True)
class Land:
    """Cells that stand for land on a map.

    Attributes:
        outlines: Corners of each cell, (k, 2) latitude and longitude in degrees.
        densities: (n,) samples per square kilometre.
    """

    outlines: tuple[Float64Array, ...]
    densities: Float64Array


def read_marks(lines: Iterable[str], truths: Mapping[Path, Coordinate] | None = None) -> list[Mark]:
    """Reads what ``geosurge locate --json`` printed.

    Args:
        lines: The lines; those of failed inputs and empty ones are passed over.
        truths: Where images were really taken, by path; see `geosurge.truth.read_truth`.

    Returns:
        A mark for each answer.

    Raises:
        UsageError: A line is neither an answer nor a failure; says which.
    """
    known = {path.resolve(): truth for path, truth in (truths or {}).items()}
    marks = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            if "error" in content:
                continue
            response = json_format.ParseDict(content, geolocation_pb2.LocateResponse())
            if not response.HasField("location"):
                raise TypeError("it has neither a location nor an error")
        except (json.JSONDecodeError, json_format.ParseError, TypeError) as error:
            raise UsageError(
                f"line {number} of the answers is not what geosurge locate --json prints: {error}"
            ) from error
        image = Path(response.request_id)
        marks.append(Mark(image.stem, response_to_location(response), known.get(image.resolve())))
    return marks


def read_land(index: Path) -> Land:
    """Takes the shape of the land from an index: from its finest level that has at most `MAX_LAND_CELLS` cells.

    Args:
        index: A bundle, or a store, whose active bundle is read.

    Returns:
        The land; of an index of entities, which have no outlines, without any.

    Raises:
        BundleError: There is no bundle, or it cannot be read.
    """
    with CellTree.open(open_bundle(resolve_bundle(index)).tree_path) as tree:
        level = max((number for number, n in enumerate(tree.cell_counts, 1) if n <= MAX_LAND_CELLS), default=1)
        leaves, count = tree.leaves, tree.cell_counts[level - 1]
        above = tree.ancestors(np.arange(tree.cell_counts[-1]))[:, level - 1]
        samples = np.bincount(above, weights=leaves.sample_counts, minlength=count)
        area_km2 = np.bincount(above, weights=leaves.area_km2, minlength=count)
        outlines = _outlines(tree, level)
    drawn = [row for row, outline in enumerate(outlines) if len(outline) >= 3]
    return Land(tuple(outlines[row] for row in drawn), (samples / area_km2)[drawn])


def draw_map(marks: Sequence[Mark], path: Path, *, land: Land | None = None, title: str = "") -> Path:
    """Draws answers, their radii and, where the truth is known, the great circle to it.

    Args:
        marks: The answers; up to `MAX_CLOSE_UPS` are also drawn close up, up to `MAX_LABELS` are named.
        path: The PNG file to write; its folder is made when it is missing.
        land: What to draw under them.
        title: Heading of the picture.

    Returns:
        The path.

    Raises:
        UsageError: The file cannot be written.
    """
    if land is not None and not land.outlines:
        land = None
    closest = list(marks) if len(marks) <= MAX_CLOSE_UPS else []
    columns = min(max(len(closest), 1), 4)
    rows = math.ceil(len(closest) / columns)
    figure = Figure(figsize=(13.0, 6.9 + 3.5 * rows), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[6.6, *[3.3] * rows])
    if title:
        figure.suptitle(title)
    _draw_world(figure.add_subplot(grid[0, :]), marks, land)
    for number, mark in enumerate(closest):
        _draw_close_up(figure.add_subplot(grid[1 + number // columns, number % columns]), mark, land)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=110)
    except OSError as error:
        raise UsageError(f"cannot write the map to {path}: {error.strerror or error}") from error
    return path


def _outlines(tree: CellTree, level: int) -> list[Float64Array]:
    count = tree.cell_counts[level - 1]
    if tree.grid is not None:
        return list(tree.grid.id_to_outline(tree.cell_ids(level)))
    cells = (tree.cell(level, ordinal) for ordinal in range(count))
    return [np.array([(corner.latitude_deg, corner.longitude_deg) for corner in cell.outline]) for cell in cells]


def _draw_world(axes: Axes, marks: Sequence[Mark], land: Land | None) -> None:
    meridian = np.linspace(-90.0, 90.0, 91)
    x, y = equal_earth(np.concatenate([meridian, meridian[::-1]]), np.repeat([180.0, -180.0], len(meridian)))
    globe = Polygon(np.stack([x, y], axis=-1), facecolor=_SEA, edgecolor=_GRID, linewidth=0.8)
    axes.add_patch(globe)
    if land is not None:
        shapes = [(row, copy) for row, outline in enumerate(land.outlines) for copy in _copies(outline)]
        _draw_land(axes, equal_earth, shapes, land).set_clip_path(globe)
    parallel = np.linspace(-180.0, 180.0, 181)
    lines = [np.stack(np.broadcast_arrays(float(north), parallel), axis=-1) for north in range(-60, 90, 30)]
    lines += [
        np.stack(np.broadcast_arrays(meridian, float(longitude_deg)), -1) for longitude_deg in range(-120, 180, 60)
    ]
    _draw_lines(axes, equal_earth, lines, color=_GRID, linewidth=0.4, alpha=0.5)
    _draw_marks(axes, equal_earth, marks)
    for mark in marks if len(marks) <= MAX_LABELS else ():
        centre = mark.truth or _answer(mark)
        axes.annotate(
            mark.label,
            _point(equal_earth, centre),
            xytext=(6, 5),
            textcoords="offset points",
            fontsize=8,
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.7},
        )
    axes.set_xlim(1.01 * x.min(), 1.01 * x.max())
    axes.set_ylim(1.02 * y.min(), 1.02 * y.max())
    axes.set_aspect("equal")
    axes.set_axis_off()
    if any(mark.truth for mark in marks):
        axes.plot([], [], **_TRUTH_STYLE, linestyle="none", label="truth")
    axes.plot([], [], **_ANSWER_STYLE, linestyle="none", label="answer and its radius")
    axes.legend(loc="lower left", fontsize=8, frameon=False)


def _draw_close_up(axes: Axes, mark: Mark, land: Land | None) -> None:
    centre, radius_km = mark.truth or _answer(mark), mark.location.radius_km
    off_km = error_km(mark.location, centre)
    # Towards the antipode of its centre the projection tears shapes apart, so no close-up comes near it.
    half_km = min(max(1.25 * off_km, 1.25 * radius_km, 600.0), 9000.0)
    project = azimuthal_equidistant(centre)
    axes.set_facecolor(_SEA)
    if land is not None:
        shapes = [(row, land.outlines[row]) for row in _rows_near(land, centre, 1.5 * half_km)]
        _draw_land(axes, project, shapes, land)
    _draw_marks(axes, project, [mark])
    axes.set_xlim(-half_km, half_km)
    axes.set_ylim(-half_km, half_km)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(f"{2.0 * half_km:,.0f} km across", fontsize=8)
    off = f"{off_km:,.0f} km off, " if mark.truth else ""
    axes.set_title(f"{mark.label}\n{off}radius {radius_km:,.0f} km", fontsize=9)


def _draw_land(
    axes: Axes, project: Projection, shapes: Sequence[tuple[int, Float64Array]], land: Land
) -> PolyCollection:
    """Fills shapes, each with the colour of its row of the land; colours mean the same on every map of it."""
    densities = np.maximum(land.densities, 1e-12)
    low, high = np.percentile(densities, [5.0, 95.0])
    cells = PolyCollection(
        [np.stack(project(outline[:, 0], outline[:, 1]), axis=-1) for _, outline in shapes],
        array=densities[[row for row, _ in shapes]],
        cmap=_LAND_COLOURS,
        # A range of one value has no middle to be coloured in.
        norm=LogNorm(low / 1.5, high * 1.5, clip=True),
        edgecolors="white",
        linewidths=0.15,
    )
    axes.add_collection(cells, autolim=False)
    return cells


def _draw_marks(axes: Axes, project: Projection, marks: Sequence[Mark]) -> None:
    circles = [circle(_answer(mark), mark.location.radius_km) for mark in marks]
    _draw_lines(axes, project, circles, color=_ANSWER, linewidth=0.9, alpha=0.8)
    ways = [great_circle(_answer(mark), mark.truth) for mark in marks if mark.truth is not None]
    _draw_lines(axes, project, ways, color=_ANSWER, linewidth=1.2)
    for mark in marks:
        axes.plot(*_point(project, _answer(mark)), **_ANSWER_STYLE)
        if mark.truth is not None:
            axes.plot(*_point(project, mark.truth), **_TRUTH_STYLE)


def _draw_lines(axes: Axes, project: Projection, lines: Iterable[Float64Array], **style: Any) -> None:  # noqa: ANN401
    """Draws lines of (latitude, longitude) rows; on the map of the world they are broken at its edge."""
    if project is equal_earth:
        lines = [part for line in lines for part in np.split(line, _last_before_edge(line) + 1) if len(part) > 1]
    projected = [np.stack(project(line[:, 0], line[:, 1]), axis=-1) for line in lines]
    axes.add_collection(LineCollection(projected, **style), autolim=False)


def _last_before_edge(line: Float64Array) -> Int64Array:
    return np.flatnonzero(np.abs(np.diff(line[:, 1])) > 180.0)


def _copies(outline: Float64Array) -> list[Float64Array]:
    """A shape in one piece, and a second time on the other side of the map where it crosses the antimeridian."""
    latitude_deg, longitude_deg = outline[:, 0], outline[:, 1]
    at_pole = np.abs(latitude_deg) > 90.0 - 1e-6
    if at_pole.all():
        return []
    start = longitude_deg[~at_pole][0]
    unwrapped = start + np.remainder(longitude_deg - start + 180.0, 360.0) - 180.0
    # A pole has every longitude: the middle one of the shape's is where the map should draw it.
    unwrapped = np.where(at_pole, unwrapped[~at_pole].mean(), unwrapped)
    turns = [0.0]
    if unwrapped.max() > 180.0:
        turns.append(-360.0)
    if unwrapped.min() < -180.0:
        turns.append(360.0)
    return [np.stack([latitude_deg, unwrapped + turn], axis=-1) for turn in turns]


def _rows_near(land: Land, centre: Coordinate, distance_km: float) -> list[int]:
    """Rows of the cells that may reach into a circle."""
    corners = np.concatenate(land.outlines)
    sizes = np.array([len(outline) for outline in land.outlines])
    starts = np.cumsum(sizes) - sizes
    first = corners[starts]
    own_first = np.repeat(first, sizes, axis=0)
    to_first_km = great_circle_km(corners[:, 0], corners[:, 1], own_first[:, 0], own_first[:, 1])
    reach_km = np.maximum.reduceat(to_first_km, starts)
    away_km = great_circle_km(first[:, 0], first[:, 1], centre.latitude_deg, centre.longitude_deg)
    rows: list[int] = np.flatnonzero(away_km - reach_km < distance_km).tolist()
    return rows


def _answer(mark: Mark) -> Coordinate:
    return Coordinate(mark.location.latitude_deg, mark.location.longitude_deg)


def _point(project: Projection, place: Coordinate) -> tuple[float, float]:
    x, y = project(np.array(place.latitude_deg), np.array(place.longitude_deg))
    return float(x), float(y)
