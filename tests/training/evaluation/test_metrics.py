from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from geosurge.calibration import expected_calibration_error
from geosurge_training.evaluation.bootstrap import Bootstrap
from geosurge_training.evaluation.metrics import (
    AREAS_KM2,
    EARTH_AREA_KM2,
    LeafOutcomes,
    Outcomes,
    calibration,
    geoscore,
    recall_vs_area,
    same_places,
    search_area_km2,
    summarise,
)
from geosurge_training.places import City

BOOTSTRAP = Bootstrap(200, seed=1)


def outcomes() -> Outcomes:
    return Outcomes(
        error_km=np.array([0.5, 25.0, 25.1, 200.0, 751.0, 2500.0, 9000.0]),
        radius_km=np.array([1.0, 30.0, 25.0, 200.0, 700.0, 2600.0, 8000.0]),
        radius_confidence=0.9,
        same_place=np.array(
            [[True] * 4, [True, True, True, False], [True, True, False, False], [True] + [False] * 3]
            + [[False] * 4] * 3
        ),
        leaves=LeafOutcomes(
            probability=np.linspace(0.2, 0.8, 7),
            correct=np.array([True, True, False, True, False, False, False]),
            search_area_km2=np.array([10.0, 10.0, 100.0, 1e4, 1e6, 1e8, np.inf]),
        ),
    )


def test_figures_agree_with_a_count_by_hand() -> None:
    figures = summarise(outcomes(), BOOTSTRAP)
    assert figures.count == 7
    shares = {threshold: share.value for threshold, share in figures.within_km.items()}
    assert shares == pytest.approx({1: 1 / 7, 25: 2 / 7, 200: 4 / 7, 750: 4 / 7, 2500: 6 / 7})
    assert figures.median_km.value == 200.0
    assert figures.mean_km.value == pytest.approx(outcomes().error_km.sum() / 7)
    scores = [5000 * math.exp(-error / 1492.7) for error in outcomes().error_km]
    assert figures.geoscore.value == pytest.approx(sum(scores) / 7)
    places = {level: share.value for level, share in figures.place_accuracy.items()}
    assert places == pytest.approx({"country": 4 / 7, "region": 3 / 7, "subregion": 2 / 7, "city": 1 / 7})
    assert figures.radius_coverage.value == pytest.approx(4 / 7)
    assert figures.radius_coverage.confidence_level == 0.9
    assert figures.median_radius_km.value == 200.0


def test_intervals_are_those_of_the_figures_over_resampled_outcomes() -> None:
    whole, leaves = outcomes(), outcomes().leaves
    assert leaves is not None
    resampled = []
    for block in BOOTSTRAP.draws(7):
        for rows in block:
            part = replace(
                whole,
                error_km=whole.error_km[rows],
                radius_km=whole.radius_km[rows],
                same_place=whole.same_place[rows],
                leaves=LeafOutcomes(leaves.probability[rows], leaves.correct[rows], leaves.search_area_km2[rows]),
            )
            figures = summarise(part, Bootstrap(1))
            assert figures.recall_vs_area is not None
            assert figures.calibration is not None
            resampled.append(
                (
                    figures.within_km[25].value,
                    figures.median_km.value,
                    figures.mean_km.value,
                    figures.geoscore.value,
                    figures.place_accuracy["country"].value,
                    figures.recall_vs_area.value,
                    figures.calibration.value,
                    figures.radius_coverage.value,
                )
            )
    expected = np.quantile(resampled, [0.025, 0.975], axis=0)
    figures = summarise(whole, BOOTSTRAP)
    assert figures.recall_vs_area is not None
    assert figures.calibration is not None
    intervals = [
        figures.within_km[25].interval,
        figures.median_km.interval,
        figures.mean_km.interval,
        figures.geoscore.interval,
        figures.place_accuracy["country"].interval,
        figures.recall_vs_area.interval,
        figures.calibration.interval,
        figures.radius_coverage.interval,
    ]
    np.testing.assert_allclose(np.transpose(intervals), expected, rtol=1e-12)


def test_without_leaves_there_is_neither_a_curve_nor_a_calibration_error() -> None:
    figures = summarise(replace(outcomes(), leaves=None), BOOTSTRAP)
    assert figures.recall_vs_area is None
    assert figures.calibration is None


def test_geoscore_is_5000_at_the_truth_and_falls_to_its_eth_part_at_its_scale() -> None:
    assert geoscore([0.0, 1492.7]).tolist() == pytest.approx([5000.0, 5000.0 / math.e])


def test_search_areas_equal_a_search_through_a_small_grid() -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        areas = rng.integers(1, 4, 6).astype(float)
        probability = rng.choice([0.1, 0.2, 0.3], 6)  # ties are common
        truth = int(rng.integers(-1, 6))
        expected = math.inf
        if truth >= 0:
            expected, searched = 0.0, set[int]()
            for level in sorted(set(probability.tolist()), reverse=True):
                searched |= {cell for cell in range(6) if probability[cell] == level}
                expected = sum(areas[cell] for cell in searched)
                if truth in searched:
                    break
        found = search_area_km2(np.log(probability)[np.newaxis], areas[np.newaxis], np.array([truth]))
        assert found.tolist() == pytest.approx([expected])


def test_padding_is_never_searched() -> None:
    scores = np.array([[0.0, -1.0, -np.inf], [0.0, -np.inf, -np.inf]])
    areas = np.array([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    assert search_area_km2(scores, areas, np.array([1, -1])).tolist() == [3.0, math.inf]


def test_the_area_under_the_curve_is_the_integral_of_its_steps() -> None:
    areas = np.array([0.5, 3.0, 2e3, 2e3, 7.7e5, 4e8, np.inf])
    figure = recall_vs_area(areas, BOOTSTRAP)
    edges = np.linspace(0.0, math.log(EARTH_AREA_KM2), 200_001)
    recall = (areas[np.newaxis] <= np.exp((edges[:-1] + edges[1:]) / 2)[:, np.newaxis]).mean(axis=1)
    assert figure.value == pytest.approx(recall.mean(), abs=1e-5)
    for point in figure.curve:
        assert point.value == pytest.approx(sum(area <= point.area_km2 for area in areas) / 7)
        assert point.interval[0] <= point.value <= point.interval[1]
    assert [point.area_km2 for point in figure.curve] == list(AREAS_KM2)


@pytest.mark.parametrize(("area", "expected"), [(1.0, 1.0), (math.sqrt(EARTH_AREA_KM2), 0.5), (math.inf, 0.0)])
def test_the_area_under_the_curve_of_one_image(area: float, expected: float) -> None:
    assert recall_vs_area(np.array([area]), BOOTSTRAP).value == pytest.approx(expected)


def test_the_calibration_error_equals_that_of_the_posterior_and_a_sum_over_bins() -> None:
    rng = np.random.default_rng(6)
    probability = rng.uniform(size=500)
    probability[:3] = 0.0, 1.0, 1.0
    correct = rng.uniform(size=500) < probability**2
    figure = calibration(probability, correct, BOOTSTRAP)
    assert figure.value == pytest.approx(expected_calibration_error(probability, correct))
    gaps = 0.0
    for step in range(15):
        inside = (probability >= step / 15) & ((probability < (step + 1) / 15) | (step == 14))
        gaps += inside.sum() / 500 * abs(probability[inside].mean() - correct[inside].mean())
    assert figure.value == pytest.approx(gaps)
    assert sum(part.count for part in figure.bins) == 500
    assert figure.value == pytest.approx(
        sum(part.count * abs(part.confidence - part.accuracy) for part in figure.bins) / 500
    )


@pytest.mark.parametrize(
    ("estimate", "truth", "same"),
    [
        (("Windhoek", "", "Khomas", "NA"), ("Windhoek", "", "Khomas", "NA"), [True, True, True, True]),
        (("Springfield", "Clark", "Ohio", "US"), ("Springfield", "Sangamon", "Illinois", "US"), [True] + [False] * 3),
        (("Salem", "Clark", "Ohio", "US"), ("Salem", "Butler", "Ohio", "US"), [True, True, False, False]),
        (("Dayton", "Clark", "Ohio", "US"), ("Salem", "Clark", "Ohio", "US"), [True, True, True, False]),
        (("Elsewhere", "", "Khomas", "NA"), ("Windhoek", "", "Khomas", "NA"), [True, True, True, False]),
        (("Santiago", "", "Central", "CL"), ("Santiago", "", "Central", "PY"), [False] * 4),
        (("Monaco", "", "", "MC"), ("Monaco", "", "", "MC"), [True] * 4),
        (("Monaco", "", "", "MC"), ("Singapore", "", "", "SG"), [False] * 4),
    ],
)
def test_places_are_the_same_when_everything_above_them_is(
    estimate: tuple[str, str, str, str], truth: tuple[str, str, str, str], same: list[bool]
) -> None:
    assert same_places([City(*estimate)], [City(*truth)]).tolist() == [same]
