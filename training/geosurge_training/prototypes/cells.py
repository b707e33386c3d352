"""The cells of an index made without training: how large they are where nobody says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from geosurge.errors import ConfigurationError
from geosurge_training.recipe import (
    AdministrativePartitionSection,
    H3PartitionSection,
    PartitionKind,
    PartitionSection,
    S2PartitionSection,
)

LEVELS: Final = 7
SMALLEST_LEAF: Final = 4.0
_LEAVES_OF_MP16: Final = 9400
_COARSEST_TO_LEAF: Final = 50.0
_LEAST_TO_MOST: Final = 0.1


def default_tau_max(count: int) -> tuple[float, ...]:
    """Thresholds that grow with the number of pictures.

    GeoSURGE splits MP-16's 4.7 million pictures down to 500 a leaf, and level 1 to fifty times that. The same shares,
    count / 9400 for leaves, but never under `SMALLEST_LEAF`: prototypes that lean on their parents stand on a few
    pictures each, and smaller leaves place better. The levels between are in geometric order. OURS: the paper's five
    middle values have no formula, and it has no indexes of few pictures.

    Args:
        count: Pictures that the partition is made from.

    Returns:
        `LEVELS` values, falling.
    """
    leaf = max(SMALLEST_LEAF, count / _LEAVES_OF_MP16)
    return tuple(leaf * _COARSEST_TO_LEAF ** (1.0 - level / (LEVELS - 1)) for level in range(LEVELS))


def partition_section(
    kind: PartitionKind, count: int, tau_max: Sequence[float] | None = None, tau_min: Sequence[float] | None = None
) -> PartitionSection:
    """What partition is asked for.

    Args:
        kind: Kind of the cells.
        count: Pictures that the partition is made from.
        tau_max: Pictures above which a cell is split, one value a level; by default `default_tau_max`. Administrative
            cells are not split.
        tau_min: Cells need more pictures than this, one value for all levels or one each; by default a tenth of the
            leaves' `tau_max`.

    Raises:
        ConfigurationError: The thresholds are not one value a level, or the kind of cells has none.
    """
    if kind == "administrative" and tau_max is not None:
        raise ConfigurationError("administrative cells are not split: leave tau_max out")
    most = list(tau_max or default_tau_max(count))
    least = list(tau_min or (most[-1] * _LEAST_TO_MOST,))
    shared: float | list[float] = least[0] if len(least) == 1 else least
    try:
        match kind:
            case "s2":
                return S2PartitionSection(tau_min=shared, tau_max=most)
            case "h3":
                return H3PartitionSection(kind="h3", tau_min=shared, tau_max=most)
            case "administrative":
                return AdministrativePartitionSection(kind="administrative", tau_min=shared)
    except ValueError as error:
        raise ConfigurationError(
            f"tau_min has {len(least)} values and tau_max {len(most)}: give tau_min one value, or each one a level"
        ) from error
