"""The study as a page of Markdown: a table and a verdict for each question."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Final

from scipy.stats import t as student

from geosurge_training.ablations.run import VIEWS_SEED, Result
from geosurge_training.ablations.study import BASE, QUESTIONS, Expectation, Question, Variant
from geosurge_training.recipe import Recipe

_CONFIDENCE: Final = 0.95
_DISTANCES: Final = (25, 200, 750)
_JUDGED_BY: Final = 200


def to_markdown(
    recipe: Recipe, variants: Sequence[Variant], results: Sequence[Result], *, views: int, link: str, command: str
) -> str:
    """Writes the page.

    Args:
        recipe: What was varied.
        variants: The variants.
        results: Of every variant with every seed.
        views: Held-out views that they were measured on.
        link: To the recipe's file.
        command: What was run.
    """
    outcomes = {variant.name: [r for r in results if r.variant == variant.name] for variant in variants}
    seeds = len(outcomes[BASE])
    training = recipe.training
    hours = sum(result.seconds for result in results) / 3600
    setting = (
        f"One recipe, {link}, varied in one respect at a time: views of the Blue Marble world, "
        f"{training.steps:,} steps of {training.batch_size} images for every variant, {seeds} seeds, one thread a run "
        f"({hours:.1f} hours of one core in all). Everything is measured on the same {views:,} held-out views (seed "
        f"{VIEWS_SEED}), which nothing was fitted or chosen on, with every leaf scored and the best leaf's mean as the "
        "answer. The networks are small and shortly trained, and the views are seen from orbit: what holds here need "
        "not hold for photographs taken on the ground."
    )
    reading = (
        "Figures are means over the seeds, ± the standard deviation between them. A difference is told with its "
        f"{100 * _CONFIDENCE:.0f} % interval over pairs of one seed (Student's t), by the share within {_JUDGED_BY} "
        "km; where the interval holds zero, these seeds cannot tell."
    )
    parts = ["# Ablations", setting, f"```sh\n{command}\n```", reading]
    for question in QUESTIONS:
        parts += _answer(question, variants, outcomes)
    return "\n\n".join(parts) + "\n"


def _answer(question: Question, variants: Sequence[Variant], outcomes: dict[str, list[Result]]) -> list[str]:
    labels = {variant.name: variant.label for variant in variants} | {question.compared_with: question.base}
    header = (
        "| | cells of the levels, of the first seed | parameters | "
        + " | ".join(f"within {d} km, %" for d in _DISTANCES)
        + " | median, km |"
    )
    lines = [header, "|---|---:|---:|" + "---:|" * (len(_DISTANCES) + 1)]
    for name in (question.compared_with, *question.variants):
        found = outcomes[name]
        cells = ", ".join(f"{count:,}" for count in found[0].cells)
        shares = [_spread([100 * result.within_km[distance] for result in found]) for distance in _DISTANCES]
        median = _spread([result.median_km for result in found], 0)
        lines.append(f"| {labels[name]} | {cells} | {found[0].parameters:,} | {' | '.join(shares)} | {median} |")
    reference = outcomes[question.compared_with]
    differences = [
        f"- {labels[name]}, against {question.base}: {_points(*_difference(outcomes[name], reference))}"
        for name in question.variants
    ]
    verdicts = [f"- {_verdict(expectation, outcomes)}" for expectation in question.expectations]
    return [f"## {question.title}", question.remark, "\n".join(lines), "\n".join([*differences, *verdicts])]


def _verdict(expectation: Expectation, outcomes: dict[str, list[Result]]) -> str:
    mean, margin = _difference(outcomes[expectation.better], outcomes[expectation.worse])
    if mean - margin > 0:
        verdict = "**Agrees** with"
    elif mean + margin < 0:
        verdict = "**Disagrees** with"
    else:
        verdict = "**Cannot be told here**:"
    return f"{verdict} the paper's finding that {expectation.finding}: {_points(mean, margin)}."


def _points(mean: float, margin: float) -> str:
    return f"{mean:+.1f} points, {mean - margin:+.1f} to {mean + margin:+.1f}"


def _difference(found: Sequence[Result], reference: Sequence[Result]) -> tuple[float, float]:
    """Mean difference in percentage points over pairs of one seed, and half the width of its interval."""
    share = {result.seed: result.within_km[_JUDGED_BY] for result in reference}
    differences = [100 * (result.within_km[_JUDGED_BY] - share[result.seed]) for result in found]
    if len(differences) < 2:
        return differences[0], math.inf
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences), float(student.ppf((1 + _CONFIDENCE) / 2, len(differences) - 1)) * error


def _spread(values: Sequence[float], decimals: int = 1) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.fmean(values):.{decimals}f} ± {deviation:.{decimals}f}"
