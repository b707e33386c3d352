"""How far the guesses are off where the truth is known: what an owner should see before any guess is written."""

from __future__ import annotations

import heapq
import itertools
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from geosurge.archive.rows import Row, Status
from geosurge.geodesy import great_circle_km
from geosurge.truth import THRESHOLDS_KM

MIN_PROBABILITIES: Final = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_WORST: Final = 20


@dataclass(frozen=True)
class Kept:
    """What would remain if only guesses of at least some probability were kept.

    Attributes:
        min_probability: That probability.
        count: Guesses that remain.
        share: Part of all guesses that they are.
        median_km: Median of their errors; ``None`` when there is none.
        within_200_km: Part of them that is off by 200 km at most.
        inside_radius: Part of them whose truth lies inside the radius.
    """

    min_probability: float
    count: int
    share: float
    median_km: float | None
    within_200_km: float | None
    inside_radius: float | None


@dataclass(frozen=True)
class Miss:
    """One guess that is far off."""

    path: str
    error_km: float
    radius_km: float
    probability: float
    latitude_deg: float
    longitude_deg: float
    true_latitude_deg: float
    true_longitude_deg: float


@dataclass(frozen=True)
class Audit:
    """Errors of the pictures whose position is known.

    Attributes:
        count: Pictures compared.
        median_km: Median great-circle distance from the picture's own position to the guess.
        mean_km: Mean of it.
        within_km: Part of the pictures within each of `THRESHOLDS_KM`.
        confidence_level: Posterior mass that the radii claim to hold.
        inside_radius: Part of the pictures whose own position lies inside the radius; calibrated guesses make it equal
            to the confidence level.
        kept: What thresholds on the probability would leave.
        worst: The guesses that are farthest off, worst first.
    """

    count: int
    median_km: float
    mean_km: float
    within_km: dict[int, float]
    confidence_level: float
    inside_radius: float
    kept: tuple[Kept, ...]
    worst: tuple[Miss, ...]


def audit(rows: Iterable[Row]) -> Audit | None:
    """Compares guesses with the positions that the pictures had.

    Args:
        rows: The rows of a run; those that are done and have a position of their own count.

    Returns:
        The comparison; ``None`` when no row counts. It takes 24 bytes a picture.
    """
    errors, radii, probabilities = array("d"), array("d"), array("d")
    worst: list[tuple[float, int, Miss]] = []
    numbers = itertools.count()
    confidence_level = 0.0
    for row in rows:
        miss = _miss(row)
        if miss is None:
            continue
        confidence_level = row.confidence_level or confidence_level
        errors.append(miss.error_km)
        radii.append(miss.radius_km)
        probabilities.append(miss.probability)
        # Of equal errors the first one wins.
        heapq.heappush(worst, (miss.error_km, -next(numbers), miss))
        if len(worst) > _WORST:
            heapq.heappop(worst)
    if not errors:
        return None
    error_km, radius_km, probability = (np.frombuffer(values) for values in (errors, radii, probabilities))
    is_inside = error_km <= radius_km
    return Audit(
        count=len(error_km),
        median_km=float(np.median(error_km)),
        mean_km=float(error_km.mean()),
        within_km={limit: float((error_km <= limit).mean()) for limit in THRESHOLDS_KM},
        confidence_level=confidence_level,
        inside_radius=float(is_inside.mean()),
        kept=tuple(_kept(least, error_km, is_inside, probability) for least in MIN_PROBABILITIES),
        worst=tuple(miss for _, _, miss in sorted(worst, reverse=True)),
    )


def _miss(row: Row) -> Miss | None:
    if row.status is not Status.DONE or row.position is None:
        return None
    assert row.latitude_deg is not None
    assert row.longitude_deg is not None
    truth = row.position
    error_km = great_circle_km(truth.latitude_deg, truth.longitude_deg, row.latitude_deg, row.longitude_deg)
    return Miss(
        path=row.path,
        error_km=float(error_km),
        radius_km=row.radius_km or 0.0,
        probability=row.probability or 0.0,
        latitude_deg=row.latitude_deg,
        longitude_deg=row.longitude_deg,
        true_latitude_deg=truth.latitude_deg,
        true_longitude_deg=truth.longitude_deg,
    )


def _kept(
    least: float,
    error_km: np.ndarray[tuple[int], np.dtype[np.float64]],
    is_inside: np.ndarray[tuple[int], np.dtype[np.bool_]],
    probability: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> Kept:
    is_kept = probability >= least
    count = int(is_kept.sum())
    if count == 0:
        return Kept(least, 0, 0.0, None, None, None)
    return Kept(
        min_probability=least,
        count=count,
        share=count / len(probability),
        median_km=float(np.median(error_km[is_kept])),
        within_200_km=float((error_km[is_kept] <= 200.0).mean()),
        inside_radius=float(is_inside[is_kept].mean()),
    )
