from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.cells import rewrite

from geosurge.cells import CellRows, CellTree, write_cell_tree
from geosurge.errors import BundleCorruptError


def test_leaf_columns_equal_the_records(tree: CellTree, rows: list[CellRows]) -> None:
    leaves, written = tree.leaves, rows[-1]
    np.testing.assert_array_equal(leaves.latitude_deg, written.mean_latitude_deg)
    np.testing.assert_array_equal(leaves.longitude_deg, written.mean_longitude_deg)
    np.testing.assert_array_equal(leaves.spread_km, written.spread_km)
    np.testing.assert_array_equal(leaves.area_km2, written.area_km2)
    np.testing.assert_array_equal(leaves.sample_counts, written.sample_counts)
    for column in vars(leaves).values():
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 0


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        (b"columns", b"levels", b"\x01"),
        (b"columns", b"levels", None),
        (b"columns", b"2/parents", b"\x00" * 4),
        (b"columns", b"4/latitude_deg", None),
        (b"columns", b"1/tokens", b"x"),
    ],
)
def test_damaged_columns_are_noticed_when_opening(
    rows: list[CellRows], tmp_path: Path, table: bytes, key: bytes, value: bytes | None
) -> None:
    write_cell_tree(tmp_path, rows)
    rewrite(tmp_path, table, key, value)
    with pytest.raises(BundleCorruptError, match="column"):
        CellTree.open(tmp_path)
