"""Images as embeddings, which is all that an index needs of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from geosurge.encoder import ImageEncoder
from geosurge_training.data.source import Batch


@dataclass(frozen=True)
class EmbeddedBatch:
    """Embedded images with the coordinates that they were taken at.

    Attributes:
        embeddings: (n, d) float32, unit rows.
        latitude_deg: (n,) float64.
        longitude_deg: (n,) float64.
    """

    embeddings: npt.NDArray[np.float32]
    latitude_deg: npt.NDArray[np.float64]
    longitude_deg: npt.NDArray[np.float64]


def embed(batches: Iterable[Batch], encoder: ImageEncoder) -> Iterator[EmbeddedBatch]:
    """Embeds images, batch by batch."""
    for batch in batches:
        yield EmbeddedBatch(encoder.encode(batch.pixels.numpy()), batch.latitude_deg, batch.longitude_deg)
