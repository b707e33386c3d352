"""Soft targets: cells near the true coordinate share in being right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geosurge.geodesy import EARTH_RADIUS_KM, latlng_to_unit_vector


@dataclass(frozen=True)
class LabelSmoothing:
    """Haversine label smoothing (PIGEON, arXiv 2307.05845, section 3.2, equation 2).

    A cell `i` weighs exp(-(d(g_i, x) - d(g_n, x)) / tau) for an image taken at `x` in the true cell `n`, where `g` is a
    cell's location (here the mean of its samples) and `d` the great-circle distance; PIGEON's tau is 65 to 75 km. OURS:
    the weights are divided by their sum, so that a target is a distribution and an image among many small cells does
    not count for more than one in the open; the true cell's distance then cancels.

    Attributes:
        tau_km: How far a cell's share reaches.
        centres: (n_l, 3) float64 unit vectors to the cells' locations, one tensor a level.
    """

    tau_km: float
    centres: Sequence[Tensor]

    @classmethod
    def of_cells(
        cls,
        tau_km: float,
        locations_deg: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]],
        device: torch.device,
    ) -> Self:
        """Smoothing over the cells of a partition.

        Args:
            tau_km: How far a cell's share reaches, positive.
            locations_deg: Latitudes and longitudes of the cells' locations, (n_l,) each, of each level.
            device: Where the targets are computed.

        Returns:
            The smoothing.
        """
        return cls(
            tau_km, [torch.from_numpy(latlng_to_unit_vector(*location)).to(device) for location in locations_deg]
        )

    def targets(self, level: int, directions: Tensor, cells: Tensor | None) -> Tensor:
        """Soft targets of images.

        Args:
            level: Index of the level, from 0.
            directions: (n, 3) float64 unit vectors to where the images were taken.
            cells: (c,) ordinals of the cells that are candidates; None for all of the level.

        Returns:
            (n, c) float32 targets, each row sums to one.
        """
        centres = self.centres[level] if cells is None else self.centres[level][cells]
        # Half the chord is the sine of half the angle. In float32 the subtraction would cost kilometres.
        half_chord = ((2.0 - 2.0 * directions @ centres.T).clamp(min=0.0, max=4.0)).sqrt() / 2.0
        distance_km = 2.0 * EARTH_RADIUS_KM * half_chord.asin()
        return (-distance_km / self.tau_km).softmax(dim=1).float()
