from __future__ import annotations

from pathlib import Path

import pytest

from geosurge.durable_files import replace_file


def test_a_file_gets_new_content_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "CURRENT"
    for content in (b"first\n", b"second, and longer\n", b""):
        replace_file(file, content)
        assert file.read_bytes() == content
        assert list(tmp_path.iterdir()) == [file]


def test_content_that_cannot_be_put_in_place_leaves_the_old(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "kept").touch()
    with pytest.raises(OSError, match="taken"):
        replace_file(taken, b"new")
    assert (taken / "kept").exists()
