"""An evaluation in three pictures: how far off, how large an area to search, how far to trust a probability."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from geosurge.truth import THRESHOLDS_KM
from geosurge_training.evaluation.evaluate import Evaluation
from geosurge_training.evaluation.metrics import CalibrationError, RecallVsArea

_COLOUR = "#1f5fa8"


def write_plots(evaluation: Evaluation, directory: Path) -> list[Path]:
    """Writes `error-cdf.png`, and `recall-vs-area.png` and `reliability.png` where they were measured.

    Args:
        evaluation: What to show.
        directory: Where to write; it must exist.

    Returns:
        The files written.

    Raises:
        OSError: A file cannot be written.
    """
    title = f"{evaluation.index_version}, {evaluation.figures.count:,} images"
    figures = evaluation.figures
    pictures = {"error-cdf.png": _error_cdf(evaluation, title)}
    if figures.recall_vs_area is not None:
        pictures["recall-vs-area.png"] = _recall_vs_area(figures.recall_vs_area, title)
    if figures.calibration is not None:
        pictures["reliability.png"] = _reliability(figures.calibration, title)
    paths = []
    for name, picture in pictures.items():
        path = directory / name
        picture.savefig(path, dpi=150)
        paths.append(path)
    return paths


def _error_cdf(evaluation: Evaluation, title: str) -> Figure:
    picture, axes = _axes(title)
    errors = np.sort(evaluation.outcomes.error_km)
    # A distance of nothing has no place on a logarithmic axis.
    axes.step(np.maximum(errors, 0.1), np.arange(1, len(errors) + 1) / len(errors), where="post", color=_COLOUR)
    shares = list(evaluation.figures.within_km.values())
    values = np.array([share.value for share in shares])
    ends = np.array([share.interval for share in shares]).T
    spread = np.abs(ends - values)
    axes.errorbar(THRESHOLDS_KM, values, yerr=spread, fmt="o", color=_COLOUR, capsize=3, markersize=4)
    axes.axvline(evaluation.figures.median_km.value, color="grey", linestyle=":", label="median")
    axes.set(xscale="log", xlabel="error (km)", ylabel="share of images", ylim=(0, 1))
    axes.legend(frameon=False, loc="center right")
    return picture


def _recall_vs_area(figure: RecallVsArea, title: str) -> Figure:
    picture, axes = _axes(title)
    areas = [point.area_km2 for point in figure.curve]
    lower, upper = np.array([point.interval for point in figure.curve]).T
    axes.plot(areas, [point.value for point in figure.curve], color=_COLOUR)
    axes.fill_between(areas, lower, upper, color=_COLOUR, alpha=0.2, linewidth=0)
    axes.set(xscale="log", xlabel="area searched (km²)", ylabel="recall", ylim=(0, 1), xlim=(areas[0], areas[-1]))
    axes.text(0.03, 0.92, f"area under the curve {figure.value:.3f}", transform=axes.transAxes)
    return picture


def _reliability(figure: CalibrationError, title: str) -> Figure:
    picture, axes = _axes(title)
    counts = np.array([part.count for part in figure.bins])
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":")
    axes.scatter(
        [part.confidence for part in figure.bins],
        [part.accuracy for part in figure.bins],
        s=15 + 300 * counts / counts.sum(),
        color=_COLOUR,
        alpha=0.7,
    )
    axes.set(xlabel="probability of the most likely leaf", ylabel="share that holds the truth")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.text(0.03, 0.92, f"expected calibration error {figure.value:.3f}", transform=axes.transAxes)
    return picture


def _axes(title: str) -> tuple[Figure, Axes]:
    # A figure of its own, not pyplot's: nothing to close, and no display needed.
    picture = Figure(figsize=(6, 4), layout="constrained")
    axes = picture.subplots()
    axes.set_title(title, fontsize="medium")
    axes.grid(visible=True, alpha=0.3)
    return picture, axes
