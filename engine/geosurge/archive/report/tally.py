"""What a page says about any number of rows, counted in one pass and in bounded memory."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from geosurge.archive.rows import Row, Status
from geosurge.location import Place

MAX_DOTS: Final = 5000
"""Dots on a map; more answers than that are joined with their neighbours."""

MAX_EXAMPLES: Final = 3
"""Pictures named for each reason."""

RADIUS_EDGES_KM: Final = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0)
"""Where the classes of radii meet; the first class lies below the first edge, the last above the last."""

PROBABILITY_CLASSES: Final = 10

_FINEST_CELLS_A_DEGREE: Final = 64
_RADIUS_STEPS_A_DECADE: Final = 50


def radius_class(radius_km: float) -> int:
    """The class of `RADIUS_EDGES_KM` that a radius is in, from 0."""
    return bisect_right(RADIUS_EDGES_KM, radius_km)


@dataclass
class Dot:
    """Answers that are drawn as one.

    Attributes:
        example: The path of the first picture.
        place: Its nearest place.
        count: How many they are.
        latitude_sum_deg: Sum of their latitudes.
        longitude_sum_deg: Sum of their longitudes; they lie in one cell, which does not cross the antimeridian.
        radius_log_sum: Sum of the logarithms of their radii in kilometres.
    """

    example: str
    place: Place | None
    count: int = 0
    latitude_sum_deg: float = 0.0
    longitude_sum_deg: float = 0.0
    radius_log_sum: float = 0.0

    @property
    def latitude_deg(self) -> float:
        """Mean latitude."""
        return self.latitude_sum_deg / self.count

    @property
    def longitude_deg(self) -> float:
        """Mean longitude."""
        return self.longitude_sum_deg / self.count

    @property
    def radius_km(self) -> float:
        """Geometric mean of the radii."""
        return math.exp(self.radius_log_sum / self.count)

    def join(self, other: Dot) -> None:
        """Adds the answers of another dot."""
        self.count += other.count
        self.latitude_sum_deg += other.latitude_sum_deg
        self.longitude_sum_deg += other.longitude_sum_deg
        self.radius_log_sum += other.radius_log_sum


class Dots:
    """At most `MAX_DOTS` dots: answers in the same cell of a grid are one, and the grid coarsens until they are few.

    The grid is in degrees and starts at 1/64 degree, so that a small archive, or one of a single town, loses nothing.
    """

    def __init__(self) -> None:
        self._halvings = 0
        self._cells: dict[tuple[int, int], Dot] = {}

    def add(self, row: Row, latitude_deg: float, longitude_deg: float, radius_km: float) -> None:
        """Adds one answer."""
        single = Dot(row.path, row.place, 1, latitude_deg, longitude_deg, math.log(max(radius_km, 1e-3)))
        south, west = (int((degrees + 180.0) * _FINEST_CELLS_A_DEGREE) for degrees in (latitude_deg, longitude_deg))
        self._put((south >> self._halvings, west >> self._halvings), single)
        while len(self._cells) > MAX_DOTS:
            finer, self._cells = self._cells, {}
            self._halvings += 1
            for (row_number, column), dot in finer.items():
                self._put((row_number >> 1, column >> 1), dot)

    def all(self) -> list[Dot]:
        """The dots, in the order in which the first pictures of each came."""
        return list(self._cells.values())

    def _put(self, cell: tuple[int, int], dot: Dot) -> None:
        there = self._cells.setdefault(cell, dot)
        if there is not dot:
            there.join(dot)


@dataclass
class Reason:
    """Pictures that are not done for one reason.

    Attributes:
        count: How many.
        examples: The first `MAX_EXAMPLES` of them: path and detail.
    """

    count: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Tally:
    """Counts over rows.

    Attributes:
        statuses: Rows by status.
        reasons: Rows that are not done, by status and reason.
        radii: Rows that are done, by the class of their radius.
        probabilities: Rows that are done, by tenths of their probability.
        countries: Rows that are done, by the country of the nearest place.
        dots: Rows that are done, on a map.
        confidence_level: Part of the posterior inside the radii; ``None`` while no row is done.
    """

    statuses: Counter[Status] = field(default_factory=Counter)
    reasons: dict[tuple[Status, str], Reason] = field(default_factory=dict)
    radii: Counter[int] = field(default_factory=Counter)
    probabilities: Counter[int] = field(default_factory=Counter)
    countries: Counter[str] = field(default_factory=Counter)
    dots: Dots = field(default_factory=Dots)
    confidence_level: float | None = None
    _fine_radii: Counter[int] = field(default_factory=Counter)

    @property
    def found(self) -> int:
        """Rows."""
        return self.statuses.total()

    @property
    def median_radius_km(self) -> float | None:
        """Median radius of the rows that are done, to 3 %; ``None`` when there are none."""
        half, seen = self._fine_radii.total() / 2.0, 0
        for step in sorted(self._fine_radii):
            seen += self._fine_radii[step]
            if seen >= half:
                return float(10.0 ** (step / _RADIUS_STEPS_A_DECADE))
        return None

    def add(self, row: Row) -> None:
        """Counts one row."""
        self.statuses[row.status] += 1
        if row.status is not Status.DONE:
            reason = self.reasons.setdefault((row.status, row.reason), Reason())
            reason.count += 1
            if len(reason.examples) < MAX_EXAMPLES:
                reason.examples.append((row.path, row.detail))
            return
        if row.place is not None:
            self.countries[row.place.country] += 1
        if row.probability is not None:
            self.probabilities[min(int(row.probability * PROBABILITY_CLASSES), PROBABILITY_CLASSES - 1)] += 1
        if row.latitude_deg is None or row.longitude_deg is None or row.radius_km is None:
            return
        if self.confidence_level is None:
            self.confidence_level = row.confidence_level
        self.radii[radius_class(row.radius_km)] += 1
        self._fine_radii[round(math.log10(max(row.radius_km, 1e-3)) * _RADIUS_STEPS_A_DECADE)] += 1
        self.dots.add(row, row.latitude_deg, row.longitude_deg, row.radius_km)
