from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cells import rewrite

from geosurge.cells import CellRows, CellTree, check_cell_tree, write_cell_tree
from geosurge.errors import BundleInconsistentError


def changed_cell(tree: CellTree, level: int, ordinal: int, **fields: Any) -> tuple[bytes, bytes, bytes]:
    cell = tree.cell(level, ordinal)
    for name, value in fields.items():
        setattr(cell, name, value)
    return b"cells", struct.pack(">BI", level, ordinal), cell.SerializeToString()


def test_check_accepts_what_was_written(tree: CellTree) -> None:
    check_cell_tree(tree)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("parent", "cell 3 of level 3: its record has the parent"),
        ("token", "cell 3 of level 3: its record has the token"),
        ("first_child", "cell 3 of level 3: its record has the first child"),
        ("mean", "cell 3 of level 4: its record has the latitude"),
        ("look-up", "cell 3 of level 3: its token .* is not found"),
        ("extra", "entries in 'cells'"),
        ("column", "cell 1 of level 1 has no child"),
    ],
)
def test_check_finds_parts_that_contradict_each_other(
    rows: list[CellRows], tree: CellTree, tmp_path: Path, change: str, message: str
) -> None:
    write_cell_tree(tmp_path, rows)
    token = rows[2].tokens[3]
    mean = tree.cell(4, 3)
    mean.mean.latitude_deg += 1e-9
    changes = {
        "parent": changed_cell(tree, 3, 3, parent_ordinal=tree.cell(3, 3).parent_ordinal + 1),
        "token": changed_cell(tree, 3, 3, token="89c25c"),
        "first_child": changed_cell(tree, 3, 3, first_child_ordinal=0),
        "mean": (b"cells", struct.pack(">BI", 4, 3), mean.SerializeToString()),
        "look-up": (b"tokens", token.encode() + b"\x00\x03", struct.pack(">I", 4)),
        "extra": (b"cells", struct.pack(">BI", 9, 0), b""),
        "column": (b"columns", b"2/parents", np.zeros(16, "<u4").tobytes()),
    }
    rewrite(tmp_path, *changes[change])
    with CellTree.open(tmp_path) as changed, pytest.raises(BundleInconsistentError, match=message):
        check_cell_tree(changed)
