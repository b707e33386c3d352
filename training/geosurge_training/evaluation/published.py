"""Published results on the benchmarks, to be printed beside a run's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

GEOSURGE: Final = "GeoSURGE, arXiv 2510.01448 (CVPR 2026)"
GEOCLIP: Final = "GeoCLIP, NeurIPS 2023"
PIGEOTTO: Final = "PIGEOTTO, arXiv 2307.05845 (CVPR 2024)"
REVISITING: Final = "Revisiting IM2GPS in the Deep Learning Era, ICCV 2017"
G3: Final = "G3, arXiv 2405.14702 (NeurIPS 2024)"
PINPOINT: Final = "Pinpoint, arXiv 2606.04133"
HIERLOC: Final = "HierLoc, arXiv 2601.23064 (ICLR 2026)"
OSV5M_BASELINE: Final = "OpenStreetView-5M baseline, huggingface.co/osv5m/baseline (CVPR 2024)"


@dataclass(frozen=True)
class PublishedResult:
    """What one publication reports on one benchmark.

    Attributes:
        benchmark: Name in `datasets.BENCHMARKS`.
        source: The publication.
        within_percent: Percentage of the images located within so many kilometres.
        geoscore: Mean GeoScore.
        mean_km: Mean error.
        place_percent: Percentage of the images in the right country, region, subregion or city.
    """

    benchmark: str
    source: str
    within_percent: Mapping[int, float] = field(default_factory=dict)
    geoscore: float | None = None
    mean_km: float | None = None
    place_percent: Mapping[str, float] = field(default_factory=dict)


PUBLISHED_RESULTS: Final = (
    PublishedResult("im2gps", GEOSURGE, {1: 27.0, 2500: 93.2}),
    PublishedResult("im2gps3k", GEOSURGE, {1: 17.2, 25: 42.5, 200: 58.1, 750: 74.6, 2500: 87.6}),
    PublishedResult("im2gps3k", PINPOINT, {1: 20.5, 25: 47.4, 200: 63.5, 750: 79.0, 2500: 90.2}),
    PublishedResult("im2gps3k", G3, {1: 16.7, 25: 40.9, 200: 55.6, 750: 71.2, 2500: 84.7}),
    PublishedResult("im2gps3k", GEOCLIP, {1: 14.1, 25: 34.5, 200: 50.7, 750: 69.7, 2500: 83.8}),
    PublishedResult("im2gps3k", PIGEOTTO, {1: 11.3, 25: 36.7, 200: 53.8, 750: 72.4, 2500: 85.3}),
    PublishedResult("im2gps3k", REVISITING, {1: 7.2, 25: 19.4, 200: 26.9, 750: 38.9, 2500: 55.9}),
    PublishedResult("yfcc4k", GEOSURGE, {1: 19.9, 25: 33.6, 200: 48.7, 750: 67.4, 2500: 82.0}),
    PublishedResult("yfcc26k", GEOSURGE, {1: 17.8, 25: 31.5}),
    PublishedResult("gws15k", GEOSURGE, {1: 1.0, 25: 4.6, 200: 21.9, 750: 54.7, 2500: 80.8}),
    PublishedResult(
        "osv5m",
        HIERLOC,
        geoscore=3963.0,
        mean_km=861.0,
        place_percent={"country": 82.9, "region": 55.0, "subregion": 40.7, "city": 23.3},
    ),
    PublishedResult(
        "osv5m", OSV5M_BASELINE, geoscore=3361.0, mean_km=1814.0, place_percent={"country": 68.0, "region": 39.4}
    ),
)


def published_results(benchmark: str) -> list[PublishedResult]:
    """What is published on a benchmark, by its name in `datasets.BENCHMARKS`."""
    return [result for result in PUBLISHED_RESULTS if result.benchmark == benchmark]
