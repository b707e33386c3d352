from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.limits import limited
from support.rows import DONE, ROWS, many

from geosurge.archive.outputs import Format, write_outputs
from geosurge.archive.rows import Row
from geosurge.errors import OutputNotWritableError


@pytest.mark.parametrize("form", list(Format))
def test_a_full_disk_leaves_what_was_there_before_and_nothing_else(tmp_path: Path, form: Format) -> None:
    (path,) = write_outputs(ROWS, tmp_path, [form])
    before = path.read_bytes()
    with (
        limited(resource.RLIMIT_FSIZE, 4096),
        pytest.raises(OutputNotWritableError, match=rf"results\.{form}: .*make room"),
    ):
        write_outputs(many(9000), tmp_path, [form])
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_rows_that_end_with_an_error_leave_no_file(tmp_path: Path) -> None:
    def broken() -> Iterator[Row]:
        yield DONE
        raise RuntimeError("the ledger is gone")

    with pytest.raises(RuntimeError, match="the ledger is gone"):
        write_outputs(broken(), tmp_path, list(Format))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".results.csv.partial").write_bytes(b"half a row" * 1000)
    (path,) = write_outputs([], tmp_path, [Format.CSV])
    assert b"half" not in path.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputNotWritableError, match=r"cannot write .*file/results\.parquet"):
        write_outputs(ROWS, tmp_path / "file", [Format.PARQUET])
