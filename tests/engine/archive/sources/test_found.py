from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from geosurge.archive.sources import Found, scan


def test_size_time_and_content_are_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("a.jpg")
    os.utime(tmp_path / "a.jpg", ns=(1, 1_234_567_890_123_456_789))
    (found,) = scan([tmp_path])
    assert found == Found(os.fsencode(tmp_path / "a.jpg"), size=5, mtime_ns=1_234_567_890_123_456_789)
    assert not found.is_member
    with found.open() as file:
        assert file.read() == b"a.jpg"
    assert pickle.loads(pickle.dumps(found)) == found


def test_names_that_are_no_text(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/caf\xe9\\\n.jpg"
    Path(os.fsdecode(raw)).write_text("x")
    (found,) = scan([tmp_path])
    assert found.path == raw
    assert found.name == f"{tmp_path}/caf\\xe9\\\\\\x0a.jpg"
    with found.open() as file:
        assert file.read() == b"x"


def test_what_became_a_pipe_meanwhile_is_never_waited_for(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    (found,) = scan([tmp_path])
    (tmp_path / "a.jpg").unlink()
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(OSError, match="not a regular file"):
        found.open()
