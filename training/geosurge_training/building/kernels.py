"""Fits the kernel of a gallery on held-out images."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from geosurge.density import Components, Kernel, densest_points
from geosurge.geodesy import great_circle_km, unit_vector_to_latlng

_LOGGER = logging.getLogger(__name__)

KERNELS: Final = tuple(
    itertools.starmap(
        Kernel, itertools.product((4.0, 6.0, 10.0), (0.25, 0.5, 0.75, 1.0), (1.0, 2.0, 4.0, 8.0), (False, True))
    )
)
"""What is tried: the published power and softer ones, mixtures with the leaves and the references alone, widths from
the likeliest leaf to its surroundings, and the mode as it is or the reference that it snaps to."""


@dataclass(frozen=True)
class Located:
    """What the densities of n held-out images are made of, and where the images were taken.

    Attributes:
        components: What the densities are made of.
        latitude_deg: (n,) true latitudes.
        longitude_deg: (n,) true longitudes.
    """

    components: Components
    latitude_deg: npt.NDArray[np.float64]
    longitude_deg: npt.NDArray[np.float64]


def fit_kernel(blocks: Sequence[Located]) -> Kernel:
    """The kernel of `KERNELS` with the least median error; the first of equals.

    Args:
        blocks: Held-out images, some at a time.
    """
    medians = {kernel: _median_error_km(blocks, kernel) for kernel in KERNELS}
    best = min(medians, key=lambda kernel: medians[kernel])
    _LOGGER.info("%s: median error %.4g km on what it is fitted to", best, medians[best])
    return best


def _median_error_km(blocks: Sequence[Located], kernel: Kernel) -> float:
    errors = []
    for block in blocks:
        points = unit_vector_to_latlng(densest_points(block.components, kernel))
        errors.append(great_circle_km(*points, block.latitude_deg, block.longitude_deg))
    return float(np.median(np.concatenate(errors)))
