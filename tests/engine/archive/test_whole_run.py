"""A whole archive, as its owner runs it: the command, good and bad files, and the power going off."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from support.archives import write_views
from support.bad_archive import bound_by_permissions, can_bind_permissions, make_bad_archive
from support.processes import wait_until

from geosurge.archive.ledger import LEDGER_FILE, Ledger
from geosurge.archive.outputs import read_rows
from geosurge.archive.rows import Row, Status

VIEWS, BAD_FILES = 2000, 200


def command(sources: list[Path], out: Path) -> list[str]:
    names, forms = [str(source) for source in sources], ("--format", "csv", "--format", "parquet")
    return geotag(*names, "--out", str(out), "--write", "xmp", *forms)


def geotag(*arguments: str) -> list[str]:
    return bound_by_permissions([sys.executable, "-m", "geosurge.commands.cli", "geotag", *arguments])


def undo(out: Path) -> None:
    subprocess.run(geotag("--undo", str(out)), check=True, stdout=subprocess.DEVNULL)


def kill_at(sources: list[Path], out: Path, is_moment: Callable[[], bool]) -> None:
    """Begins the run, or goes on with it, and takes its power away at a moment when it is still under way."""
    run = subprocess.Popen(command(sources, out), stdout=subprocess.DEVNULL)
    wait_until(lambda: is_moment() or run.poll() is not None, "the moment to kill it")
    family = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, "it is killed before its end"
    wait_until(lambda: not any(map(psutil.Process.is_running, family)), "its processes end with it")


def noted(out: Path, condition: str) -> int:
    """Pictures in the ledger, as far as it is on the disk, for which a condition holds."""
    try:
        with contextlib.closing(sqlite3.connect(f"{(out / LEDGER_FILE).as_uri()}?mode=ro", uri=True)) as database:
            (count,) = database.execute(f"SELECT count(*) FROM picture WHERE {condition}").fetchone()
    except sqlite3.OperationalError:
        return 0  # There is no ledger yet.
    return int(count)


def run_id(out: Path) -> str:
    with Ledger.reopen(out) as ledger:
        return ledger.run_id


def contents(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob(pattern) if path.is_file()}


def count_sidecars(folder: Path) -> int:
    return sum(1 for _ in folder.rglob("*.xmp"))


def read_sidecars(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.xmp")}


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
    views = tmp_path / "views"
    truths = write_views(views, VIEWS)
    expected = make_bad_archive(tmp_path / "bad", BAD_FILES, permissions=True)
    # Where a name has no room left for the ending of a sidecar, nothing can be written.
    expected |= {path: (Status.FAILED, "INPUT_NOT_READABLE") for path in expected if len(Path(path).name) > 251}
    sources = [views, tmp_path / "bad"]
    before = contents(views), contents(tmp_path / "bad", "*.xmp")
    whole = subprocess.run(command(sources, tmp_path / "whole"), check=False)
    assert whole.returncode == 1

    rows = rows_without_timings(tmp_path / "whole")
    outcomes = {row.path: (row.status, row.reason) for row in rows}
    assert len(outcomes) == len(rows)
    assert outcomes == expected | {f"{views.resolve()}/{name}": (Status.DONE, "") for name in truths}

    sidecars = {name: text.replace(run_id(tmp_path / "whole"), "RUN") for name, text in read_sidecars(views).items()}
    assert sidecars.keys() == {f"{name}.xmp" for name in truths}
    undo(tmp_path / "whole")
    assert (contents(views), contents(tmp_path / "bad", "*.xmp")) == before

    # Until the last of them is killed, something is left to be located or written.
    chance, cut = random.Random(7), tmp_path / "cut"
    looked = [chance.randrange(1, VIEWS) for _ in range(2)]
    located = [chance.randrange(1, 7 * VIEWS // 10) for _ in range(5)]
    written = [chance.randrange(1, 8 * VIEWS // 10) for _ in range(3)]
    for least in sorted(looked):
        kill_at(sources, cut, lambda least=least: noted(cut, "is_looked_at") >= least)
    for least in sorted(located):
        more = max(least, noted(cut, "status = 'done'") + 1), count_sidecars(views) + 1
        kill_at(
            sources,
            cut,
            # A fast machine may have located the rest between two commits.
            lambda more=more: noted(cut, "status = 'done'") >= more[0] or count_sidecars(views) >= more[1],
        )
    for least in sorted(written):
        kill_at(sources, cut, lambda least=least: count_sidecars(views) >= least)
    assert count_sidecars(views) < VIEWS, "the last one was killed while it wrote"
    last = subprocess.run(command(sources, cut), capture_output=True, check=False)
    assert last.returncode == 1
    assert lines_without_timings(cut) == lines_without_timings(tmp_path / "whole")
    assert rows_without_timings(cut) == rows
    assert {name: text.replace(run_id(cut), "RUN") for name, text in read_sidecars(views).items()} == sidecars
    counts = Counter(status for status, _ in outcomes.values())
    assert f"{len(rows):,} pictures: {counts['done']:,} done, 0 skipped, 0 withheld, {counts['failed']:,} failed" in (
        last.stdout.decode()
    )
    undo(cut)
    assert (contents(views), contents(tmp_path / "bad", "*.xmp")) == before
