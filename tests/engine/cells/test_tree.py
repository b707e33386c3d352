from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h3
import numpy as np
import pytest
import s2sphere
from support.cells import entity_rows, hexagon_rows

from geosurge import s2
from geosurge.cells import CellRows, CellTree, check_cell_tree, write_cell_tree
from geosurge.cells.records import RecordReader
from geosurge.errors import CellKindUnsupportedError, CellUnknownError, CoordinateOutOfRangeError, LevelOutOfRangeError
from geosurge.location import Place
from geosurge.v1 import cell_pb2


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


@pytest.mark.parametrize("store_outlines", [True, False])
def test_h3_cells_that_hold_a_coordinate(tmp_path: Path, store_outlines: bool) -> None:
    write_cell_tree(tmp_path / "h3", hexagon_rows(), store_outlines=store_outlines)
    with CellTree.open(tmp_path / "h3") as tree:
        check_cell_tree(tree)
        assert tree.cell_kind == "h3"
        assert not tree.cell(1, 0).HasField("s2_level")
        leaves = tree.tokens(3, range(tree.cell_counts[2]))
        rng = np.random.default_rng(5)
        latitudes, longitudes = rng.uniform(47, 51, 300), rng.uniform(0, 5, 300)
        found = tree.find_leaves(latitudes, longitudes)
        assert 20 < (found >= 0).sum() < 280
        for latitude, longitude, leaf in zip(latitudes, longitudes, found.tolist(), strict=True):
            finest = h3.latlng_to_cell(latitude, longitude, 15)
            ancestors = [h3.cell_to_parent(finest, resolution) for resolution in range(5)]
            path = [cell.token for cell in tree.path(latitude, longitude)]
            assert all(token in ancestors for token in path)
            holding = [token for token in ancestors if token in leaves]
            assert path[2:] == holding
            assert (leaves[leaf] if leaf >= 0 else None) == (holding[0] if holding else None)
        for corners, token in ((tree.cell(3, 4).outline, leaves[4]), (tree.find(leaves[9]).outline, leaves[9])):
            expected = h3.cell_to_boundary(token)
            assert [(corner.latitude_deg, corner.longitude_deg) for corner in corners] == list(expected)


def test_entity_trees_are_stored_but_have_no_paths(tmp_path: Path) -> None:
    write_cell_tree(tmp_path / "entities", entity_rows())
    with CellTree.open(tmp_path / "entities") as entities:
        check_cell_tree(entities)
        assert entities.cell_kind == "entity"
        assert not entities.cell(1, 0).HasField("s2_level")
        assert entities.places(1, [0]) == [None]
        for ask in (lambda: entities.path(0.0, 0.0), lambda: entities.find_leaves([0.0], [0.0])):
            with pytest.raises(CellKindUnsupportedError, match="does not know which of them holds a coordinate"):
                ask()
        assert entities.find("NA").ordinal == 1
        assert entities.find("NA/Khomas").ordinal == 1
        assert entities.find("NA/Khomas Region/Ω").level == 3
        assert entities.tokens(3, [2, 0]) == ["NA/Khomas Region/Ω", "CI/Bélier/Yamoussoukro"]
        assert entities.path_tokens(entities.ancestors([2])) == [["NA", "NA/Khomas Region", "NA/Khomas Region/Ω"]]


def test_only_s2_cells_have_s2_ids(tmp_path: Path) -> None:
    write_cell_tree(tmp_path / "tree", entity_rows())
    with CellTree.open(tmp_path / "tree") as tree, pytest.raises(CellKindUnsupportedError):
        tree.cell_ids(1)


def test_a_place_survives(tmp_path: Path) -> None:
    rows = [replace(entity_rows()[0], places=[None, Place("Windhoek", "Khomas", "Namibia", "NA", 3.25)])]
    write_cell_tree(tmp_path / "tree", rows)
    with CellTree.open(tmp_path / "tree") as tree:
        assert tree.places(1, [1, 0, 1]) == [rows[0].places[1], None, rows[0].places[1]]


def test_places_are_read_once_and_forgotten_when_they_are_too_many(
    rows: list[CellRows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cell_tree(tmp_path / "tree", rows)
    monkeypatch.setattr("geosurge.cells.tree.MAX_CACHED_PLACES", 10)
    read: list[int] = []
    with CellTree.open(tmp_path / "tree") as tree:
        read_record = RecordReader.read

        def counted(reader: RecordReader, level: int, ordinal: int) -> cell_pb2.Cell:
            read.append(ordinal)
            return read_record(reader, level, ordinal)

        monkeypatch.setattr(RecordReader, "read", counted)
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
            children = s2.token_to_cell_id(tree.tokens(level + 1, list(tree.children(level, ordinal))))
            assert np.all(np.diff(children.astype(object)) > 0)
