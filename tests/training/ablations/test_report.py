"""The page of the study: means, spreads, and verdicts that follow from the figures."""

from __future__ import annotations

import pytest

from geosurge_training.ablations.command import DEFAULT_RECIPE
from geosurge_training.ablations.report import to_markdown
from geosurge_training.ablations.run import Result
from geosurge_training.ablations.study import variants
from geosurge_training.recipe import load_recipe

SEEDS = (1, 2, 3)


def page(shares: dict[str, tuple[float, float, float]]) -> str:
    recipe = load_recipe(DEFAULT_RECIPE)
    varied = variants(recipe)
    results = [
        Result(variant.name, seed, {25: 0.1, 200: share, 750: 0.9}, 100.0, (10, 19 + seed), 1000, 36.0)
        for variant in varied
        for seed, share in zip(SEEDS, shares.get(variant.name, (0.5, 0.6, 0.7)), strict=True)
    ]
    return to_markdown(recipe, varied, results, views=500, link="`small.toml`", command="geosurge-train ablate")


@pytest.mark.parametrize(
    ("without_fusion", "verdict", "difference"),
    [
        # Pairs differ by 10, 11 and 9 points: mean 10, standard error 1 / sqrt(3), times 4.303.
        ((0.40, 0.49, 0.61), "**Agrees** with", "+10.0 points, +7.5 to +12.5"),
        ((0.60, 0.71, 0.79), "**Disagrees** with", "-10.0 points, -12.5 to -7.5"),
        ((0.40, 0.71, 0.70), "**Cannot be told here**:", "-0.3 points, -26.4 to +25.8"),
    ],
)
def test_verdicts_follow_from_pairs_of_one_seed(
    without_fusion: tuple[float, float, float], verdict: str, difference: str
) -> None:
    lines = page({"blocks-0": without_fusion}).splitlines()
    [line] = [line for line in lines if "no fusion (17.8" in line]
    assert line.startswith(f"- {verdict} the paper's finding")
    assert difference in line


def test_rows_hold_means_and_spreads() -> None:
    text = page({"classifier": (0.40, 0.50, 0.60)})
    assert "| | cells of the levels, of the first seed | parameters |" in text
    assert "| plain classification | 10, 20 | 1,000 | 10.0 ± 0.0 | 50.0 ± 10.0 | 90.0 ± 0.0 | 100 ± 0 |" in text
    assert "(0.4 hours of one core in all)" in text
    assert "One recipe, `small.toml`, varied in one respect" in text
