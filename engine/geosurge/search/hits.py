"""The leaves that a search found."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LeafHits:
    """Leaves found for each query, best first, equal scores by ordinal.

    Attributes:
        ordinals: ``(n, k)`` int64 leaf ordinals, -1 where fewer than ``k`` leaves were reached.
        scores: ``(n, k)`` float32 composite inner products: the logarithm of the leaf's product of probabilities, up to
            one constant a query. -inf where the ordinal is -1.
    """

    ordinals: NDArray[np.int64]
    scores: NDArray[np.float32]

    def positions_of(self, leaves: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where one leaf of each query stands among its hits.

        Args:
            leaves: ``(n,)`` leaf ordinals; -1 is no leaf.

        Returns:
            ``(n,)`` positions from 0; -1 where the search did not reach the leaf.
        """
        rows, columns = np.nonzero((self.ordinals == leaves[:, np.newaxis]) & (self.ordinals >= 0))
        positions = np.full(len(leaves), -1, np.int64)
        positions[rows] = columns
        return positions
