"""What training draws its images from: an interface, and the batches that every source gives.

A batch is a pure function of the source's seed and the step, so that a run resumes exactly wherever it was cut, with no
iterator state to save.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True)
class Batch:
    """Images with the coordinates that they were taken at.

    Attributes:
        pixels: (n, 3, s, s) uint8, canonical pixels of the encoder that is trained.
        latitude_deg: (n,) float64.
        longitude_deg: (n,) float64.
    """

    pixels: torch.Tensor
    latitude_deg: npt.NDArray[np.float64]
    longitude_deg: npt.NDArray[np.float64]


class ImageSource(Protocol):
    """Images with coordinates, split into a training part and a held-out part."""

    def coordinate_chunks(self) -> Iterable[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
        """Coordinates of the training part as (latitude_deg, longitude_deg) chunks; can be iterated again and again."""
        ...

    def train_batch(self, step: int, batch_size: int) -> Batch:
        """The training batch of one step; the same step always gives the same batch."""
        ...

    def held_out(self, count: int, seed: int, batch_size: int) -> Iterator[Batch]:
        """Batches of the held-out part, `count` images at most in all; the same seed always gives the same images."""
        ...
