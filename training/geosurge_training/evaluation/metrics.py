"""What an evaluation measures, from what is known of each image: distances, places, search areas, calibration.

- **Accuracy at k km**: share of the images whose estimate lies within k great-circle kilometres of the truth. The
  sphere has the radius 6371.0088 km and "within" includes k; published code also uses 6371 km, 6378.137 km or the
  WGS-84 ellipsoid, and "less than", which moves figures by some tenths of a percent at most.
- **GeoScore**: mean of 5000 exp(-d / 1492.7 km), as OpenStreetView-5M (CVPR 2024) takes it from the game GeoGuessr.
- **Place accuracy**: share of the images whose estimate and truth have the same country, region, subregion or city,
  both by the nearest city (`places.nearest_cities`). Names count with those above them: a city is right only in the
  right subregion of the right region of the right country. As in OpenStreetView-5M and in the administrative
  partitions, regions are the first division of a country and subregions the second: a county, a district. OURS: where
  GeoNames knows none, the absent name is a name, and the subregion is right where the region is.
- **Recall vs Area** (Bianco et al., arXiv 2407.13862): search the answer's leaves in order of their score, which is the
  order of their probability, until the one with the truth is reached; RvA(A) is the share of the images for which this
  takes an area of at most A. As published, no score is divided by the area of its leaf. The area under the curve is
  taken, by this project's decision, over the logarithm of A from `SMALLEST_AREA_KM2` to the surface of the Earth, and
  divided by the length of that axis: between 0 (never found) and 1 (found at once).
- **Calibration**: the expected calibration error (Guo et al. 2017, equation 3) of the probability of the most likely
  leaf, which is right where it holds the truth.
- **Radius coverage**: share of the images whose truth lies inside the radius of the answer.

Every figure comes with a bootstrap interval over images (`bootstrap`). Drawing images twice adds noise to the gaps of
the calibration bins, so that the interval of the calibration error leans upwards, the more the fewer images there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geosurge.geodesy import EARTH_RADIUS_KM
from geosurge.truth import THRESHOLDS_KM
from geosurge_training.evaluation.bootstrap import Bootstrap, Estimate
from geosurge_training.places import City

PLACE_LEVELS: Final = ("country", "region", "subregion", "city")
GEOSCORE_MAXIMUM: Final = 5000.0
GEOSCORE_SCALE_KM: Final = 1492.7
EARTH_AREA_KM2: Final = 4.0 * math.pi * EARTH_RADIUS_KM**2
SMALLEST_AREA_KM2: Final = 1.0
CALIBRATION_BINS: Final = 15

AREAS_KM2: Final = (*(10.0 ** (step / 5) for step in range(44)), EARTH_AREA_KM2)
"""Where the curve of Recall vs Area is told: five areas a decade, and the Earth."""


@dataclass(frozen=True)
class LeafOutcomes:
    """What is known of the posterior over leaves of n located images.

    Attributes:
        probability: (n,) probabilities of the most likely leaves.
        correct: (n,) bool, whether these leaves hold the truth.
        search_area_km2: (n,) areas of `search_area_km2`.
    """

    probability: NDArray[np.float64]
    correct: NDArray[np.bool_]
    search_area_km2: NDArray[np.float64]


@dataclass(frozen=True)
class Outcomes:
    """What is known of n located images, n at least 1.

    Attributes:
        error_km: (n,) distances from truth to estimate.
        radius_km: (n,) radii of the answers.
        radius_confidence: Confidence level that the radii were asked for.
        same_place: (n, 4) bool, columns as in `PLACE_LEVELS`.
        leaves: Of the posterior; none where nobody knows which leaf holds a coordinate.
    """

    error_km: NDArray[np.float64]
    radius_km: NDArray[np.float64]
    radius_confidence: float
    same_place: NDArray[np.bool_]
    leaves: LeafOutcomes | None = None


@dataclass(frozen=True)
class CurvePoint:
    """One point of the curve of Recall vs Area."""

    area_km2: float
    value: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class RecallVsArea(Estimate):
    """Area under the curve of Recall vs Area, and the curve."""

    curve: tuple[CurvePoint, ...]


@dataclass(frozen=True)
class CalibrationBin:
    """Images whose probability lies in one of equally wide ranges.

    Attributes:
        count: Number of images, at least 1.
        confidence: Their mean probability.
        accuracy: Share of them that are right.
    """

    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class CalibrationError(Estimate):
    """Expected calibration error, and the bins that hold any image."""

    bins: tuple[CalibrationBin, ...]


@dataclass(frozen=True)
class RadiusCoverage(Estimate):
    """Share of the images inside their radius, and the share that there should be."""

    confidence_level: float


@dataclass(frozen=True)
class Figures:
    """The figures of an evaluation; see the module for what each means.

    Attributes:
        count: Images located.
        within_km: Share of the images located within each of `THRESHOLDS_KM`.
        median_km: Median distance from truth to estimate.
        mean_km: Mean distance.
        geoscore: Mean GeoScore, 0 to 5000.
        place_accuracy: Share of the images in the right place, for each of `PLACE_LEVELS`.
        recall_vs_area: Area under the curve of Recall vs Area; none where no leaf is known to hold the truth.
        calibration: Expected calibration error; likewise.
        radius_coverage: Share of the images whose truth lies inside the radius.
        median_radius_km: Median radius.
    """

    count: int
    within_km: dict[int, Estimate]
    median_km: Estimate
    mean_km: Estimate
    geoscore: Estimate
    place_accuracy: dict[str, Estimate]
    recall_vs_area: RecallVsArea | None
    calibration: CalibrationError | None
    radius_coverage: RadiusCoverage
    median_radius_km: Estimate


def summarise(outcomes: Outcomes, bootstrap: Bootstrap) -> Figures:
    """Turns what is known of each image into figures with intervals.

    Args:
        outcomes: Of at least one image.
        bootstrap: How the intervals are resampled.
    """
    errors = outcomes.error_km
    within = errors[:, np.newaxis] <= np.array(THRESHOLDS_KM)
    covered = errors <= outcomes.radius_km
    columns = np.column_stack([within, errors, geoscore(errors), outcomes.same_place, covered]).astype(np.float64)
    estimates = iter(bootstrap.estimates(columns.mean(axis=0), bootstrap.means(columns)))
    within_km = {threshold: next(estimates) for threshold in THRESHOLDS_KM}
    mean_km, mean_geoscore = next(estimates), next(estimates)
    place_accuracy = {level: next(estimates) for level in PLACE_LEVELS}
    coverage = next(estimates)
    leaves = outcomes.leaves
    return Figures(
        count=len(errors),
        within_km=within_km,
        median_km=_median(errors, bootstrap),
        mean_km=mean_km,
        geoscore=mean_geoscore,
        place_accuracy=place_accuracy,
        recall_vs_area=None if leaves is None else recall_vs_area(leaves.search_area_km2, bootstrap),
        calibration=None if leaves is None else calibration(leaves.probability, leaves.correct, bootstrap),
        radius_coverage=RadiusCoverage(coverage.value, coverage.interval, outcomes.radius_confidence),
        median_radius_km=_median(outcomes.radius_km, bootstrap),
    )


def geoscore(error_km: ArrayLike) -> NDArray[np.float64]:
    """GeoScores of distances, 0 to 5000."""
    return np.asarray(GEOSCORE_MAXIMUM * np.exp(-np.asarray(error_km, dtype=np.float64) / GEOSCORE_SCALE_KM))


def same_places(estimates: Sequence[City], truths: Sequence[City]) -> NDArray[np.bool_]:
    """Compares the places of estimates and truths.

    Args:
        estimates: Cities nearest to n estimates.
        truths: Cities nearest to the n truths.

    Returns:
        (n, 4) bool, columns as in `PLACE_LEVELS`.
    """
    depths = range(1, len(PLACE_LEVELS) + 1)
    names = zip(map(_names, estimates), map(_names, truths), strict=True)
    same = [[one[:depth] == other[:depth] for depth in depths] for one, other in names]
    return np.array(same, dtype=np.bool_).reshape(-1, len(PLACE_LEVELS))


def _names(city: City) -> tuple[str, ...]:
    return city.country_code, city.region, city.subregion, city.name


def search_area_km2(
    scores: NDArray[np.floating], area_km2: NDArray[np.float64], true_position: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Area to search until the truth is found: the leaves with at least the score of the one that holds it.

    Args:
        scores: (n, m) what the leaves of a query are ranked by, the largest first; -inf pads.
        area_km2: (n, m) areas of the leaves.
        true_position: (n,) column of the leaf that holds the truth; -1 where none of the row's does.

    Returns:
        (n,) square kilometres; infinite where the truth is in none of the leaves.
    """
    found = true_position >= 0
    true_score = np.where(found, scores[np.arange(len(scores)), true_position], np.inf)
    needed = (area_km2 * (scores >= true_score[:, np.newaxis])).sum(axis=1)
    return np.where(found, needed, np.inf)


def recall_vs_area(areas_km2: NDArray[np.float64], bootstrap: Bootstrap) -> RecallVsArea:
    """The curve of Recall vs Area and the area under it.

    Args:
        areas_km2: (n,) areas of `search_area_km2`.
        bootstrap: How the intervals are resampled.
    """
    within = areas_km2[:, np.newaxis] <= np.array(AREAS_KM2)
    # The integral of a step from an image's area on is the part of the axis that lies right of it.
    axis_start, axis_end = math.log(SMALLEST_AREA_KM2), math.log(EARTH_AREA_KM2)
    right = axis_end - np.log(np.clip(areas_km2, SMALLEST_AREA_KM2, EARTH_AREA_KM2))
    columns = np.column_stack([right / (axis_end - axis_start), within])
    area_under, *points = bootstrap.estimates(columns.mean(axis=0), bootstrap.means(columns))
    curve = tuple(CurvePoint(area, point.value, point.interval) for area, point in zip(AREAS_KM2, points, strict=True))
    return RecallVsArea(area_under.value, area_under.interval, curve)


def calibration(
    probability: NDArray[np.float64], correct: NDArray[np.bool_], bootstrap: Bootstrap, bins: int = CALIBRATION_BINS
) -> CalibrationError:
    """Expected calibration error, with the bins that it is made of.

    Args:
        probability: (n,) probabilities of the answers given, in [0, 1].
        correct: (n,) whether each answer was right.
        bootstrap: How the interval is resampled.
        bins: Number of bins.
    """
    count = len(probability)
    rows = np.minimum((probability * bins).astype(np.int64), bins - 1)
    gaps = np.zeros((count, bins))
    gaps[np.arange(count), rows] = probability - correct
    value = np.abs(gaps.mean(axis=0)).sum(keepdims=True)
    (error,) = bootstrap.estimates(value, np.abs(bootstrap.means(gaps)).sum(axis=1, keepdims=True))
    counts = np.bincount(rows, minlength=bins)
    confidences = np.bincount(rows, weights=probability, minlength=bins)
    hits = np.bincount(rows, weights=correct, minlength=bins)
    kept = tuple(
        CalibrationBin(int(counts[row]), float(confidences[row] / counts[row]), float(hits[row] / counts[row]))
        for row in np.flatnonzero(counts).tolist()
    )
    return CalibrationError(error.value, error.interval, kept)


def _median(values: NDArray[np.float64], bootstrap: Bootstrap) -> Estimate:
    samples = bootstrap.medians(values)[:, np.newaxis]
    return bootstrap.estimates(np.median(values, keepdims=True), samples)[0]
