from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterator
from dataclasses import replace

import pytest

from geosurge.archive.audit import MIN_PROBABILITIES, Audit, Miss, audit
from geosurge.archive.rows import Position, Row, Status
from geosurge.truth import THRESHOLDS_KM

EARTH_RADIUS_KM = 6371.0088


def distance_km(row: Row) -> float:
    """From a row's own position to its guess, by the chord between two points of the sphere."""
    assert row.position is not None
    points = []
    for latitude, longitude in (
        (row.position.latitude_deg, row.position.longitude_deg),
        (row.latitude_deg, row.longitude_deg),
    ):
        assert latitude is not None
        assert longitude is not None
        phi, theta = math.radians(latitude), math.radians(longitude)
        points.append((math.cos(phi) * math.cos(theta), math.cos(phi) * math.sin(theta), math.sin(phi)))
    return 2 * EARTH_RADIUS_KM * math.asin(min(1.0, math.dist(*points) / 2))


def guesses(count: int, seed: int = 1) -> list[Row]:
    """Guesses that are off by anything, the improbable ones by more."""
    chance = random.Random(seed)
    rows = []
    for number in range(count):
        truth = Position(chance.uniform(-80, 80), chance.uniform(-180, 180), "exif")
        probability = chance.random() * 0.95
        off = chance.expovariate(1.0) * 10 ** (2 * (1 - probability)) * 0.1
        rows.append(
            Row(
                f"/photos/{number:04}.jpg",
                Status.DONE,
                position=truth,
                latitude_deg=max(-90.0, min(90.0, truth.latitude_deg + chance.uniform(-off, off))),
                longitude_deg=truth.longitude_deg + off - (360 if truth.longitude_deg + off > 180 else 0),
                radius_km=chance.uniform(1, 3000),
                confidence_level=0.8,
                probability=probability,
            )
        )
    return rows


def others() -> list[Row]:
    """Rows that no guess can be compared in."""
    placed = Position(1.0, 2.0, "exif")
    return [
        Row("/a.jpg", Status.SKIPPED, "NO_POSITION"),
        Row("/b.jpg", Status.FAILED, "IMAGE_EMPTY", position=placed),
        Row("/c.jpg", Status.DONE, latitude_deg=1.0, longitude_deg=2.0, radius_km=1.0, probability=0.99),
    ]


def compared(rows: list[Row]) -> Audit:
    found = audit(rows)
    assert found is not None
    return found


@pytest.mark.parametrize("count", [1, 2, 21, 500])
def test_the_numbers_are_those_of_a_plain_computation(count: int) -> None:
    rows = guesses(count)
    errors = [distance_km(row) for row in rows]
    found = compared([*rows, *others()])
    assert found.count == count
    assert found.median_km == pytest.approx(statistics.median(errors), abs=1e-3)
    assert found.mean_km == pytest.approx(statistics.fmean(errors), abs=1e-3)
    assert list(found.within_km) == list(THRESHOLDS_KM)
    for limit, share in found.within_km.items():
        assert share == pytest.approx(sum(error <= limit for error in errors) / count)
    assert found.confidence_level == 0.8
    inside = [error <= (row.radius_km or 0) for error, row in zip(errors, rows, strict=True)]
    assert found.inside_radius == pytest.approx(sum(inside) / count)
    assert [kept.min_probability for kept in found.kept] == list(MIN_PROBABILITIES)
    for kept in found.kept:
        remain = [number for number, row in enumerate(rows) if (row.probability or 0) >= kept.min_probability]
        assert kept.count == len(remain)
        assert kept.share == pytest.approx(len(remain) / count)
        if not remain:
            assert (kept.median_km, kept.within_200_km, kept.inside_radius) == (None, None, None)
            continue
        assert kept.median_km == pytest.approx(statistics.median(errors[number] for number in remain), abs=1e-3)
        assert kept.within_200_km == pytest.approx(statistics.fmean(errors[number] <= 200 for number in remain))
        assert kept.inside_radius == pytest.approx(statistics.fmean(inside[number] for number in remain))


def test_the_worst_misses_come_worst_first() -> None:
    rows = guesses(300)
    worst = sorted(rows, key=distance_km, reverse=True)[:20]
    found = compared(rows).worst
    assert [miss.path for miss in found] == [row.path for row in worst]
    for miss, row in zip(found, worst, strict=True):
        assert row.position is not None
        assert miss.error_km == pytest.approx(distance_km(row), abs=1e-3)
        assert miss == Miss(
            path=row.path,
            error_km=miss.error_km,
            radius_km=row.radius_km or 0,
            probability=row.probability or 0,
            latitude_deg=row.latitude_deg or 0,
            longitude_deg=row.longitude_deg or 0,
            true_latitude_deg=row.position.latitude_deg,
            true_longitude_deg=row.position.longitude_deg,
        )


def test_of_equal_misses_the_first_ones_are_shown() -> None:
    (row,) = guesses(1)
    rows = [replace(row, path=f"/{number:02}.jpg") for number in range(40)]
    assert [miss.path for miss in compared(rows).worst] == [f"/{number:02}.jpg" for number in range(20)]


def test_where_nothing_can_be_compared_there_is_no_audit() -> None:
    assert audit(others()) is None
    assert audit([]) is None


def test_rows_are_gone_through_once() -> None:
    def rows() -> Iterator[Row]:
        yield from guesses(50)

    assert audit(rows()) == audit(guesses(50))
