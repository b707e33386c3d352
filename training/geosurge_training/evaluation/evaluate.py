"""Measures a bundle on images whose coordinates are known, through the same locator that serves it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from geosurge.bundle.manifest import PointEstimator
from geosurge.errors import ConfigurationError, InputError
from geosurge.geodesy import great_circle_km
from geosurge.images import OWN_LIMITS, read_image_bytes
from geosurge.location import LocateOptions, Location
from geosurge.locator import Locator
from geosurge.preprocessing import CROP_SHARE, CropCount
from geosurge_training.data.blue_marble import SOURCE_NAME, BlueMarble
from geosurge_training.evaluation.bootstrap import DEFAULT_BOOTSTRAP, Bootstrap
from geosurge_training.evaluation.datasets import Benchmark, Dataset
from geosurge_training.evaluation.metrics import (
    Figures,
    LeafOutcomes,
    Outcomes,
    same_places,
    search_area_km2,
    summarise,
)
from geosurge_training.evaluation.published import published_results
from geosurge_training.partitions.leaf_finder import leaf_finder
from geosurge_training.places import nearest_cities
from geosurge_training.progress import track

_LOGGER = logging.getLogger(__name__)
_BATCH_SIZE = 64


@dataclass(frozen=True)
class EvaluationOptions:
    """How a bundle is asked, and how its answers become figures.

    Attributes:
        exact: Search every leaf instead of the bundle's default beam.
        point_estimator: What makes the points; by default what the bundle was calibrated with.
        crops: Squares of each image whose predictions are averaged; of views, those of somewhat larger renderings of
            the same ground.
        device: Torch device of encoder and index.
        bootstrap: How intervals are resampled.
    """

    exact: bool = False
    point_estimator: PointEstimator | None = None
    crops: CropCount = 1
    device: str = "cpu"
    bootstrap: Bootstrap = DEFAULT_BOOTSTRAP

    def open(self, bundle: Path) -> Locator:
        """Opens a bundle to be asked so; see `Locator.open`."""
        return Locator.open(bundle, self.device, limits=OWN_LIMITS, point_estimator=self.point_estimator)


DEFAULT_OPTIONS: Final = EvaluationOptions()


@dataclass(frozen=True)
class Evaluation:
    """Figures of one bundle on one set of images.

    Attributes:
        index_version: Name of the bundle.
        material: What it was measured on.
        benchmark: The published benchmark that this is, if any.
        options: How.
        point_estimator: What made the points.
        figures: The figures, over the images that could be located.
        outcomes: What they were computed from.
        failures: How many images could not be located, by the reason of the error.
    """

    index_version: str
    material: str
    benchmark: Benchmark | None
    options: EvaluationOptions
    point_estimator: PointEstimator
    figures: Figures
    outcomes: Outcomes
    failures: dict[str, int]

    @property
    def failed(self) -> int:
        """Images that could not be located; they are in none of the figures."""
        return sum(self.failures.values())

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON-ready values: each with its `interval` beside it."""
        published = [] if self.benchmark is None else published_results(self.benchmark.name)
        return {
            "index_version": self.index_version,
            "material": self.material,
            "benchmark": None if self.benchmark is None else self.benchmark.name,
            "exact": self.options.exact,
            "point_estimator": self.point_estimator,
            "crops": self.options.crops,
            **asdict(self.figures),
            "failed": self.failed,
            "failures": self.failures,
            "bootstrap": asdict(self.options.bootstrap),
            "published": [asdict(result) for result in published],
        }


def evaluate_views(
    bundle: Path,
    *,
    views: int,
    seed: int,
    options: EvaluationOptions = DEFAULT_OPTIONS,
) -> Evaluation:
    """Locates held-out views of the Blue Marble world.

    Args:
        bundle: Bundle or store; it must have been trained on that world.
        views: Number of views.
        seed: Seed of the views.
        options: How.

    Returns:
        The figures.

    Raises:
        BundleError: The bundle cannot be used.
        UsageError: It has no gallery for the point estimator.
        ConfigurationError: The bundle was trained on something else or calibrated on these very views, or the maps or
            the places are not installed.
    """
    with options.open(bundle) as locator:
        if not locator.manifest.domain.training.startswith(SOURCE_NAME):
            raise ConfigurationError(
                f"index version {locator.index_version!r} was not trained on the Blue Marble world but on "
                f"{locator.manifest.domain.training!r}; evaluate it on pictures with --dataset"
            )
        calibration = locator.manifest.calibration
        # As `calibrate` words it: the views of a seed are the same however many there are.
        if calibration is not None and calibration.source.endswith(f"held-out images of {SOURCE_NAME}, seed {seed}"):
            raise ConfigurationError(
                f"index version {locator.index_version!r} was calibrated on the views of seed {seed} "
                f"({calibration.source}), which would flatter it; give another --seed"
            )
        tally, crops = _Tally(locator, options), options.crops
        size, batch_size = locator.encoder.image_size, max(_BATCH_SIZE // crops, 1)
        # The centre crop then has the size of a whole view, and nothing is enlarged.
        world = BlueMarble(size if crops == 1 else round(size / CROP_SHARE))
        with track("evaluate", -(-views // batch_size)) as progress:
            for batch in world.held_out(views, seed, batch_size):
                pictures = map(Image.fromarray, batch.pixels.numpy().transpose(0, 2, 3, 1))
                pixels = [locator.encoder.preprocessing.crops(picture, crops) for picture in pictures]
                tally.add(pixels, batch.latitude_deg, batch.longitude_deg)
                progress.advance()
        return tally.evaluation(f"held-out views of the Blue Marble world, seed {seed}", None)


def evaluate_images(
    bundle: Path,
    dataset: Dataset,
    options: EvaluationOptions = DEFAULT_OPTIONS,
) -> Evaluation:
    """Locates pictures on disk whose coordinates are known.

    They should be none that the bundle was trained or calibrated on: nothing in a bundle tells which those were, and
    its figures on them are too good.

    Args:
        bundle: Bundle or store.
        dataset: The pictures.
        options: How.

    Returns:
        The figures over the pictures that could be located; the others are logged, and counted in `failures`.

    Raises:
        BundleError: The bundle cannot be used.
        UsageError: It has no gallery for the point estimator.
        EncoderMissingError: It has no encoder.
        ConfigurationError: No picture could be located, or the places are not installed.
    """
    with (
        options.open(bundle) as locator,
        ThreadPoolExecutor(max_workers=4) as pool,
    ):
        tally, crops = _Tally(locator, options), options.crops
        batch_size = max(_BATCH_SIZE // crops, 1)
        with track("evaluate", -(-len(dataset.images) // batch_size)) as progress:
            for start in range(0, len(dataset.images), batch_size):
                rows = slice(start, start + batch_size)
                pixels = list(pool.map(lambda path: _pixels(locator, path, crops), dataset.images[rows]))
                tally.add(pixels, dataset.latitude_deg[rows], dataset.longitude_deg[rows])
                progress.advance()
        return tally.evaluation(dataset.title, dataset.benchmark)


def _pixels(locator: Locator, path: Path, crops: CropCount) -> NDArray[np.uint8] | InputError:
    try:
        data = read_image_bytes(path, locator.limits)
        return locator.encoder.preprocessing.decode_crops(data, crops, locator.limits)
    except InputError as error:
        _LOGGER.warning("%s is not located: %s", path, error)
        return error


class _Tally:
    """Answers and truths, collected batch by batch."""

    def __init__(self, locator: Locator, options: EvaluationOptions) -> None:
        # A bundle without an encoder must not look like one on which every image fails.
        self._encoder = locator.encoder
        self._locator = locator
        self._options = options
        self._asked = LocateOptions(top_k=1, exact=options.exact)
        self._find_leaf = leaf_finder(locator.tree)
        self._answers: list[Location] = []
        self._truths: list[tuple[float, float]] = []
        self._leaves: list[LeafOutcomes] = []
        self._failures: Counter[str] = Counter()

    def add(
        self,
        pixels: Sequence[NDArray[np.uint8] | InputError],
        latitude_deg: NDArray[np.float64],
        longitude_deg: NDArray[np.float64],
    ) -> None:
        """Locates images, each (crops, 3, s, s), or counts the errors that stand in their places."""
        decoded = [item for item in pixels if not isinstance(item, InputError)]
        self._failures.update(item.reason for item in pixels if isinstance(item, InputError))
        if not decoded:
            return
        rows = [row for row, item in enumerate(pixels) if not isinstance(item, InputError)]
        embeddings = self._encoder.encode(np.concatenate(decoded)).reshape(len(decoded), self._options.crops, -1)
        located: list[int] = []
        for position, answer in enumerate(self._locator.locate_embeddings(embeddings, [self._asked] * len(rows))):
            if isinstance(answer, InputError):
                _LOGGER.warning("an image is not located: %s", answer)
                self._failures[answer.reason] += 1
                continue
            located.append(position)
            self._answers.append(answer)
            self._truths.append((float(latitude_deg[rows[position]]), float(longitude_deg[rows[position]])))
        if located and self._find_leaf is not None:
            truths = np.array(self._truths[-len(located) :])
            true_leaves = self._find_leaf(truths[:, 0], truths[:, 1])
            probabilities = np.array([answer.probability for answer in self._answers[-len(located) :]])
            self._leaves.append(self._leaf_outcomes(embeddings[located], true_leaves, probabilities))

    def evaluation(self, material: str, benchmark: Benchmark | None) -> Evaluation:
        """The figures of all images added."""
        if not self._answers:
            raise ConfigurationError(
                f"none of {self._failures.total()} pictures could be located; the log says why of each"
            )
        outcomes = self._outcomes()
        return Evaluation(
            index_version=self._locator.index_version,
            material=material,
            benchmark=benchmark,
            options=self._options,
            point_estimator=self._locator.manifest.point_estimator,
            figures=summarise(outcomes, self._options.bootstrap),
            outcomes=outcomes,
            failures=dict(self._failures),
        )

    def _outcomes(self) -> Outcomes:
        estimates = np.array([(answer.latitude_deg, answer.longitude_deg) for answer in self._answers])
        truths = np.array(self._truths)
        try:
            same_place = same_places(nearest_cities(*estimates.T), nearest_cities(*truths.T))
        except ImportError as error:
            raise ConfigurationError(str(error)) from error
        return Outcomes(
            error_km=great_circle_km(*estimates.T, *truths.T),
            radius_km=np.array([answer.radius_km for answer in self._answers]),
            radius_confidence=self._asked.confidence_level,
            same_place=same_place,
            leaves=_join(self._leaves) if self._leaves else None,
        )

    def _leaf_outcomes(
        self, embeddings: NDArray[np.float32], true_leaves: NDArray[np.int64], probabilities: NDArray[np.float64]
    ) -> LeafOutcomes:
        hits = self._locator.search(embeddings, self._asked)
        area_km2 = self._locator.tree.leaves.area_km2.take(hits.ordinals)
        positions = hits.positions_of(true_leaves)
        return LeafOutcomes(probabilities, positions == 0, search_area_km2(hits.scores, area_km2, positions))


def _join(parts: Sequence[LeafOutcomes]) -> LeafOutcomes:
    return LeafOutcomes(
        np.concatenate([part.probability for part in parts]),
        np.concatenate([part.correct for part in parts]),
        np.concatenate([part.search_area_km2 for part in parts]),
    )
