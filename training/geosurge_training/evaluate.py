"""Measures a bundle on held-out images, through the same locator that serves it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from geosurge.errors import InputError
from geosurge.geodesy import great_circle_km
from geosurge.location import LocateOptions
from geosurge.locator import Locator
from geosurge_training.blue_marble import BlueMarble
from geosurge_training.progress import track

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
    """

    index_version: str
    count: int
    within_km: dict[str, float]
    median_km: float
    mean_km: float
    radius_coverage: float
    confidence_level: float
    median_radius_km: float

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON-ready values."""
        return asdict(self)


def evaluate_views(bundle: Path, *, views: int, seed: int, exact: bool = False) -> Evaluation:
    """Locates held-out views of the Blue Marble world.

    Args:
        bundle: Bundle or store.
        views: Number of views.
        seed: Seed of the views.
        exact: Search every leaf instead of the bundle's default beam.

    Returns:
        The figures.

    Raises:
        BundleError: The bundle cannot be used.
        ConfigurationError: The maps are not installed.
    """
    options = LocateOptions(exact=exact)
    errors_km: list[float] = []
    radii_km: list[float] = []
    with Locator.open(bundle) as locator:
        world = BlueMarble(locator.encoder.image_size)
        with track("evaluate", -(-views // _BATCH_SIZE)) as progress:
            for batch in world.held_out(views, seed, _BATCH_SIZE):
                embeddings = locator.encode(batch.pixels.numpy())
                answers = locator.locate_embeddings(embeddings, [options] * len(embeddings))
                for row, answer in enumerate(answers):
                    if isinstance(answer, InputError):
                        raise answer
                    truth = batch.latitude_deg[row], batch.longitude_deg[row]
                    errors_km.append(float(great_circle_km(*truth, answer.latitude_deg, answer.longitude_deg)))
                    radii_km.append(answer.radius_km)
                progress.advance()
        return summarise(locator.index_version, np.array(errors_km), np.array(radii_km), options.confidence_level)


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
