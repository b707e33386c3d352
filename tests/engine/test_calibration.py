from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.leaves import random_leaves, sample_distances_km

from geosurge.calibration import Calibration, expected_calibration_error, fit_recalibration, fit_temperature
from geosurge.geodesy import latlng_to_unit_vector
from geosurge.posterior import (
    infer,
    leaf_posterior,
    leaf_shapes,
)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_fitting_recovers_the_temperature_that_the_truths_were_drawn_with(temperature: float) -> None:
    rng = np.random.default_rng(11)
    queries = []
    for _ in range(4000):
        scores = rng.normal(0, 3, rng.integers(5, 40)).astype(np.float32)
        queries.append((scores, int(rng.choice(len(scores), p=leaf_posterior(scores, temperature)))))
    fitted = fit_temperature(queries)
    assert fitted == pytest.approx(temperature, rel=0.05)

    def loss(at: float) -> float:
        return -float(np.mean([np.log(leaf_posterior(scores, at)[truth]) for scores, truth in queries[:500]]))

    subset = fit_temperature(queries[:500])
    assert loss(subset) <= min(loss(subset * 1.02), loss(subset / 1.02))


def test_queries_without_their_true_leaf_do_not_move_the_temperature() -> None:
    rng = np.random.default_rng(12)
    queries = [(rng.normal(0, 2, 12), int(rng.integers(0, 3))) for _ in range(200)]
    lost = [(rng.normal(0, 2, 12), -1) for _ in range(50)]
    assert fit_temperature(queries + lost) == fit_temperature(queries)
    with pytest.raises(ValueError, match="no query has its true leaf"):
        fit_temperature(lost)


def simulated_masses(disc_scale: float, count: int, seed: int) -> NDArray[np.float64]:
    """Masses at the truths of queries whose truths scatter ``disc_scale`` times as widely as their leaves say."""
    latitude, longitude, spread, area = random_leaves(50, seed, (20.0, 30.0))
    vectors = latlng_to_unit_vector(latitude, longitude)
    rng = np.random.default_rng(seed)
    orders = np.stack([rng.permutation(50) for _ in range(count)])
    scores = -np.sort(-rng.normal(0, 2, (count, 50)))
    stated = infer(orders, scores, leaf_shapes(latitude, longitude, spread, area))
    actual = replace(stated, disc_radius_km=stated.disc_radius_km * disc_scale)
    return stated.mass_within([sample_distances_km(actual, row, vectors, 1, row)[0] for row in range(count)])


def test_calibrated_queries_need_no_recalibration() -> None:
    masses = simulated_masses(1.0, 3000, 1)
    levels, mapped = fit_recalibration(masses)
    assert np.abs(np.array(levels) - np.array(mapped)).max() < 0.035
    assert (masses <= 0.9).mean() == pytest.approx(0.9, abs=0.02)


def test_recalibration_restores_coverage_on_unseen_queries() -> None:
    masses = simulated_masses(3.0, 4000, 2)
    seen, unseen = masses[:2000], masses[2000:]
    calibration = Calibration(1.0, *fit_recalibration(seen))
    assert (unseen <= 0.5).mean() < 0.45
    for confidence in (0.2, 0.5, 0.8, 0.9, 0.97):
        assert (unseen <= calibration.mass_for_confidence(confidence)).mean() == pytest.approx(confidence, abs=0.035)


def test_without_recalibration_the_confidence_is_the_mass() -> None:
    assert Calibration(2.0).mass_for_confidence(0.37) == 0.37


def test_recalibration_is_monotone_and_bounded() -> None:
    calibration = Calibration(1.0, *fit_recalibration(np.random.default_rng(0).beta(2, 1, 40)))
    masses = calibration.mass_for_confidence(np.linspace(0, 1, 101)).tolist()
    assert masses == sorted(masses)
    assert (masses[0], masses[-1]) == (0.0, 1.0)
    with pytest.raises(ValueError, match="at least one"):
        fit_recalibration([])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        fit_recalibration([0.5, np.nan])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), "temperature"),
        ((math.nan,), "temperature"),
        ((1.0, (0.0, 1.0), (0.0,)), "one for each"),
        ((1.0, (0.0, 0.5), (0.0, 1.0)), "ascend"),
        ((1.0, (0.0, 0.5, 0.5, 1.0), (0.0, 0.1, 0.2, 1.0)), "ascend"),
        ((1.0, (0.0, 0.5, 1.0), (0.0, 0.6, 0.5)), "never decrease"),
        ((1.0, (0.0, 1.0), (0.0, 1.5)), "never decrease"),
    ],
)
def test_a_calibration_that_makes_no_sense_is_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Calibration(*arguments)  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60), st.integers(1, 20))
def test_expected_calibration_error_equals_the_textbook_sum(answers: list[tuple[float, bool]], bins: int) -> None:
    expected = 0.0
    for row in range(bins):
        inside = [(c, right) for c, right in answers if min(int(c * bins), bins - 1) == row]
        if inside:
            confidence, accuracy = (sum(column) / len(inside) for column in zip(*inside, strict=True))
            expected += len(inside) / len(answers) * abs(confidence - accuracy)
    found = expected_calibration_error([c for c, _ in answers], [right for _, right in answers], bins)
    assert found == pytest.approx(expected, abs=1e-12)


def test_expected_calibration_error_of_the_perfect_and_the_overconfident() -> None:
    assert expected_calibration_error([0.75] * 4, [True, True, True, False]) == pytest.approx(0.0)
    assert expected_calibration_error([0.99] * 4, [True, False, False, False]) == pytest.approx(0.74)
    with pytest.raises(ValueError, match="one for each"):
        expected_calibration_error([0.5], [True, False])
