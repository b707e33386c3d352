"""What makes levels of cells a tree, for rows that are about to be written and for files that are read."""

from __future__ import annotations

import numpy as np

from geosurge.geodesy import Int64Array
from geosurge.grids import Grid
from geosurge.s2 import CellIdArray


def link_problem(parents: Int64Array, level: int, counts: tuple[int, ...]) -> str | None:
    """What is wrong with a level's parents, if anything."""
    if level == 1:
        return None if bool((parents == -1).all()) else "level 1 has parents, but there is no level above it"
    above = counts[level - 2]
    outside = np.flatnonzero((parents < 0) | (parents >= above))
    if outside.size:
        row = int(outside[0])
        return f"cell {row} of level {level} has the parent {parents[row]}, but level {level - 1} has {above} cells"
    scattered = np.flatnonzero(np.diff(parents) < 0)
    if scattered.size:
        row = int(scattered[0]) + 1
        return f"cell {row} of level {level} is apart from its siblings: parents must not decrease along a level"
    childless = np.flatnonzero(np.bincount(parents, minlength=above) == 0)
    if childless.size:
        return f"cell {int(childless[0])} of level {level - 1} has no child, so no path leads from it to a leaf"
    return None


def nesting_problem(
    grid: Grid, cells: CellIdArray, above: CellIdArray | None, parents: Int64Array, level: int
) -> str | None:
    """What is wrong with the order of a level's cells, or with their places inside those of the level above."""
    first, last = grid.id_range(cells)
    disordered = np.flatnonzero(first[1:] <= last[:-1])
    if disordered.size:
        row = int(disordered[0])
        one, other = grid.id_to_token(cells[row : row + 2])
        return (
            f"cells {row} and {row + 1} of level {level}, {one!r} and {other!r}, overlap or are out of order: the "
            f"{grid.name} cells of a level must be disjoint and ascend along the grid"
        )
    if above is None:
        return None
    above_first, above_last = grid.id_range(above)
    outside = np.flatnonzero((first < above_first[parents]) | (last > above_last[parents]))
    if outside.size:
        row = int(outside[0])
        child, parent = (grid.id_to_token(ids)[0] for ids in (cells[[row]], above[parents[[row]]]))
        return f"cell {row} of level {level}, {child!r}, is not inside its parent {parent!r}"
    return None
