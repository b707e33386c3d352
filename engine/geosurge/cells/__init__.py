"""The tree of geocells: which cells a level has, what is above and below each, and where it lies.

`write_cell_tree` makes a tree of `CellRows`, `CellTree` reads it, and `check_cell_tree` compares its parts with each
other. `geosurge.cells.layout` says what the file holds; LMDB is used in this folder alone.

Cells of a level are numbered such that the children of a cell are one contiguous run: parents never decrease along a
level. All descendants of a cell on any level are then one contiguous run too.
"""

from geosurge.cells.checking import check_cell_tree
from geosurge.cells.columns import LeafColumns
from geosurge.cells.environment import verify_cell_file
from geosurge.cells.layout import DATA_FILE
from geosurge.cells.rows import CellRows
from geosurge.cells.tree import CellTree
from geosurge.cells.writing import write_cell_tree

__all__ = [
    "DATA_FILE",
    "CellRows",
    "CellTree",
    "LeafColumns",
    "check_cell_tree",
    "verify_cell_file",
    "write_cell_tree",
]
