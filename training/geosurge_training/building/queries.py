"""Held-out images as queries: the leaves that a bundle's beam reaches for each, and which of them holds the truth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from geosurge.errors import ConfigurationError
from geosurge.locator import REACHED_LEAVES
from geosurge.search import HierarchicalIndex
from geosurge_training.building.embedded import EmbeddedBatch
from geosurge_training.partitions.entities import LeafFinder
from geosurge_training.recipe import MIN_CALIBRATION_IMAGES


@dataclass(frozen=True)
class Queries:
    """n held-out images, the m leaves that the beam reached for each, and the truth.

    Attributes:
        embeddings: (n, d) float32, unit rows.
        ordinals: (n, m) leaves, best first; -1 pads.
        scores: (n, m) their composite scores; -inf pads.
        latitude_deg: (n,) true latitudes.
        longitude_deg: (n,) true longitudes.
        true_positions: (n,) positions of the true leaf among those reached; -1 where it was not.
    """

    embeddings: npt.NDArray[np.float32]
    ordinals: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    latitude_deg: npt.NDArray[np.float64]
    longitude_deg: npt.NDArray[np.float64]
    true_positions: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.scores)

    def cut(self, start: int, stop: int) -> Queries:
        """Some of them."""
        return Queries(*(getattr(self, field.name)[start:stop] for field in fields(self)))


def search_held_out(
    held_out: Iterable[EmbeddedBatch], index: HierarchicalIndex, width: int, find_leaf: LeafFinder
) -> Queries:
    """Searches a bundle for held-out images.

    Args:
        held_out: The images.
        index: The bundle's indexes.
        width: Its default beam width.
        find_leaf: Which of its leaves holds a coordinate.

    Returns:
        The queries, in the order of the images.

    Raises:
        ConfigurationError: There are fewer than `MIN_CALIBRATION_IMAGES`, or the beam reaches the true leaf of none.
    """
    parts = []
    for batch in held_out:
        hits = index.search(batch.embeddings, width=width, k=REACHED_LEAVES)
        coordinates = batch.latitude_deg, batch.longitude_deg
        positions = hits.positions_of(find_leaf(*coordinates))
        parts.append((batch.embeddings, hits.ordinals, hits.scores, *coordinates, positions))
    count = sum(len(part[0]) for part in parts)
    if count < MIN_CALIBRATION_IMAGES:
        raise ConfigurationError(
            f"{count} held-out images are too few to calibrate on, {MIN_CALIBRATION_IMAGES} is the least: hold out more"
        )
    queries = Queries(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    if (queries.true_positions < 0).all():
        raise ConfigurationError(
            f"of none of {count} held-out images does the search reach the leaf that holds it, so that nothing says "
            "how far to trust a score: hold out images of the places that there are training images of, or train longer"
        )
    return queries
