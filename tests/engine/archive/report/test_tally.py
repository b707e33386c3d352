from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geosurge.archive.report import tally as module
from geosurge.archive.report.tally import RADIUS_EDGES_KM, Dots, Tally, radius_class
from geosurge.archive.rows import HAS_POSITION, Row, Status
from geosurge.location import Place

ANSWERS = st.tuples(st.floats(-90.0, 90.0), st.floats(-180.0, 180.0), st.floats(0.0, 20_000.0))


def done(name: str, latitude_deg: float, longitude_deg: float, radius_km: float, probability: float = 0.5) -> Row:
    return Row(
        name,
        Status.DONE,
        latitude_deg=latitude_deg,
        longitude_deg=longitude_deg,
        radius_km=radius_km,
        confidence_level=0.9,
        probability=probability,
        place=Place("Lyon", "", "France", "FR", 1.0),
    )


def dots_of(answers: Sequence[tuple[float, float, float]]) -> Dots:
    dots = Dots()
    for number, (latitude_deg, longitude_deg, radius_km) in enumerate(answers):
        dots.add(done(f"{number}.jpg", latitude_deg, longitude_deg, radius_km), latitude_deg, longitude_deg, radius_km)
    return dots


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ANSWERS, min_size=1, max_size=60))
def test_dots_are_few_and_lose_no_answer(
    monkeypatch: pytest.MonkeyPatch, answers: list[tuple[float, float, float]]
) -> None:
    monkeypatch.setattr(module, "MAX_DOTS", 8)
    dots = dots_of(answers).all()
    assert 1 <= len(dots) <= 8
    assert sum(dot.count for dot in dots) == len(answers)
    for part, mean in ((0, "latitude_deg"), (1, "longitude_deg")):
        total = math.fsum(dot.count * getattr(dot, mean) for dot in dots)
        assert total == pytest.approx(math.fsum(answer[part] for answer in answers), abs=1e-6)


@given(st.lists(ANSWERS, min_size=1, max_size=60))
def test_a_dot_lies_among_its_own_answers(answers: list[tuple[float, float, float]]) -> None:
    # Few answers are joined only within the finest cells.
    for dot in dots_of(answers).all():
        near = [
            answer
            for answer in answers
            if abs(answer[0] - dot.latitude_deg) <= 1 / 64 and abs(answer[1] - dot.longitude_deg) <= 1 / 64
        ]
        assert len(near) >= dot.count
        radii = [max(radius, 1e-3) for *_, radius in near]
        assert min(radii) * (1 - 1e-9) <= dot.radius_km <= max(radii) * (1 + 1e-9)


def test_answers_on_both_sides_of_the_antimeridian_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DOTS", 2)
    dots = dots_of([(0.0, 179.9, 1.0), (0.0, -179.9, 1.0), (0.1, 179.8, 1.0), (0.1, -179.8, 1.0)]).all()
    assert sorted(round(dot.longitude_deg) for dot in dots) == [-180, 180]


def test_classes_of_radii_meet_at_their_edges() -> None:
    assert radius_class(0.0) == 0
    for number, edge in enumerate(RADIUS_EDGES_KM):
        assert radius_class(math.nextafter(edge, 0.0)) == number
        assert radius_class(edge) == number + 1


def test_everything_is_counted_once() -> None:
    tally = Tally()
    for number in range(5):
        tally.add(Row(f"{number}.jpg", Status.FAILED, "IMAGE_EMPTY", f"detail {number}"))
    tally.add(Row("skipped.jpg", Status.SKIPPED, HAS_POSITION, "it has one"))
    tally.add(done("sure.jpg", 45.0, 5.0, 3.0, probability=1.0))
    tally.add(done("unsure.jpg", 45.0, 5.0, 300.0, probability=0.05))
    assert tally.found == 8
    assert tally.statuses == {Status.FAILED: 5, Status.SKIPPED: 1, Status.DONE: 2}
    failed = tally.reasons[Status.FAILED, "IMAGE_EMPTY"]
    assert (failed.count, failed.examples) == (5, [(f"{number}.jpg", f"detail {number}") for number in range(3)])
    assert tally.radii == {radius_class(3.0): 1, radius_class(300.0): 1}
    assert tally.probabilities == {0: 1, 9: 1}
    assert tally.countries == {"France": 2}


@given(st.lists(st.floats(0.01, 20_000.0), min_size=1, max_size=40))
def test_the_median_radius_is_right_to_three_percent(radii: list[float]) -> None:
    tally = Tally()
    for radius_km in radii:
        tally.add(done("a.jpg", 0.0, 0.0, radius_km))
    assert tally.median_radius_km == pytest.approx(sorted(radii)[(len(radii) - 1) // 2], rel=0.03)


def test_without_answers_there_is_no_median() -> None:
    assert Tally().median_radius_km is None
