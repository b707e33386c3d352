from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.bundles import make_levels
from support.cells import LEVEL_COUNTS

from geosurge.cells import CellRows, CellTree, write_cell_tree


@pytest.fixture(scope="module")
def rows() -> list[CellRows]:
    return make_levels(LEVEL_COUNTS, seed=5)[0]


@pytest.fixture(scope="module")
def tree(rows: list[CellRows], tmp_path_factory: pytest.TempPathFactory) -> Iterator[CellTree]:
    path = tmp_path_factory.mktemp("tree") / "cells.lmdb"
    write_cell_tree(path, rows)
    with CellTree.open(path) as opened:
        yield opened
