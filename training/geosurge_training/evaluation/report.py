"""An evaluation for people: tables on a terminal, and a Markdown page with JSON and plots beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from rich.console import Console
from rich.table import Table
from rich.text import Text

from geosurge.errors import OutputNotWritableError
from geosurge.truth import THRESHOLDS_KM
from geosurge_training.evaluation.bootstrap import Estimate
from geosurge_training.evaluation.evaluate import Evaluation
from geosurge_training.evaluation.metrics import PLACE_LEVELS, RecallVsArea
from geosurge_training.evaluation.plots import write_plots
from geosurge_training.evaluation.published import PublishedResult, published_results

JSON_FILE: Final = "evaluation.json"
MARKDOWN_FILE: Final = "evaluation.md"
_SHOWN_AREAS_KM2: Final = (100.0, 10_000.0, 1_000_000.0)
_GEOSCORE_COLUMN: Final = "GeoScore"
_MEAN_COLUMN: Final = "mean, km"
_PLACE_NOTE: Final = (
    "Places of this run are those of the GeoNames cities nearest to estimate and truth; published ones may be the "
    "benchmark's own labels, so that the columns compare roughly."
)
_Cells: TypeAlias = Sequence[str]


@dataclass(frozen=True)
class _TableText:
    """A table in words."""

    title: str
    header: _Cells
    rows: list[_Cells]
    note: str = ""


def print_tables(evaluation: Evaluation, console: Console) -> None:
    """Prints the figures, and published ones beside them where the images are a benchmark's."""
    for text in _tables(evaluation):
        table = Table(title=Text(text.title), caption=Text(text.note) if text.note else None)
        for position, name in enumerate(text.header):
            table.add_column(name, justify="left" if position == 0 else "right")
        for row in text.rows:
            table.add_row(*map(Text, row))
        console.print(table)


def to_markdown(evaluation: Evaluation, plots: Iterable[Path] = ()) -> str:
    """The tables as a Markdown page.

    Args:
        evaluation: What to tell.
        plots: Pictures to show, in the folder of the page.
    """
    parts = []
    for level, text in enumerate(_tables(evaluation), start=1):
        lines = [
            f"{'#' * min(level, 2)} {_escape(text.title)}",
            "",
            _markdown_row(text.header),
            "|---" + "|---:" * (len(text.header) - 1) + "|",
            *map(_markdown_row, text.rows),
        ]
        parts.append("\n".join(lines))
        if text.note:
            parts.append(text.note)
    parts.append(
        'Great-circle distances on a sphere of radius 6371.0088 km; "within" includes the threshold. Intervals are '
        f"percentile intervals of {evaluation.options.bootstrap.resamples:,} bootstrap resamples of the images, seed "
        f"{evaluation.options.bootstrap.seed}."
    )
    parts += [f"![{plot.stem}]({plot.name})" for plot in plots]
    return "\n\n".join(parts) + "\n"


def write_report(evaluation: Evaluation, directory: Path) -> list[Path]:
    """Writes an evaluation as JSON, Markdown and plots.

    Args:
        evaluation: What to write.
        directory: Where to; made if it does not exist.

    Returns:
        The files written.

    Raises:
        OutputNotWritableError: The directory or a file cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        plots = write_plots(evaluation, directory)
        figures, page = directory / JSON_FILE, directory / MARKDOWN_FILE
        figures.write_text(json.dumps(evaluation.to_dict(), indent=2) + "\n", encoding="utf-8")
        page.write_text(to_markdown(evaluation, plots), encoding="utf-8")
    except OSError as error:
        raise OutputNotWritableError(
            f"the evaluation cannot be written to {directory}: {error.strerror or error}; give another --output"
        ) from error
    return [figures, page, *plots]


def _tables(evaluation: Evaluation) -> list[_TableText]:
    """What there is to tell, table by table."""
    level = f"{evaluation.options.bootstrap.confidence_level:.0%} interval"
    search = ", every leaf scored" if evaluation.options.exact else ""
    search += f", mean of {evaluation.options.crops} crops" if evaluation.options.crops > 1 else ""
    title = f"{evaluation.index_version} on {evaluation.figures.count:,} images: {evaluation.material}{search}"
    tables = [_TableText(title, ("figure", "value", level), _figure_rows(evaluation))]
    published = [] if evaluation.benchmark is None else published_results(evaluation.benchmark.name)
    if evaluation.benchmark is not None and published:
        header, rows = _comparison(evaluation, published)
        note = _PLACE_NOTE if any(result.place_percent for result in published) else ""
        tables.append(_TableText(f"Published on {evaluation.benchmark.title}", header, rows, note))
    return tables


def _figure_rows(evaluation: Evaluation) -> list[_Cells]:
    figures = evaluation.figures
    rows = [_row(f"within {threshold} km", share, _percent) for threshold, share in figures.within_km.items()]
    rows += [
        _row("median error", figures.median_km, _kilometres),
        _row("mean error", figures.mean_km, _kilometres),
        _row("GeoScore", figures.geoscore, "{:.0f}".format),
    ]
    rows += [_row(f"right {level}", figures.place_accuracy[level], _percent) for level in PLACE_LEVELS]
    if figures.recall_vs_area is not None:
        rows.append(_row("area under Recall vs Area", figures.recall_vs_area, _fraction))
        rows += _recall_rows(figures.recall_vs_area)
    if figures.calibration is not None:
        rows.append(_row("expected calibration error", figures.calibration, _fraction))
    nominal = figures.radius_coverage.confidence_level
    rows += [
        _row(f"truth inside the {nominal:.0%} radius", figures.radius_coverage, _percent),
        _row(f"median {nominal:.0%} radius", figures.median_radius_km, _kilometres),
    ]
    rows += [(f"not located: {reason}", str(count), "") for reason, count in sorted(evaluation.failures.items())]
    return rows


def _recall_rows(figure: RecallVsArea) -> list[_Cells]:
    points = [
        (area, point) for area in _SHOWN_AREAS_KM2 for point in figure.curve if math.isclose(point.area_km2, area)
    ]
    return [
        _row(f"found within {area:,.0f} km² of search", Estimate(point.value, point.interval), _percent)
        for area, point in points
    ]


def _comparison(evaluation: Evaluation, published: Sequence[PublishedResult]) -> tuple[_Cells, list[_Cells]]:
    """Header and rows; only columns that somebody has published."""
    entries = [_published_values(result) for result in published]
    names = [name for name in _own_values(evaluation) if any(name in entry for entry in entries)]
    count = evaluation.figures.count
    own_source = f"this run, {count:,} of {count + evaluation.failed:,}" if evaluation.failed else "this run"
    rows: list[_Cells] = [(evaluation.index_version, *_shown(names, _own_values(evaluation)), own_source)]
    for result, entry in zip(published, entries, strict=True):
        method, _, where = result.source.partition(", ")
        rows.append((method, *_shown(names, entry), where))
    return ("", *names, "source"), rows


def _own_values(evaluation: Evaluation) -> dict[str, float]:
    """Figures by column of the comparison, in its order."""
    figures = evaluation.figures
    return {
        **{_within_column(threshold): 100.0 * figures.within_km[threshold].value for threshold in THRESHOLDS_KM},
        _GEOSCORE_COLUMN: figures.geoscore.value,
        _MEAN_COLUMN: figures.mean_km.value,
        **{_place_column(level): 100.0 * figures.place_accuracy[level].value for level in PLACE_LEVELS},
    }


def _published_values(result: PublishedResult) -> dict[str, float]:
    values = {
        **{_within_column(threshold): percent for threshold, percent in result.within_percent.items()},
        **{_place_column(level): percent for level, percent in result.place_percent.items()},
    }
    if result.geoscore is not None:
        values[_GEOSCORE_COLUMN] = result.geoscore
    if result.mean_km is not None:
        values[_MEAN_COLUMN] = result.mean_km
    return values


def _within_column(threshold_km: int) -> str:
    return f"{threshold_km} km, %"


def _place_column(level: str) -> str:
    return f"{level}, %"


def _shown(names: Sequence[str], values: Mapping[str, float]) -> list[str]:
    return [f"{values[name]:.1f}" if name in values else "" for name in names]


def _row(name: str, figure: Estimate, show: Callable[[float], str]) -> _Cells:
    lower, upper = figure.interval
    return name, show(figure.value), f"{show(lower)} to {show(upper)}"


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _kilometres(distance: float) -> str:
    return f"{distance:.1f} km"


def _fraction(value: float) -> str:
    return f"{value:.4f}"


def _markdown_row(cells: _Cells) -> str:
    return "| " + " | ".join(map(_escape, cells)) + " |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
