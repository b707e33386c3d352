from __future__ import annotations

from pathlib import Path

import pytest

from geosurge_training.aside import written_aside


def test_a_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "run" / "result.json"
    for text in ("one", "two"):
        with written_aside(path) as aside:
            aside.write_text(text)
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_was_not_finished_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("before")

    def cut_off(aside: Path) -> None:
        aside.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), written_aside(path) as aside:
        cut_off(aside)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
