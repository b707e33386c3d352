from __future__ import annotations

import logging

import numpy as np
import pytest

from geosurge.errors import ConfigurationError
from geosurge_training.data.bad_samples import ALWAYS_ALLOWED, BadSamples


def bad_ones(count: int) -> list[tuple[str, str]]:
    return [("file missing", f"{number}.jpg") for number in range(count)]


def test_an_unlucky_beginning_is_no_alarm() -> None:
    # As many bad ones as allowed, drawn at random: a check at every step without a margin fails nearly all of them.
    for seed in range(50):
        bad = BadSamples("images", 0.05)
        for drawn in np.random.default_rng(seed).permutation(20_000).reshape(-1, 32) < 1000:
            bad.count(32, bad_ones(int(drawn.sum())))
        bad.report("all in all")


def test_far_too_many_are_an_error_long_before_the_end() -> None:
    bad = BadSamples("images", 0.05)
    for _ in range(2):
        bad.count(100, bad_ones(11))
    with pytest.raises(ConfigurationError, match=r"33 of 300 images cannot be used .*allows 5\.0%.*0\.jpg, 1\.jpg"):
        bad.count(100, bad_ones(11))


def test_at_the_end_chance_has_no_say_any_more() -> None:
    bad = BadSamples("images", 0.05)
    bad.count(10_000, bad_ones(501))
    with pytest.raises(ConfigurationError, match="501 of 10,000 images cannot be used"):
        bad.report("all in all")
    allowed = BadSamples("images", 0.05)
    allowed.count(10_000, bad_ones(500))
    allowed.report("all in all")


def test_a_part_of_them_is_reported_with_the_margin_that_chance_has(caplog: pytest.LogCaptureFixture) -> None:
    bad = BadSamples("images", 0.05)
    bad.count(10_000, bad_ones(501))
    with caplog.at_level(logging.WARNING):
        bad.report("a part", whole=False)
    assert "a part: 501 of 10000 images skipped (501 file missing)" in caplog.text


def test_what_others_have_counted_is_checked_without_a_word_on_why() -> None:
    bad = BadSamples("images", 0.05)
    bad.check_all(500, 10_000)
    with pytest.raises(ConfigurationError, match=r"501 of 10,000 images cannot be used, and .* 5\.0%\. Mend them"):
        bad.check_all(501, 10_000)


def test_a_few_are_never_too_many() -> None:
    bad = BadSamples("images", 0.0)
    bad.count(ALWAYS_ALLOWED, bad_ones(ALWAYS_ALLOWED))
    bad.report("all in all")
    with pytest.raises(ConfigurationError, match="11 of 11 images"):
        bad.count(1, bad_ones(1))
