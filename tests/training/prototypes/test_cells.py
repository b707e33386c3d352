from __future__ import annotations

import itertools

import pytest

from geosurge.errors import ConfigurationError
from geosurge_training.prototypes.cells import default_tau_max, partition_section


def test_thresholds_are_the_published_ones_for_mp16_and_stop_falling_for_few_pictures() -> None:
    published = default_tau_max(4_700_000)
    assert (published[0], published[-1]) == pytest.approx((25_000, 500))
    assert partition_section("s2", 4_700_000).tau_min_per_level == pytest.approx([50] * 7)
    few = default_tau_max(5000)
    assert (few[0], few[-1]) == pytest.approx((200, 4))
    assert few == default_tau_max(0)
    assert all(coarse > fine for coarse, fine in itertools.pairwise(few))


def test_thresholds_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(ConfigurationError, match="tau_min has 2 values and tau_max 3"):
        partition_section("h3", 100, (30.0, 20.0, 10.0), (2.0, 1.0))
    with pytest.raises(ConfigurationError, match="not split"):
        partition_section("administrative", 100, (3.0,))
