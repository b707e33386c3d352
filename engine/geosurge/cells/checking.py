"""Compares the parts of a tree with each other."""

from __future__ import annotations

import numpy as np

from geosurge.cells.environment import verify_cell_file
from geosurge.cells.records import RecordReader
from geosurge.cells.rules import link_problem, nesting_problem
from geosurge.cells.tree import CellTree
from geosurge.errors import BundleCorruptError, BundleInconsistentError
from geosurge.grids import Grid
from geosurge.s2 import CellIdArray


def check_cell_tree(tree: CellTree) -> None:
    """Reads every record and compares it with the columns, the token look-up and its neighbours in the tree.

    Takes seconds for a million cells.

    Raises:
        BundleCorruptError: The file's pages are damaged, or a record cannot be read.
        BundleInconsistentError: Two parts of the tree contradict each other; names the cell.
    """
    file = tree.records.file
    problems = verify_cell_file(file.parent)
    if problems:
        raise BundleCorruptError(f"{file}: {problems[0]} ({len(problems)} problems in its pages)")
    with tree.records.reading() as reader:
        for name, entries in reader.entry_counts().items():
            if entries != sum(tree.cell_counts):
                raise BundleInconsistentError(
                    f"{file}: {entries} entries in {name!r}, but the levels have {sum(tree.cell_counts)} cells"
                )
        for level in range(1, tree.level_count + 1):
            problem = link_problem(tree.parents(level), level, tree.cell_counts)
            if problem:
                raise BundleInconsistentError(f"{file}: {problem}")
        if tree.grid is not None:
            _check_nesting(tree, tree.grid)
        for level in range(1, tree.level_count + 1):
            tokens = tree.tokens(level, np.arange(tree.cell_counts[level - 1]))
            for ordinal, token in enumerate(tokens):
                _check_record(tree, reader, level, ordinal, token)


def _check_nesting(tree: CellTree, grid: Grid) -> None:
    above: CellIdArray | None = None
    for level in range(1, tree.level_count + 1):
        cells = tree.cell_ids(level)
        problem = nesting_problem(grid, cells, above, tree.parents(level), level)
        if problem:
            raise BundleInconsistentError(f"{tree.records.file}: {problem}")
        above = cells


def _check_record(tree: CellTree, reader: RecordReader, level: int, ordinal: int, token: str) -> None:
    where = f"{tree.records.file}: cell {ordinal} of level {level}"
    cell = reader.read(level, ordinal)
    if reader.find(token, level) != [(level, ordinal)]:
        raise BundleInconsistentError(f"{where}: its token {token!r} is not found by look-up")
    children = tree.children(level, ordinal)
    expected = [
        ("token", cell.token, token),
        ("level", cell.level, level),
        ("ordinal", cell.ordinal, ordinal),
        ("parent", cell.parent_ordinal if cell.HasField("parent_ordinal") else -1, tree.parents(level)[ordinal]),
        ("first child", cell.first_child_ordinal, children.start),
        ("last child", cell.last_child_ordinal + cell.HasField("last_child_ordinal"), children.stop),
    ]
    if level == tree.level_count:
        leaves = tree.leaves
        expected += [
            ("latitude", cell.mean.latitude_deg, leaves.latitude_deg[ordinal]),
            ("longitude", cell.mean.longitude_deg, leaves.longitude_deg[ordinal]),
            ("spread", cell.spread_km, leaves.spread_km[ordinal]),
            ("area", cell.area_km2, leaves.area_km2[ordinal]),
            ("sample count", cell.sample_count, leaves.sample_counts[ordinal]),
        ]
    for name, recorded, other in expected:
        if recorded != other:
            raise BundleInconsistentError(f"{where}: its record has the {name} {recorded!r}, the tree {other!r}")
