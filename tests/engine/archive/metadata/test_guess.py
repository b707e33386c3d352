from __future__ import annotations

from dataclasses import replace

import pytest
from support.metadata import GUESS

from geosurge.archive.metadata.guess import SAME_PLACE_DEG, method_run_id


def test_the_method_names_the_run() -> None:
    assert GUESS.method == "geosurge blue-marble-v2 run run-1"
    assert method_run_id(GUESS.method) == "run-1"


@pytest.mark.parametrize("method", ["", "GPS", "CELLID", "geosurge v1", "geosurge v1 run", "my geosurge v1 run 1"])
def test_the_methods_of_others_name_no_run(method: str) -> None:
    assert method_run_id(method) == ""


def test_the_radius_is_written_in_metres() -> None:
    assert replace(GUESS, radius_km=0.4996).error_m == 500


@pytest.mark.parametrize(("step", "same"), [(0.9, True), (-0.9, True), (2, False), (-2, False)])
def test_a_rounded_position_is_the_same(step: float, same: bool) -> None:
    offset = step * SAME_PLACE_DEG
    assert GUESS.is_at(GUESS.latitude_deg + offset, GUESS.longitude_deg) is same
    assert GUESS.is_at(GUESS.latitude_deg, GUESS.longitude_deg + offset) is same
