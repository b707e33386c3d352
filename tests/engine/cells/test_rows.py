from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cells import entity_rows, hexagon_rows

from geosurge.cells import CellRows, CellTree, check_cell_tree, write_cell_tree


def test_h3_cells_out_of_order_are_refused(tmp_path: Path) -> None:
    parent, children, leaves = hexagon_rows()
    swapped = replace(leaves, tokens=[leaves.tokens[1], leaves.tokens[0], *leaves.tokens[2:]])
    with pytest.raises(ValueError, match="the H3 cells of a level must be disjoint and ascend along the grid"):
        write_cell_tree(tmp_path / "tree", [parent, children, swapped])
    strange = replace(leaves, parents=np.array([0, 0, 2, *[3] * 7]))
    with pytest.raises(ValueError, match="of level 2 has no child"):
        write_cell_tree(tmp_path / "tree", [parent, children, strange])
    with pytest.raises(ValueError, match="is of H3 resolution 2, not 3"):
        write_cell_tree(tmp_path / "tree", [replace(parent, h3_resolutions=np.array([3]))])
    with pytest.raises(ValueError, match="or neither of them must be given for all levels"):
        write_cell_tree(tmp_path / "tree", [parent, replace(children, h3_resolutions=None)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parents": np.array([0, 2, 1, 3] + [3] * 12)}, "cell 2 of level 2 is apart from its siblings"),
        ({"parents": np.array([0] * 15 + [7])}, "cell 15 of level 2 has the parent 7, but level 1 has 7 cells"),
        ({"parents": np.array([0] * 16)}, "cell 1 of level 1 has no child"),
        ({"parents": np.array([0] * 15)}, r"level 2: parents has the shape \(15,\), not \(16,\)"),
        ({"tokens": ["0"] * 16, "s2_levels": None}, "s2_levels, or h3_resolutions, or neither"),
        ({"outlines": []}, "16 cells, 0 outlines"),
        ({"places": [None]}, "1 places"),
        ({"s2_levels": np.array([30] * 16)}, "is of S2 level"),
    ],
)
def test_rows_that_are_no_tree_are_refused(
    rows: list[CellRows], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    broken = [rows[0], replace(rows[1], **change), *rows[2:]]
    with pytest.raises(ValueError, match=message):
        write_cell_tree(tmp_path / "tree", broken)
    assert not (tmp_path / "tree").exists()


def test_tokens_that_cannot_be_keys_are_refused(tmp_path: Path) -> None:
    for tokens, message in (
        (["NA", "NA"], "'NA' stands twice"),
        (["NA", ""], "row 1: the token '' is empty"),
        (["NA", "x\x00"], "holds a NUL"),
        (["NA", "é" * 255], "longer than 509 bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            write_cell_tree(tmp_path / "tree", [replace(entity_rows()[0], tokens=tokens)])
    write_cell_tree(tmp_path / "tree", [replace(entity_rows()[0], tokens=["NA", "x" * 509])])
    with CellTree.open(tmp_path / "tree") as tree:
        assert tree.find("x" * 509).ordinal == 1
        check_cell_tree(tree)
