from __future__ import annotations

import math

import numpy as np
import pytest

from geosurge_training.evaluation import bootstrap as bootstrapping
from geosurge_training.evaluation.bootstrap import Bootstrap


@pytest.mark.parametrize("count", [1, 20, 21])
def test_means_and_medians_equal_those_of_the_drawn_images(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrapping, "_BLOCK_DRAWS", 150)  # several blocks, the last of them smaller
    values = np.random.default_rng(1).normal(size=(count, 3))
    bootstrap = Bootstrap(resamples=50, seed=4)
    drawn = [values[rows] for block in bootstrap.draws(count) for rows in block]
    assert len(drawn) == 50
    np.testing.assert_allclose(bootstrap.means(values), [sample.mean(axis=0) for sample in drawn], atol=1e-12)
    np.testing.assert_allclose(bootstrap.medians(values[:, 1]), [np.median(sample[:, 1]) for sample in drawn])


def test_the_same_seed_gives_the_same_interval_and_another_one_another() -> None:
    values = np.random.default_rng(2).exponential(size=(30, 1))
    first, again, other = (Bootstrap(100, seed=seed).means(values) for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_interval_of_a_share_is_that_of_the_normal_approximation() -> None:
    share, count = 0.3, 5000
    values = (np.arange(count) < share * count).astype(float)[:, np.newaxis]
    bootstrap = Bootstrap(2000, 0.95)
    (estimate,) = bootstrap.estimates(values.mean(axis=0), bootstrap.means(values))
    half = 1.96 * math.sqrt(share * (1 - share) / count)
    assert estimate.value == pytest.approx(share)
    assert estimate.interval == pytest.approx((share - half, share + half), abs=0.1 * half)


def test_intervals_hold_the_mean_of_the_population_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for seed in range(300):
        low, high = Bootstrap(200, 0.9, seed).intervals(Bootstrap(200, 0.9, seed).means(rng.normal(2, 1, (80, 1))))
        hits += int(low[0] <= 2.0 <= high[0])
    assert 0.84 < hits / 300 < 0.95


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="resamples is 0"):
        Bootstrap(0)
    with pytest.raises(ValueError, match="confidence_level is 1"):
        Bootstrap(confidence_level=1.0)
