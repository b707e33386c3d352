"""Versions change under clients that never pause, and none of them notices."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.bundles import make_store, tiny_encoder
from support.traffic import swap_under_load

SECONDS = 60.0


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Three versions that answer differently: a and b share an encoder, c has another."""
    first, second = tiny_encoder(seed=0), tiny_encoder(seed=1)
    return make_store(tmp_path / "store", {"a": first, "b": first, "c": second})


def test_no_call_fails_and_no_answer_mixes_versions_while_they_are_swapped(store: Path) -> None:
    report = swap_under_load(store, ("b", "c", "a"), clients=16, seconds=SECONDS, swap_every=1.0, quiet_seconds=5.0)
    assert report.failures == {}
    assert report.failed_calls == 0
    assert report.inconsistent == 0
    assert report.swaps == SECONDS
    assert set(report.answers_by_version) == {"a", "b", "c"}
    assert report.calls > 10 * report.swaps
    assert report.rss_growth < 0.05
