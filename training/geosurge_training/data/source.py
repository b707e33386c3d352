"""What training draws its images from: an interface, and the batches that every source gives.

A batch is a pure function of the source's seed and the step, so that a run resumes exactly wherever it was cut, with no
iterator state to save.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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

    def cut(self, rows: slice) -> Batch:
        """Some of the images, in their order."""
        return Batch(self.pixels[rows], self.latitude_deg[rows], self.longitude_deg[rows])


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
        kept = batch.cut(slice(count - given - waiting))
        pending.append(kept)
        waiting += len(kept.pixels)
        ready = waiting if given + waiting == count else waiting - waiting % batch_size
        if ready:
            joined = _join(pending)
            for start in range(0, ready, batch_size):
                yield joined.cut(slice(start, min(start + batch_size, ready)))
            pending, waiting, given = [joined.cut(slice(ready, waiting))], waiting - ready, given + ready
        if given == count:
            return
    if waiting:
        yield _join(pending)


def _join(batches: list[Batch]) -> Batch:
    return Batch(
        torch.cat([batch.pixels for batch in batches]),
        np.concatenate([batch.latitude_deg for batch in batches]),
        np.concatenate([batch.longitude_deg for batch in batches]),
    )


class ImageSource(Protocol):
    """Images with coordinates, split into a training part and a held-out part."""

    @property
    def train_count(self) -> int | None:
        """Images of the training part: an epoch is `train_count / batch_size` steps. None where they never repeat."""
        ...

    @property
    def held_out_count(self) -> int | None:
        """Images of the held-out part; None where there are as many as anybody asks for."""
        ...

    def coordinate_chunks(self) -> Iterable[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
        """Coordinates of the training part as (latitude_deg, longitude_deg) chunks; can be iterated again and again."""
        ...

    def train_batch(self, step: int, batch_size: int, rows: slice | None = None) -> Batch:
        """The training batch of one step; the same step always gives the same batch.

        Args:
            step: The step, from 0 on.
            batch_size: Images in the whole batch.
            rows: The part of it that is wanted, by default all: processes that train together share a batch.

        Returns:
            As many images as were asked for, whatever cannot be read.
        """
        ...

    def held_out(self, count: int, seed: int, batch_size: int) -> Iterator[Batch]:
        """Batches of the held-out part, `count` images at most in all.

        The same seed always gives the same images in the same order, however they are cut into batches; a larger count
        only adds some at the end.
        """
        ...


@runtime_checkable
class NumberedSource(ImageSource, Protocol):
    """A source whose training part is a fixed set of images that have numbers, from 0 to `train_count`."""

    def train_numbers(self, step: int, batch_size: int, rows: slice | None = None) -> npt.NDArray[np.int64]:
        """Numbers of the images that `train_batch` gives for the same arguments, as far as is known.

        What stands in for an image that was found unusable has its own number; one that nobody has looked at is taken
        for usable.
        """
        ...

    def unusable_numbers(self) -> npt.NDArray[np.int64]:
        """Numbers of the images that have been found unusable so far, ascending."""
        ...

    def skip(self, numbers: npt.NDArray[np.int64]) -> None:
        """Takes images for unusable from now on, without a look at them: what was found before holds."""
        ...

    def unusable_count(self, epoch: int) -> int:
        """Images of an epoch, from 0 on, that were found unusable when this process asked for them, once a step."""
        ...

    def check_unusable_count(self, count: int) -> None:
        """Checks how many images were found unusable in an epoch by all processes together.

        Args:
            count: Sum of `unusable_count`; less than there are where a run was cut off in the epoch, which is no error.

        Raises:
            ConfigurationError: They are more than are allowed.
        """
        ...

    def train_digest(self) -> str:
        """SHA-256 over names and coordinates of the training images in the order of their numbers.

        No image is read: pictures that were exchanged under their names go unnoticed.
        """
        ...


def prefetch(
    source: ImageSource, steps: range, batch_size: int, rows: slice | None = None, *, ahead: int = 2
) -> Generator[Batch, None, None]:
    """Training batches, read while the ones before them are trained on.

    Memory is bounded by `ahead` batches beside the one given; the batches are those that `train_batch` gives.

    Args:
        source: The images.
        steps: Steps to give the batches of.
        batch_size: Images in the whole batch.
        rows: The part of each batch that is wanted, by default all.
        ahead: Batches that are read before they are asked for.

    Yields:
        A batch for each step, in order; an error of a batch is raised where the batch would be.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as loader:
        loading: deque[Future[Batch]] = deque()
        try:
            for step in steps:
                loading.append(loader.submit(source.train_batch, step, batch_size, rows))
                if len(loading) > ahead:
                    yield loading.popleft().result()
            while loading:
                yield loading.popleft().result()
        finally:
            for batch in loading:
                batch.cancel()
