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


def rebatch(batches: Iterable[Batch], count: int, batch_size: int) -> Iterator[Batch]:
    """Cuts a stream of batches anew.

    Args:
        batches: Batches of any sizes; read only as far as needed.
        count: Images to give in all, at most.
        batch_size: Images in each batch but the last.

    Yields:
        Batches of the first `count` images of the stream, in order.
    """
    pending: list[Batch] = []
    waiting = given = 0
    for batch in batches:
        kept = _cut(batch, 0, count - given - waiting)
        pending.append(kept)
        waiting += len(kept.pixels)
        ready = waiting if given + waiting == count else waiting - waiting % batch_size
        if ready:
            joined = _join(pending)
            for start in range(0, ready, batch_size):
                yield _cut(joined, start, min(start + batch_size, ready))
            pending, waiting, given = [_cut(joined, ready, waiting)], waiting - ready, given + ready
        if given == count:
            return
    if waiting:
        yield _join(pending)


def _cut(batch: Batch, start: int, end: int) -> Batch:
    rows = slice(start, end)
    return Batch(batch.pixels[rows], batch.latitude_deg[rows], batch.longitude_deg[rows])


def _join(batches: list[Batch]) -> Batch:
    return Batch(
        torch.cat([batch.pixels for batch in batches]),
        np.concatenate([batch.latitude_deg for batch in batches]),
        np.concatenate([batch.longitude_deg for batch in batches]),
    )


class ImageSource(Protocol):
    """Images with coordinates, split into a training part and a held-out part."""

    def coordinate_chunks(self) -> Iterable[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
        """Coordinates of the training part as (latitude_deg, longitude_deg) chunks; can be iterated again and again."""
        ...

    def train_batch(self, step: int, batch_size: int) -> Batch:
        """The training batch of one step; the same step always gives the same batch."""
        ...

    def held_out(self, count: int, seed: int, batch_size: int) -> Iterator[Batch]:
        """Batches of the held-out part, `count` images at most in all.

        The same seed always gives the same images in the same order, however they are cut into batches; a larger count
        only adds some at the end.
        """
        ...
