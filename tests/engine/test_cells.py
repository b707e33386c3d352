from __future__ import annotations

import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h3
import lmdb
import numpy as np
import pytest
import s2sphere
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bundles import make_levels

from geosurge import cells, geodesy
from geosurge.cells import DATA_FILE, CellRows, CellTree, verify_cell_file, write_cell_tree
from geosurge.errors import (
    BundleCorruptError,
    BundleInconsistentError,
    BundlePartialError,
    CellKindUnsupportedError,
    CellUnknownError,
    CoordinateOutOfRangeError,
    LevelOutOfRangeError,
)
from geosurge.location import Place
from geosurge.v1 import cell_pb2

LEVEL_COUNTS = (7, 16, 40, 90)


@pytest.fixture(scope="module")
def rows() -> list[CellRows]:
    return make_levels(LEVEL_COUNTS, seed=5)[0]


@pytest.fixture(scope="module")
def tree(rows: list[CellRows], tmp_path_factory: pytest.TempPathFactory) -> Iterator[CellTree]:
    path = tmp_path_factory.mktemp("tree") / "cells.lmdb"
    write_cell_tree(path, rows)
    with CellTree.open(path) as opened:
        yield opened


def entity_rows() -> list[CellRows]:
    def level(tokens: list[str], parents: list[int]) -> CellRows:
        n = len(tokens)
        return CellRows(
            tokens=tokens,
            parents=np.array(parents),
            mean_latitude_deg=np.linspace(-20, 20, n),
            mean_longitude_deg=np.linspace(10, 30, n),
            spread_km=np.full(n, 5.0),
            area_km2=np.full(n, 100.0),
            sample_counts=np.full(n, 60),
            outlines=[np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])] * n,
        )

    return [
        level(["CI", "NA"], [-1, -1]),
        level(["CI/Bélier", "NA/Khomas", "NA/Khomas Region"], [0, 1, 1]),
        level(["CI/Bélier/Yamoussoukro", "NA/Khomas/Windhoek", "NA/Khomas Region/Ω"], [0, 1, 2]),
    ]


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


def test_children_and_parents_are_inverse(tree: CellTree) -> None:
    for level in range(1, tree.level_count):
        seen = []
        for ordinal in range(tree.cell_counts[level - 1]):
            children = tree.children(level, ordinal)
            cell = tree.cell(level, ordinal)
            assert (children.start, children.stop) == (cell.first_child_ordinal, cell.last_child_ordinal + 1)
            assert all(tree.parents(level + 1)[child] == ordinal for child in children)
            seen.extend(children)
        assert seen == list(range(tree.cell_counts[level]))
    assert tree.children(tree.level_count, 3) == range(0)
    assert not tree.cell(tree.level_count, 3).HasField("first_child_ordinal")
    assert (tree.parents(1) == -1).all()


def test_ancestors_walk_the_records(tree: CellTree) -> None:
    leaves = np.array([0, 89, 17, -1, 17])
    ancestors = tree.ancestors(leaves)
    assert ancestors.shape == (5, 4)
    for leaf, row in zip(leaves, ancestors, strict=True):
        expected = [-1] * 4
        if leaf >= 0:
            cell = tree.cell(4, int(leaf))
            expected[3] = cell.ordinal
            while cell.level > 1:
                cell = tree.cell(cell.level - 1, cell.parent_ordinal)
                expected[cell.level - 1] = cell.ordinal
        assert row.tolist() == expected
    assert tree.ancestors([]).shape == (0, 4)


def test_leaf_range_is_the_set_of_leaves_with_that_ancestor(tree: CellTree) -> None:
    ancestors = tree.ancestors(np.arange(tree.cell_counts[-1]))
    for level in range(1, tree.level_count + 1):
        for ordinal in range(tree.cell_counts[level - 1]):
            first, end = tree.leaf_range(level, ordinal)
            assert list(range(first, end)) == np.flatnonzero(ancestors[:, level - 1] == ordinal).tolist()
    ranges = tree.leaf_ranges(ancestors)
    for leaf, path in enumerate(ancestors.tolist()):
        expected = [list(tree.leaf_range(level, ordinal)) for level, ordinal in enumerate(path, start=1)]
        assert ranges[leaf].tolist() == expected


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


def test_tokens_of_many_rows(tree: CellTree, rows: list[CellRows]) -> None:
    assert tree.tokens(3, [5, 0, 39, 0]) == [rows[2].tokens[row] for row in (5, 0, 39, 0)]
    assert tree.tokens(3, []) == []
    with pytest.raises(CellUnknownError, match="0 to 39"):
        tree.tokens(3, [40])
    with pytest.raises(CellUnknownError, match="-1"):
        tree.tokens(3, [-1])
    assert tree.tokens(3, np.arange(40)[::-3]) == list(rows[2].tokens[::-3])


def test_tokens_of_paths_are_those_of_their_cells(tree: CellTree, rows: list[CellRows]) -> None:
    paths = tree.ancestors([0, 89, 17, 17])
    expected = [[rows[level].tokens[ordinal] for level, ordinal in enumerate(path)] for path in paths.tolist()]
    assert tree.path_tokens(paths) == expected
    assert tree.path_tokens(tree.ancestors([])) == []


def test_find_gives_the_coarsest_or_finest_cell_with_a_token(tree: CellTree, rows: list[CellRows]) -> None:
    levels_of: dict[str, list[int]] = {}
    for level, written in enumerate(rows, start=1):
        for token in written.tokens:
            levels_of.setdefault(token, []).append(level)
    assert max(map(len, levels_of.values())) > 1, "the sample needs a cell that was not split"
    for token, levels in levels_of.items():
        assert tree.find(token).level == levels[0]
        assert tree.find(token, finest=True).level == levels[-1]
        for level in range(1, 5):
            if level in levels:
                assert (tree.find(token, level).token, tree.find(token, level).level) == (token, level)
            else:
                with pytest.raises(CellUnknownError, match=f"'{token}' on level {level}"):
                    tree.find(token, level)


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


def test_rows_and_levels_out_of_range(tree: CellTree) -> None:
    for level in (0, 5, -1):
        with pytest.raises(LevelOutOfRangeError, match="levels 1 to 4"):
            tree.cell(level, 0)
        with pytest.raises(LevelOutOfRangeError, match="levels 1 to 4"):
            tree.find("1", level)
    for ordinal in (-1, 7):
        with pytest.raises(CellUnknownError, match="ordinals 0 to 6"):
            tree.cell(1, ordinal)
        with pytest.raises(CellUnknownError, match="ordinals 0 to 6"):
            tree.children(1, ordinal)


def test_path_equals_containment_by_s2sphere(tree: CellTree, rows: list[CellRows]) -> None:
    cells = [[s2sphere.CellId.from_token(token) for token in written.tokens] for written in rows]
    rng = np.random.default_rng(8)
    leaves = rows[-1]
    latitudes = [*leaves.mean_latitude_deg, *np.degrees(np.arcsin(rng.uniform(-1, 1, 150))), 90.0, -90.0, 0.0, 10.0]
    longitudes = [*leaves.mean_longitude_deg, *rng.uniform(-180, 180, 150), 0.0, 0.0, 180.0, -180.0]
    lengths = set()
    for latitude, longitude in zip(latitudes, longitudes, strict=True):
        point = s2sphere.CellId.from_lat_lng(s2sphere.LatLng.from_degrees(float(latitude), float(longitude)))
        expected = []
        for level in cells:
            expected += [cell.to_token() for cell in level if cell.contains(point)]
        path = tree.path(float(latitude), float(longitude))
        assert [cell.token for cell in path] == expected
        assert [cell.level for cell in path] == list(range(1, len(path) + 1))
        lengths.add(len(path))
    assert {0, 4} < lengths, "the sample needs points outside, on the way and inside"


def test_path_refuses_coordinates_off_the_globe(tree: CellTree) -> None:
    for latitude, longitude in ((90.1, 0.0), (0.0, 180.1), (float("nan"), 0.0)):
        with pytest.raises(CoordinateOutOfRangeError):
            tree.path(latitude, longitude)


def test_entity_and_h3_trees_are_stored_but_have_no_paths(tmp_path: Path) -> None:
    write_cell_tree(tmp_path / "entities", entity_rows())
    parent = h3.latlng_to_cell(48.85, 2.35, 2)
    children = sorted(h3.cell_to_children(parent, 3))
    levels = [
        replace(
            entity_rows()[0],
            tokens=tokens,
            parents=np.array(parents),
            outlines=[np.array(h3.cell_to_boundary(token)) for token in tokens],
            **{
                name: np.ones(len(tokens))
                for name in ("mean_latitude_deg", "mean_longitude_deg", "spread_km", "area_km2", "sample_counts")
            },
        )
        for tokens, parents in (([parent], [-1]), (children, [0] * 7))
    ]
    write_cell_tree(tmp_path / "h3", levels)
    with CellTree.open(tmp_path / "entities") as entities, CellTree.open(tmp_path / "h3") as hexagons:
        for tree in (entities, hexagons):
            tree.check()
            assert not tree.has_s2_cells
            assert not tree.cell(1, 0).HasField("s2_level")
            assert tree.places(1, [0]) == [None]
            with pytest.raises(CellKindUnsupportedError, match="S2 cells only"):
                tree.path(0.0, 0.0)
        assert entities.find("NA").ordinal == 1
        assert entities.find("NA/Khomas").ordinal == 1
        assert entities.find("NA/Khomas Region/Ω").level == 3
        assert entities.tokens(3, [2, 0]) == ["NA/Khomas Region/Ω", "CI/Bélier/Yamoussoukro"]
        assert entities.path_tokens(entities.ancestors([2])) == [["NA", "NA/Khomas Region", "NA/Khomas Region/Ω"]]
        assert [len(cell.outline) for cell in (hexagons.cell(1, 0), hexagons.cell(2, 6))] == [6, 6]


def test_outlines_that_are_not_stored_are_computed(rows: list[CellRows], tree: CellTree, tmp_path: Path) -> None:
    write_cell_tree(tmp_path / "small", rows, store_outlines=False)
    with CellTree.open(tmp_path / "small") as small:
        small.check()
        assert small.cell(4, 11) == tree.cell(4, 11)
        assert small.find(rows[2].tokens[3]) == tree.find(rows[2].tokens[3])
        leaf = tree.cell(4, 50).mean
        assert small.path(leaf.latitude_deg, leaf.longitude_deg) == tree.path(leaf.latitude_deg, leaf.longitude_deg)


def test_one_level_and_one_cell(tmp_path: Path) -> None:
    rows, _ = make_levels((1,), seed=2)
    write_cell_tree(tmp_path / "one", rows)
    with CellTree.open(tmp_path / "one") as tree:
        tree.check()
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


def test_opening_parses_no_records_and_writes_nothing(rows: list[CellRows], tmp_path: Path) -> None:
    write_cell_tree(tmp_path / "tree", rows)
    (tmp_path / "tree" / DATA_FILE).chmod(0o444)
    before = [path.name for path in (tmp_path / "tree").iterdir()]
    with CellTree.open(tmp_path / "tree") as tree:
        tree.cell(1, 0)
        assert [path.name for path in (tmp_path / "tree").iterdir()] == before == [DATA_FILE]


def test_a_file_may_be_opened_many_times_in_one_process(rows: list[CellRows], tmp_path: Path) -> None:
    write_cell_tree(tmp_path / "tree", rows)
    (tmp_path / "link").symlink_to(tmp_path / "tree")
    first, second = CellTree.open(tmp_path / "tree"), CellTree.open(tmp_path / "link")
    first.close()
    first.close()
    assert second.cell(1, 0).token == rows[0].tokens[0]
    with pytest.raises(RuntimeError, match="closed"):
        first.cell(1, 0)
    second.close()
    with CellTree.open(tmp_path / "tree") as again:
        assert again.cell(1, 0).token == rows[0].tokens[0]


def test_a_tree_can_be_read_and_opened_again_after_a_fork(rows: list[CellRows], tmp_path: Path) -> None:
    write_cell_tree(tmp_path / "tree", rows)
    script = """
        import os, sys
        from pathlib import Path
        from geosurge.cells import CellTree
        tree = CellTree.open(Path(sys.argv[1]))
        child = os.fork()
        # One after the other, so that their lines do not mix.
        status = os.waitpid(child, 0)[1] if child else None
        with CellTree.open(Path(sys.argv[1])) as again:
            print(tree.cell(1, 0).token, again.cell(1, 0).token, flush=True)
        if child:
            print(tree.cell(1, 0).token, status)
        tree.close()
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "tree")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    token = rows[0].tokens[0]
    assert done.stdout.splitlines() == [f"{token} {token}"] * 2 + [f"{token} 0"]


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parents": np.array([0, 2, 1, 3] + [3] * 12)}, "cell 2 of level 2 is apart from its siblings"),
        ({"parents": np.array([0] * 15 + [7])}, "cell 15 of level 2 has the parent 7, but level 1 has 7 cells"),
        ({"parents": np.array([0] * 16)}, "cell 1 of level 1 has no child"),
        ({"parents": np.array([0] * 15)}, r"level 2: parents has the shape \(15,\), not \(16,\)"),
        ({"tokens": ["0"] * 16, "s2_levels": None}, "s2_levels are given for some levels"),
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


def two_levels(above: list[str], below: list[str], parents: list[int]) -> list[CellRows]:
    def level(tokens: list[str], parents: list[int]) -> CellRows:
        n = len(tokens)
        s2_levels = geodesy.cell_id_to_s2_level(geodesy.token_to_cell_id(tokens))
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
            tree.check()
            assert tree.cell_ids(2).tolist() == [int(token.ljust(16, "0"), 16) for token in below]
        return
    with pytest.raises(ValueError, match=message):
        write_cell_tree(tmp_path / "tree", rows)
    # A writer that does not look leaves a tree that its reader must see through.
    with monkeypatch.context() as patch:
        patch.setattr(cells, "_validate_rows", lambda rows: None)
        write_cell_tree(tmp_path / "tree", rows)
    with CellTree.open(tmp_path / "tree") as tree, pytest.raises(BundleInconsistentError, match=message):
        tree.check()


def test_only_s2_cells_have_s2_ids(tmp_path: Path) -> None:
    write_cell_tree(tmp_path / "tree", entity_rows())
    with CellTree.open(tmp_path / "tree") as tree, pytest.raises(CellKindUnsupportedError):
        tree.cell_ids(1)


def test_a_tree_closed_while_it_is_read_is_not_called_damaged(
    rows: list[CellRows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cell_tree(tmp_path / "tree", rows)
    tree = CellTree.open(tmp_path / "tree")

    def close_first(level: int, ordinal: int) -> bytes:
        tree.close()
        return struct.pack(">BI", level, ordinal)

    monkeypatch.setattr(cells, "_cell_key", close_first)
    with pytest.raises(RuntimeError, match="was closed while it was read"):
        tree.cell(1, 0)
    with pytest.raises(RuntimeError, match="is closed"):
        tree.cell(1, 0)


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
        tree.check()


def test_a_directory_with_content_is_not_overwritten(rows: list[CellRows], tree: CellTree, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        write_cell_tree(tmp_path, rows)


def test_a_missing_tree_is_partial(tmp_path: Path) -> None:
    with pytest.raises(BundlePartialError, match=DATA_FILE):
        CellTree.open(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"", b"not a tree", b"\x00" * 8192])
def test_a_file_that_is_no_tree_is_corrupt(tmp_path: Path, content: bytes) -> None:
    (tmp_path / DATA_FILE).write_bytes(content)
    with pytest.raises(BundleCorruptError, match=DATA_FILE):
        CellTree.open(tmp_path)
    assert verify_cell_file(tmp_path)


def test_an_lmdb_file_without_the_tables_is_corrupt(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path / "empty"), lib_version=0, max_dbs=3, lock=False) as environment:
        environment.open_db(b"other")
    with pytest.raises(BundleCorruptError):
        CellTree.open(tmp_path / "empty")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_corrupt_and_does_not_end_the_process(
    rows: list[CellRows], tmp_path: Path, kept: float
) -> None:
    write_cell_tree(tmp_path, rows)
    data = (tmp_path / DATA_FILE).read_bytes()
    (tmp_path / DATA_FILE).write_bytes(data[: int(len(data) * kept)])
    script = """
        import sys
        from pathlib import Path
        from geosurge.cells import CellTree
        from geosurge.errors import BundleCorruptError
        try:
            CellTree.open(Path(sys.argv[1])).check()
        except BundleCorruptError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, DATA_FILE in done.stdout) == (0, True), done.stderr


def rewrite(path: Path, table: bytes, key: bytes, value: bytes | None) -> None:
    with (
        lmdb.open(str(path), max_dbs=3, lock=False, map_size=1 << 24) as environment,
        environment.begin(write=True) as transaction,
    ):
        database = environment.open_db(table, txn=transaction, create=False)
        if value is None:
            transaction.delete(key, db=database)
        else:
            transaction.put(key, value, db=database)


def changed_cell(tree: CellTree, level: int, ordinal: int, **fields: Any) -> tuple[bytes, bytes, bytes]:
    cell = tree.cell(level, ordinal)
    for name, value in fields.items():
        setattr(cell, name, value)
    return b"cells", struct.pack(">BI", level, ordinal), cell.SerializeToString()


def test_check_accepts_what_was_written(tree: CellTree) -> None:
    tree.check()


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
        changed.check()


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


def test_a_place_survives(tmp_path: Path) -> None:
    rows = [replace(entity_rows()[0], places=[None, Place("Windhoek", "Khomas", "Namibia", "NA", 3.25)])]
    write_cell_tree(tmp_path / "tree", rows)
    with CellTree.open(tmp_path / "tree") as tree:
        assert tree.places(1, [1, 0, 1]) == [rows[0].places[1], None, rows[0].places[1]]


def test_places_are_read_once_and_forgotten_when_they_are_too_many(
    rows: list[CellRows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cell_tree(tmp_path / "tree", rows)
    monkeypatch.setattr("geosurge.cells.MAX_CACHED_PLACES", 10)
    read: list[int] = []
    with CellTree.open(tmp_path / "tree") as tree:
        read_record = tree._read_record

        def counted(transaction: lmdb.Transaction, level: int, ordinal: int) -> cell_pb2.Cell:
            read.append(ordinal)
            return read_record(transaction, level, ordinal)

        monkeypatch.setattr(tree, "_read_record", counted)
        for wanted, missing in (
            ([3, 1, 3], [1, 3]),
            ([1, 3], []),
            ([3, *range(10, 17)], list(range(10, 17))),
            ([3, 20, 21], [20, 21]),
            ([3, 21], []),
            ([1], [1]),
        ):
            read.clear()
            assert tree.places(4, wanted) == [rows[3].places[ordinal] for ordinal in wanted]
            assert sorted(read) == missing


def test_places_of_cells_that_do_not_exist_or_of_a_closed_tree_are_refused(
    rows: list[CellRows], tmp_path: Path
) -> None:
    write_cell_tree(tmp_path / "tree", rows)
    with CellTree.open(tmp_path / "tree") as tree:
        with pytest.raises(CellUnknownError, match="0 to 89, not 90"):
            tree.places(4, [3, 90])
        with pytest.raises(CellUnknownError, match="-1"):
            tree.places(4, [-1])
        with pytest.raises(LevelOutOfRangeError):
            tree.places(5, [0])
        assert tree.places(4, []) == []
        assert tree.places(4, [3]) == [rows[3].places[3]]
    with pytest.raises(RuntimeError, match="closed"):
        tree.places(4, [3])


def test_ordinals_follow_the_hilbert_curve_within_a_parent(tree: CellTree) -> None:
    for level in range(1, tree.level_count):
        for ordinal in range(tree.cell_counts[level - 1]):
            children = geodesy.token_to_cell_id(tree.tokens(level + 1, list(tree.children(level, ordinal))))
            assert np.all(np.diff(children.astype(object)) > 0)
