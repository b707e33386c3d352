"""Spots: places so near each other that pictures taken there show one thing.

With some of them in either of two parts, what is measured on the one would be memory of the other.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

_SPOTS_A_DEGREE: Final = 100
"""OURS: a spot is a hundredth of a degree wide, 1.1 km at the most."""


def spots_of(latitude_deg: npt.NDArray[np.float64], longitude_deg: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The spots that coordinates lie in.

    Args:
        latitude_deg: (n,) latitudes.
        longitude_deg: (n,) longitudes.

    Returns:
        (n,) numbers; equal ones are one spot.
    """
    rows = np.rint(latitude_deg * _SPOTS_A_DEGREE).astype(np.int64)
    # The antimeridian is one spot and not two.
    columns = np.rint(longitude_deg * _SPOTS_A_DEGREE).astype(np.int64) % (360 * _SPOTS_A_DEGREE)
    return rows * (360 * _SPOTS_A_DEGREE) + columns


def order_by_spot(
    latitude_deg: npt.NDArray[np.float64], longitude_deg: npt.NDArray[np.float64], rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """A random order in which the pictures of a spot follow each other, so that a cut divides one spot at the most.

    Args:
        latitude_deg: (n,) latitudes.
        longitude_deg: (n,) longitudes.
        rng: Draws the order.

    Returns:
        (n,) a permutation.
    """
    _, spot = np.unique(spots_of(latitude_deg, longitude_deg), return_inverse=True)
    shuffled = rng.permutation(len(spot))
    ranks = rng.permutation(spot.max(initial=-1) + 1)
    return shuffled[np.argsort(ranks[spot[shuffled]], kind="stable")]


def cut_between_spots(latitude_deg: npt.NDArray[np.float64], longitude_deg: npt.NDArray[np.float64], near: int) -> int:
    """Where to cut a sequence so that no spot whose pictures follow each other is divided.

    Args:
        latitude_deg: (n,) latitudes.
        longitude_deg: (n,) longitudes.
        near: Where the cut is wanted.

    Returns:
        The position nearest to it where another spot begins; `near` itself where that is more than n / 6 away, which
        would leave too little on one side.
    """
    spots = spots_of(latitude_deg, longitude_deg)
    begins = np.flatnonzero(spots[1:] != spots[:-1]) + 1
    begins = begins[np.abs(begins - near) <= len(spots) / 6]
    return near if len(begins) == 0 else int(begins[np.argmin(np.abs(begins - near))])
