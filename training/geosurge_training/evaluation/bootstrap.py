"""Confidence intervals by the percentile bootstrap (Efron 1979): how far a figure would move with other images.

A resample draws as many images as there are, with replacement; the interval of a figure is between two quantiles of
its values over the resamples. A figure that is a mean over images, or a function of such means, needs only how often
each image was drawn, so that all resamples of all figures are one matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

_BLOCK_DRAWS: Final = 1 << 22
"""Draws held at once: bounds memory to some hundred megabytes whatever the number of images."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its confidence interval.

    Attributes:
        value: The figure.
        interval: Lower and upper end.
    """

    value: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Bootstrap:
    """How figures are resampled; the same seed always gives the same resamples.

    Attributes:
        resamples: Number of resamples, at least 1.
        confidence_level: Nominal coverage of the intervals, in (0, 1).
        seed: Seed of the draws.
    """

    resamples: int = 1000
    confidence_level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise ValueError(f"resamples is {self.resamples}; it must be at least 1")
        if not 0.0 < self.confidence_level < 1.0:
            raise ValueError(f"confidence_level is {self.confidence_level}; it must be greater than 0 and less than 1")

    def draws(self, count: int) -> Iterator[NDArray[np.int64]]:
        """Resamples of images, block by block.

        Args:
            count: Number n of images, at least 1.

        Yields:
            (b, n) int64 rows of images; the b of all blocks add up to `resamples`.
        """
        rng = np.random.default_rng(self.seed)
        block = max(1, _BLOCK_DRAWS // count)
        for start in range(0, self.resamples, block):
            yield rng.integers(0, count, (min(block, self.resamples - start), count))

    def means(self, values: ArrayLike) -> NDArray[np.float64]:
        """Means of each column over each resample.

        Args:
            values: (n, k), n at least 1.

        Returns:
            (resamples, k) float64.
        """
        columns = np.asarray(values, dtype=np.float64)
        count = len(columns)
        blocks = []
        for rows in self.draws(count):
            flat = rows + count * np.arange(len(rows))[:, np.newaxis]
            times = np.bincount(flat.reshape(-1), minlength=rows.size).reshape(rows.shape)
            blocks.append(times @ columns / count)
        return np.concatenate(blocks)

    def medians(self, values: ArrayLike) -> NDArray[np.float64]:
        """Medians over each resample.

        Args:
            values: (n,), n at least 1.

        Returns:
            (resamples,) float64.
        """
        column = np.asarray(values, dtype=np.float64)
        count = len(column)
        order = np.argsort(column)
        ascending = column[order]
        rank_of = np.empty(count, dtype=np.int64)
        rank_of[order] = np.arange(count)
        middle = [(count - 1) // 2, count // 2]
        blocks = []
        for rows in self.draws(count):
            ranks = rank_of[rows]
            ranks.partition(middle, axis=1)
            blocks.append(ascending[ranks[:, middle]].mean(axis=1))
        return np.concatenate(blocks)

    def intervals(self, samples: NDArray[np.float64]) -> NDArray[np.float64]:
        """Percentile intervals.

        Args:
            samples: (resamples, ...) values of figures.

        Returns:
            (2, ...): lower and upper ends.
        """
        tail = (1.0 - self.confidence_level) / 2.0
        return np.asarray(np.quantile(samples, [tail, 1.0 - tail], axis=0))

    def estimates(self, values: NDArray[np.float64], samples: NDArray[np.float64]) -> list[Estimate]:
        """Joins k figures with the intervals of their resamples.

        Args:
            values: (k,) the figures.
            samples: (resamples, k) their values over the resamples.
        """
        lower, upper = self.intervals(samples).tolist()
        return [Estimate(value, (low, high)) for value, low, high in zip(values.tolist(), lower, upper, strict=True)]


DEFAULT_BOOTSTRAP: Final = Bootstrap()
