"""A whole archive, as its owner runs it: the command, good and bad files, and the power going off."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from support.archives import write_views
from support.bad_archive import bound_by_permissions, can_bind_permissions, make_bad_archive
from support.processes import wait_until

from geosurge.archive.outputs import read_rows
from geosurge.archive.rows import Row, Status

VIEWS, BAD_FILES, KILLS = 2000, 200, 10


def command(sources: list[Path], out: Path, *flags: str) -> list[str]:
    names = [str(source) for source in sources]
    return bound_by_permissions([sys.executable, "-m", "geosurge.cli", "geotag", *names, "--out", str(out), *flags])


def rows_without_timings(out: Path) -> list[Row]:
    return [replace(row, timings=None) for row in read_rows(out / "results.parquet")]


def lines_without_timings(out: Path) -> bytes:
    """The rows as CSV, sorted, up to the columns of timings, which come last."""
    lines = (out / "results.csv").read_bytes().splitlines()
    heading = lines[0].split(b",")
    timings = sum(name.startswith(b"timings_") for name in heading)
    assert all(name.startswith(b"timings_") for name in heading[-timings:])
    return b"\n".join(sorted(line.rsplit(b",", timings)[0] for line in lines))


@pytest.mark.timeout(1200)
def test_rows_equal_files_whatever_they_are_and_however_often_the_power_fails(tmp_path: Path) -> None:
    if not can_bind_permissions():
        assert not os.environ.get("CI"), "setpriv is missing"
        pytest.skip("nothing here can take root's right to read everything away")
    truths = write_views(tmp_path / "views", VIEWS)
    expected = make_bad_archive(tmp_path / "bad", BAD_FILES, permissions=True)
    sources = [tmp_path / "views", tmp_path / "bad"]
    whole = subprocess.run(command(sources, tmp_path / "whole", "--format", "csv", "--format", "parquet"), check=False)
    assert whole.returncode == 1

    rows = rows_without_timings(tmp_path / "whole")
    outcomes = {row.path: (row.status, row.reason) for row in rows}
    assert len(outcomes) == len(rows)
    assert outcomes == expected | {f"{(tmp_path / 'views').resolve()}/{name}": (Status.DONE, "") for name in truths}

    chance, kills = random.Random(7), 0
    while kills < KILLS:
        run = subprocess.Popen(
            command(sources, tmp_path / "cut", "--format", "csv", "--format", "parquet"), stdout=subprocess.DEVNULL
        )
        time.sleep(chance.uniform(0.5, 9.0))
        family = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(signal.SIGKILL)
        run.wait()
        kills += 1
        wait_until(lambda family=family: not any(map(psutil.Process.is_running, family)), "its processes end with it")
    last = subprocess.run(
        command(sources, tmp_path / "cut", "--format", "csv", "--format", "parquet"), capture_output=True, check=False
    )
    assert last.returncode == 1
    assert lines_without_timings(tmp_path / "cut") == lines_without_timings(tmp_path / "whole")
    assert rows_without_timings(tmp_path / "cut") == rows
    counts = Counter(status for status, _ in outcomes.values())
    assert f"{len(rows):,} pictures: {counts['done']:,} done, 0 skipped, 0 withheld, {counts['failed']:,} failed" in (
        last.stdout.decode()
    )
