from __future__ import annotations

import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s2sphere
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cells import LEVEL_COUNTS, rewrite

from geosurge.cells import DATA_FILE, CellRows, CellTree, write_cell_tree
from geosurge.errors import BundleCorruptError, CellUnknownError


def test_records_hold_what_was_written(tree: CellTree, rows: list[CellRows]) -> None:
    assert tree.cell_counts == LEVEL_COUNTS
    assert tree.level_count == 4
    for level, written in enumerate(rows, start=1):
        for ordinal, token in enumerate(written.tokens):
            cell = tree.cell(level, ordinal)
            assert (cell.token, cell.level, cell.ordinal) == (token, level, ordinal)
            assert cell.HasField("parent_ordinal") == (level > 1)
            if level > 1:
                assert cell.parent_ordinal == written.parents[ordinal]
            assert cell.mean.latitude_deg == written.mean_latitude_deg[ordinal]
            assert cell.mean.longitude_deg == written.mean_longitude_deg[ordinal]
            assert cell.spread_km == written.spread_km[ordinal]
            assert cell.area_km2 == written.area_km2[ordinal]
            assert cell.sample_count == written.sample_counts[ordinal]
            corners = [(corner.latitude_deg, corner.longitude_deg) for corner in cell.outline]
            np.testing.assert_array_equal(corners, written.outlines[ordinal])
            assert tree.places(level, [ordinal]) == [written.places[ordinal]]
            assert cell.s2_level == s2sphere.CellId.from_token(token).level()


@settings(deadline=None)
@given(st.text(max_size=600))
def test_unknown_tokens_are_not_found(tree: CellTree, token: str) -> None:
    if any(token in tree.tokens(level, range(count)) for level, count in enumerate(LEVEL_COUNTS, start=1)):
        return
    with pytest.raises(CellUnknownError):
        tree.find(token)


@pytest.mark.parametrize("token", ["", "\x00", "\x00\x01", "1\x00", "\ud800", "é" * 300, "x" * 100_000])
def test_odd_tokens_are_not_found(tree: CellTree, token: str) -> None:
    with pytest.raises(CellUnknownError):
        tree.find(token)


def test_threads_read_at_once(tree: CellTree, rows: list[CellRows]) -> None:
    wrong: list[Any] = []
    start = threading.Barrier(8)

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        start.wait()
        for _ in range(200):
            level = int(rng.integers(1, 5))
            ordinal = int(rng.integers(LEVEL_COUNTS[level - 1]))
            if tree.cell(level, ordinal).token != rows[level - 1].tokens[ordinal]:
                wrong.append((level, ordinal))
            if tree.find(rows[level - 1].tokens[ordinal], level).ordinal != ordinal:
                wrong.append((level, ordinal))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_tree_closed_while_it_is_read_is_not_called_damaged(
    rows: list[CellRows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cell_tree(tmp_path / "tree", rows)
    tree = CellTree.open(tmp_path / "tree")

    def close_first(level: int, ordinal: int) -> bytes:
        tree.close()
        return struct.pack(">BI", level, ordinal)

    monkeypatch.setattr("geosurge.cells.records.cell_key", close_first)
    with pytest.raises(RuntimeError, match="was closed while it was read"):
        tree.cell(1, 0)
    with pytest.raises(RuntimeError, match="is closed"):
        tree.cell(1, 0)


def test_damaged_records_are_noticed_when_read(rows: list[CellRows], tmp_path: Path) -> None:
    write_cell_tree(tmp_path, rows)
    rewrite(tmp_path, b"cells", struct.pack(">BI", 2, 3), b"\xff\xff\xff")
    rewrite(tmp_path, b"cells", struct.pack(">BI", 2, 4), None)
    with CellTree.open(tmp_path) as tree:
        assert tree.cell(2, 5).ordinal == 5
        with pytest.raises(BundleCorruptError, match=DATA_FILE):
            tree.cell(2, 3)
        with pytest.raises(BundleCorruptError, match="cell 4 of level 2 is missing"):
            tree.cell(2, 4)
