from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import lmdb
import pytest

from geosurge.cells import DATA_FILE, CellRows, CellTree, verify_cell_file, write_cell_tree
from geosurge.errors import BundleCorruptError, BundlePartialError


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
        from geosurge.cells import CellTree, check_cell_tree
        from geosurge.errors import BundleCorruptError
        try:
            check_cell_tree(CellTree.open(Path(sys.argv[1])))
        except BundleCorruptError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, DATA_FILE in done.stdout) == (0, True), done.stderr
