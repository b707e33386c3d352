from __future__ import annotations

import struct
from pathlib import Path

import lmdb
import pytest
from support.bundles import make_levels

from geosurge.cells import DATA_FILE, CellRows, CellTree, check_cell_tree, write_cell_tree
from geosurge.v1 import cell_pb2


def test_outlines_that_are_not_stored_are_computed(rows: list[CellRows], tree: CellTree, tmp_path: Path) -> None:
    write_cell_tree(tmp_path / "small", rows, store_outlines=False)
    with CellTree.open(tmp_path / "small") as small:
        check_cell_tree(small)
        assert small.cell(4, 11) == tree.cell(4, 11)
        assert small.find(rows[2].tokens[3]) == tree.find(rows[2].tokens[3])
        leaf = tree.cell(4, 50).mean
        assert small.path(leaf.latitude_deg, leaf.longitude_deg) == tree.path(leaf.latitude_deg, leaf.longitude_deg)


def test_one_level_and_one_cell(tmp_path: Path) -> None:
    rows, _ = make_levels((1,), seed=2)
    write_cell_tree(tmp_path / "one", rows)
    with CellTree.open(tmp_path / "one") as tree:
        check_cell_tree(tree)
        assert tree.ancestors([0]).tolist() == [[0]]
        assert tree.leaf_range(1, 0) == (0, 1)
        assert tree.children(1, 0) == range(0)


def test_the_file_is_lmdb_0_9_small_and_reproducible(rows: list[CellRows], tmp_path: Path) -> None:
    write_cell_tree(tmp_path / "a", rows)
    write_cell_tree(tmp_path / "b", rows)
    data = (tmp_path / "a" / DATA_FILE).read_bytes()
    assert data == (tmp_path / "b" / DATA_FILE).read_bytes()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [DATA_FILE, DATA_FILE]
    magic, version = struct.unpack_from("=II", data, 16)
    assert (magic, version) == (0xBEEFC0DE, 1)
    # 153 cells of about 250 bytes; more would mean that unused pages were kept.
    assert len(data) < 120_000
    environment = lmdb.open(str(tmp_path / "a"), readonly=True, lock=False, max_dbs=3)
    cells = environment.open_db(b"cells", create=False)
    with environment.begin() as transaction:
        value = transaction.get(struct.pack(">BI", 2, 3), db=cells)
    environment.close()
    assert cell_pb2.Cell.FromString(value).token == rows[1].tokens[3]


def test_a_directory_with_content_is_not_overwritten(rows: list[CellRows], tree: CellTree, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        write_cell_tree(tmp_path, rows)
