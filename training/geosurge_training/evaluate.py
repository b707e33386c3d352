"""Measures a bundle on held-out images, through the same locator that serves it."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from geosurge.errors import ConfigurationError, InputError
from geosurge.geodesy import great_circle_km
from geosurge.location import LocateOptions, Location
from geosurge.locator import Locator
from geosurge_training.blue_marble import BlueMarble
from geosurge_training.csv_images import read_image_table
from geosurge_training.progress import track

_LOGGER = logging.getLogger(__name__)
BLUE_MARBLE = "blue_marble"
"""How the training of a bundle is described when its data was the Blue Marble world."""
THRESHOLDS_KM = (25, 200, 750, 2500)
_BATCH_SIZE = 200


@dataclass(frozen=True)
class Evaluation:
    """Figures of one bundle on one set of images.

    Distances are great-circle kilometres on a sphere of radius 6371.0088 km; "within" includes the threshold.

    Attributes:
        index_version: Name of the bundle.
        count: Images located.
        within_km: Share of the images located within each threshold.
        median_km: Median distance from truth to estimate.
        mean_km: Mean distance.
        radius_coverage: Share of the images whose truth lies inside the radius of the confidence level.
        confidence_level: The nominal coverage.
        median_radius_km: Median radius.
        failed: Images that could not be located; they are in none of the other figures.
    """

    index_version: str
    count: int
    within_km: dict[str, float]
    median_km: float
    mean_km: float
    radius_coverage: float
    confidence_level: float
    median_radius_km: float
    failed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON-ready values."""
        return asdict(self)


def evaluate_views(bundle: Path, *, views: int, seed: int, exact: bool = False, device: str = "cpu") -> Evaluation:
    """Locates held-out views of the Blue Marble world.

    Args:
        bundle: Bundle or store; it must have been trained on that world.
        views: Number of views.
        seed: Seed of the views.
        exact: Search every leaf instead of the bundle's default beam.
        device: Torch device of the encoder.

    Returns:
        The figures.

    Raises:
        BundleError: The bundle cannot be used.
        ConfigurationError: The bundle was trained on something else, or the maps are not installed.
    """
    options = LocateOptions(exact=exact)
    tally = _Tally()
    with Locator.open(bundle, device) as locator:
        if not locator.manifest.domain.training.startswith(BLUE_MARBLE):
            raise ConfigurationError(
                f"index version {locator.index_version!r} was not trained on the Blue Marble world but on "
                f"{locator.manifest.domain.training!r}; evaluate it on pictures with --dataset"
            )
        world = BlueMarble(locator.encoder.image_size)
        with track("evaluate", -(-views // _BATCH_SIZE)) as progress:
            for batch in world.held_out(views, seed, _BATCH_SIZE):
                embeddings = locator.encode(batch.pixels.numpy())
                answers = locator.locate_embeddings(embeddings, [options] * len(embeddings))
                for row, answer in enumerate(answers):
                    tally.add(answer, float(batch.latitude_deg[row]), float(batch.longitude_deg[row]))
                progress.advance()
        return tally.summarise(locator.index_version, options.confidence_level)


def evaluate_images(
    bundle: Path, csv_path: Path, images: Path | None = None, *, exact: bool = False, device: str = "cpu"
) -> Evaluation:
    """Locates pictures on disk whose coordinates are known.

    They should be none that the bundle was trained or calibrated on.

    Args:
        bundle: Bundle or store.
        csv_path: CSV file with the columns `path`, `latitude_deg`, `longitude_deg`.
        images: Folder that relative paths start from; default the CSV file's own.
        exact: Search every leaf instead of the bundle's default beam.
        device: Torch device of the encoder.

    Returns:
        The figures over the pictures that could be located; the others are logged and counted in `failed`.

    Raises:
        BundleError: The bundle cannot be used.
        ConfigurationError: The CSV file cannot be used, or no picture could be located.
    """
    paths, latitudes_deg, longitudes_deg = read_image_table(csv_path)
    folder = images or csv_path.parent
    options = LocateOptions(exact=exact)
    tally = _Tally()
    with Locator.open(bundle, device) as locator:
        with track("evaluate", -(-len(paths) // _BATCH_SIZE)) as progress:
            for start in range(0, len(paths), _BATCH_SIZE):
                part = slice(start, start + _BATCH_SIZE)
                answers = locator.locate([folder / path for path in paths[part]], options)
                truths = zip(latitudes_deg[part].tolist(), longitudes_deg[part].tolist(), strict=True)
                for answer, (latitude_deg, longitude_deg) in zip(answers, truths, strict=True):
                    tally.add(answer, latitude_deg, longitude_deg)
                progress.advance()
        return tally.summarise(locator.index_version, options.confidence_level)


class _Tally:
    """Distances and radii, collected answer by answer."""

    def __init__(self) -> None:
        self._errors_km: list[float] = []
        self._radii_km: list[float] = []
        self._failed = 0

    def add(self, answer: Location | InputError, latitude_deg: float, longitude_deg: float) -> None:
        if isinstance(answer, InputError):
            _LOGGER.warning("not located: %s", answer)
            self._failed += 1
            return
        distance = great_circle_km(latitude_deg, longitude_deg, answer.latitude_deg, answer.longitude_deg)
        self._errors_km.append(float(distance))
        self._radii_km.append(answer.radius_km)

    def summarise(self, index_version: str, confidence_level: float) -> Evaluation:
        if not self._errors_km:
            raise ConfigurationError(f"none of {self._failed} pictures could be located; the log says why")
        figures = summarise(index_version, np.array(self._errors_km), np.array(self._radii_km), confidence_level)
        return replace(figures, failed=self._failed)


def summarise(
    index_version: str,
    errors_km: npt.NDArray[np.float64],
    radii_km: npt.NDArray[np.float64],
    confidence_level: float,
) -> Evaluation:
    """Turns distances and radii into figures.

    Args:
        index_version: Name of the bundle.
        errors_km: (n,) distances from truth to estimate, n at least 1.
        radii_km: (n,) radii of the answers.
        confidence_level: What the radii were asked for.

    Returns:
        The figures.
    """
    return Evaluation(
        index_version=index_version,
        count=len(errors_km),
        within_km={str(threshold): float(np.mean(errors_km <= threshold)) for threshold in THRESHOLDS_KM},
        median_km=float(np.median(errors_km)),
        mean_km=float(errors_km.mean()),
        radius_coverage=float(np.mean(errors_km <= radii_km)),
        confidence_level=confidence_level,
        median_radius_km=float(np.median(radii_km)),
    )
