from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.cells import entity_rows

from geosurge import s2
from geosurge.cells import CellRows, CellTree, check_cell_tree, write_cell_tree
from geosurge.errors import BundleInconsistentError


def two_levels(above: list[str], below: list[str], parents: list[int]) -> list[CellRows]:
    def level(tokens: list[str], parents: list[int]) -> CellRows:
        n = len(tokens)
        s2_levels = s2.cell_id_to_s2_level(s2.token_to_cell_id(tokens))
        template = entity_rows()[0]
        columns = {name: np.resize(getattr(template, name), n) for name in ("spread_km", "area_km2", "sample_counts")}
        return CellRows(
            tokens=tokens,
            parents=np.array(parents),
            mean_latitude_deg=np.zeros(n),
            mean_longitude_deg=np.zeros(n),
            outlines=[template.outlines[0]] * n,
            s2_levels=s2_levels,
            **columns,
        )

    return [level(above, [-1] * len(above)), level(below, parents)]


@pytest.mark.parametrize(
    ("above", "below", "parents", "message"),
    [
        (["1", "3"], ["04", "24"], [0, 1], None),
        (["1", "3"], ["04", "3"], [0, 1], None),
        (["1", "3"], ["04", "0c"], [0, 1], "cell 1 of level 2, '0c', is not inside its parent '3'"),
        (["1", "04"], ["04", "0c"], [0, 1], "cells 0 and 1 of level 1, '1' and '04', overlap"),
        (["3", "1"], ["24", "04"], [0, 1], "cells 0 and 1 of level 1, '3' and '1', overlap or are out of order"),
        (["1"], ["0c", "04"], [0, 0], "cells 0 and 1 of level 2, '0c' and '04', overlap or are out of order"),
        (["04"], ["1"], [0], "cell 0 of level 2, '1', is not inside its parent '04'"),
    ],
)
def test_s2_cells_ascend_and_lie_inside_their_parents(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    above: list[str],
    below: list[str],
    parents: list[int],
    message: str | None,
) -> None:
    rows = two_levels(above, below, parents)
    if message is None:
        write_cell_tree(tmp_path / "tree", rows)
        with CellTree.open(tmp_path / "tree") as tree:
            check_cell_tree(tree)
            assert tree.cell_ids(2).tolist() == [int(token.ljust(16, "0"), 16) for token in below]
        return
    with pytest.raises(ValueError, match=message):
        write_cell_tree(tmp_path / "tree", rows)
    # A writer that does not look leaves a tree that its reader must see through.
    with monkeypatch.context() as patch:
        patch.setattr("geosurge.cells.writing.validate_rows", lambda rows: None)
        write_cell_tree(tmp_path / "tree", rows)
    with CellTree.open(tmp_path / "tree") as tree, pytest.raises(BundleInconsistentError, match=message):
        check_cell_tree(tree)
