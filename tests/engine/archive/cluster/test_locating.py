from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support.bundles import make_bundle, tiny_encoder

from geosurge.archive.backends import open_index
from geosurge.archive.cluster import CLUSTER_DIRECTORY, Cluster, locating
from geosurge.archive.cluster.parts import note_answers
from geosurge.archive.ledger import LEDGER_FILE, AnswerKey, Ledger
from geosurge.archive.locating import Progress, Thresholds
from geosurge.archive.outputs import read_rows
from geosurge.archive.rows import Row, Status
from geosurge.archive.run import Job, Plan, run
from geosurge.cores import usable_cores
from geosurge.errors import LedgerError, UsageError
from geosurge.location import LocateOptions

ray = pytest.importorskip("ray", reason="needs the extra bulk: pip install 'geosurge[bulk]'")

_Seen = TypeVar("_Seen")

FEWEST_SLOTS = 3
BATCH_SIZE = 4
PATIENCE_SECONDS = 300.0

HOLDING = """
import os, signal, sys, time
from pathlib import Path

def wait():
    while Path(os.environ["HOLD_FILE"]).exists():
        time.sleep(0.01)

if any("geosurge.archive.pool" in word for word in sys.orig_argv):
    from geosurge.archive.tasks import Decode

    decode = Decode.run

    def decode_as_named(task):
        if b"deadly" in task.found.path:
            os.kill(os.getpid(), signal.SIGKILL)
        if b"held" in task.found.path:
            wait()
        return decode(task)

    Decode.run = decode_as_named
elif any("default_worker.py" in word for word in sys.orig_argv):
    from geosurge.archive.backends import LocalBackend

    locate, seen = LocalBackend.locate, []

    def locate_when_let(backend, queries, options):
        if seen:
            wait()
        seen.append(queries)
        return locate(backend, queries, options)

    LocalBackend.locate = locate_when_let
"""
"""Runs in Ray's workers and in processes that decode, before anything else.

A picture's name decides whether it ends the process that decodes it, like one that a codec cannot bear, or is held
while there is a file HOLD_FILE; meanwhile, no actor locates more than one batch.
"""


@dataclass(frozen=True)
class Setting:
    """A Ray that runs, and an index.

    Attributes:
        address: Of the Ray.
        bundle: The index.
        hold_file: Holds what it does.
    """

    address: str
    bundle: Path
    hold_file: Path

    def job(self, folder: Path, out: Path, *, on_ray: bool = True) -> Job:
        cluster = Cluster(self.address, self.bundle, "cpu", BATCH_SIZE) if on_ray else None
        return Job((str(folder),), out, workers=2, cluster=cluster)

    def rows(self, job: Job, observer: Watcher | None = None) -> list[Row]:
        """Does a run; its rows, without timings."""
        run(job, lambda: open_index(self.bundle, "cpu", BATCH_SIZE), observer or Watcher())
        return [replace(row, timings=None) for row in read_rows(job.directory / "results.parquet")]


class Watcher:
    """Counts the pictures that are located, and those of them that failed."""

    count = 0
    failures = 0

    def phase(self, name: str, total: int | None) -> Progress:
        return self._located if name == "locating" else lambda *, failed=False: None

    def plan(self, plan: Plan) -> None:
        pass

    def _located(self, *, failed: bool = False) -> None:
        self.count += 1
        self.failures += failed


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    directory = tmp_path_factory.mktemp("cluster")
    (directory / "sitecustomize.py").write_text(HOLDING)
    hold_file = directory / "hold"
    bundle = make_bundle(directory / "bundle", encoder=tiny_encoder())
    with pytest.MonkeyPatch.context() as patch:
        # Ray's workers get it from the environment, processes that decode from those that start them.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])]))
        patch.syspath_prepend(directory)
        patch.setenv("HOLD_FILE", str(hold_file))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # As those of the cluster's actors, whatever the tests run with: by their number batches are cut, and rounded.
        threads = torch.get_num_threads()
        torch.set_num_threads(usable_cores())
        context = ray.init(
            "local", num_cpus=FEWEST_SLOTS, include_dashboard=False, log_to_driver=False, logging_level="error"
        )
        yield Setting(context.address_info["gcs_address"], bundle, hold_file)
        ray.shutdown()
        torch.set_num_threads(threads)


def make_pictures(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in names:
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(folder / name)


def test_rows_are_those_of_a_run_without_it(setting: Setting, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "pictures"
    make_pictures(folder, [*(f"{number}.jpg" for number in range(9)), "deadly.jpg", "naïve \\ name.png"])
    (folder / "0 again.jpg").write_bytes((folder / "0.jpg").read_bytes())
    (folder / "empty.jpg").touch()
    (folder / "video.jpg").write_bytes(b"\0\0\0\x18ftypmp42")
    (folder / os.fsdecode(b"latin \xe9.jpg")).write_bytes((folder / "1.jpg").read_bytes()[:-100])
    make_pictures(tmp_path / "members", ["a.png", "b.png"])
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        shard.add(tmp_path / "members", "members")
    jobs = [setting.job(folder, tmp_path / f"a=b #{on_ray}", on_ray=on_ray) for on_ray in (False, True)]
    watchers = Watcher(), Watcher()
    here, there = (
        setting.rows(replace(job, sources=(*job.sources, str(tmp_path / "shard.tar"))), watcher)
        for job, watcher in zip(jobs, watchers, strict=True)
    )
    assert there == here
    assert [(watcher.count, watcher.failures) for watcher in watchers] == [(17, 4)] * 2
    assert {row.reason for row in there} == {
        "",
        "DECODER_CRASHED",
        "IMAGE_EMPTY",
        "IMAGE_FORMAT_UNSUPPORTED",
        "IMAGE_TRUNCATED",
    }
    assert not (jobs[1].directory / CLUSTER_DIRECTORY).exists()
    # Ray lends the caller's handlers to its own loggers.
    logging.getLogger("geosurge.test").warning("still heard")
    assert "still heard" in caplog.text


def test_workers_that_are_killed_cost_no_picture(setting: Setting, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    make_pictures(folder, [*(f"{number}.jpg" for number in range(9)), *(f"held {number}.jpg" for number in range(4))])
    setting.hold_file.touch()
    watcher = Watcher()
    with ThreadPoolExecutor(1) as threads:
        try:
            rows = threads.submit(setting.rows, setting.job(folder, tmp_path / "out"), watcher)
            wait_until(lambda: watcher.count)
            for name in ("DecodeStep", "LocateStep"):
                wait_until(lambda name=name: next(ray_workers(name), None)).kill()
        finally:
            setting.hold_file.unlink()
        there = rows.result()
    assert there == setting.rows(setting.job(folder, tmp_path / "here", on_ray=False))
    assert watcher.count == len(there) == 13


def test_a_run_that_was_killed_goes_on_from_its_checkpoint(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tmp_path / "pictures", tmp_path / "out"
    make_pictures(folder, [f"{number}.jpg" for number in range(13)])
    setting.hold_file.touch()
    try:
        with driver(setting, folder, out) as process:
            done = wait_until(lambda: process.poll() is not None or checkpointed(out))
    finally:
        setting.hold_file.unlink()
    assert isinstance(done, set)
    assert len(done) == BATCH_SIZE
    answered: list[int] = []
    note = note_answers

    def note_twice(ledger: Ledger, key: AnswerKey, thresholds: Thresholds, exchange: Path) -> None:
        answered.extend(pq.read_table(exchange / "answers")["id"].to_pylist())
        note(ledger, key, thresholds, exchange)
        # As if it had been killed before it removed them.
        note(ledger, key, thresholds, exchange)

    monkeypatch.setattr(locating, "note_answers", note_twice)
    rows = setting.rows(setting.job(folder, out))
    assert done < set(answered)
    assert len(answered) == len(set(answered)) == 13
    assert rows == setting.rows(setting.job(folder, tmp_path / "here", on_ray=False))


def test_a_run_whose_pictures_are_all_in_the_checkpoint_ends(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tmp_path / "pictures", tmp_path / "out"
    make_pictures(folder, [f"{number}.jpg" for number in range(5)])

    def fail(*_: object) -> None:
        raise LedgerError("made to fail")

    with monkeypatch.context() as patch:
        patch.setattr(locating, "note_answers", fail)
        with pytest.raises(LedgerError):
            setting.rows(setting.job(folder, out))
    (folder / "4.jpg").unlink()
    os.utime(folder / "3.jpg", (0, 0))
    rows = setting.rows(setting.job(folder, out))
    assert rows == setting.rows(setting.job(folder, tmp_path / "here", on_ray=False))
    assert [row.status for row in rows] == [Status.DONE] * 4


def test_options_that_cannot_be_answered_are_refused_before_any_work(setting: Setting, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    make_pictures(folder, ["0.jpg"])
    job = replace(setting.job(folder, tmp_path / "out"), options=LocateOptions(region_tokens=("nowhere",)))
    with pytest.raises(UsageError, match="nowhere"):
        setting.rows(job)
    assert [path.name for path in job.directory.iterdir()] == [LEDGER_FILE]
    assert len(setting.rows(setting.job(folder, tmp_path / "out"))) == 1


def test_only_what_the_run_itself_made_is_removed(setting: Setting, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    make_pictures(folder, ["0.jpg"])
    make_pictures(folder / "ray", ["1.jpg"])
    other = folder / CLUSTER_DIRECTORY / "other"
    other.mkdir(parents=True)
    rows = setting.rows(setting.job(folder, folder))
    assert [(Path(row.path).name, row.status) for row in rows] == [("0.jpg", Status.DONE), ("1.jpg", Status.DONE)]
    assert (folder / "ray" / "1.jpg").exists()
    assert list((folder / CLUSTER_DIRECTORY).iterdir()) == [other]


@contextlib.contextmanager
def driver(setting: Setting, folder: Path, out: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command, in a process of its own."""
    words = ["geotag", folder, "--out", out, "--index", setting.bundle, "--batch-size", BATCH_SIZE]
    command = [sys.executable, "-m", "geosurge.commands.cli", *map(str, words), "--ray", setting.address]
    with subprocess.Popen(command) as process:
        try:
            yield process
        finally:
            process.kill()


def checkpointed(out: Path) -> set[int]:
    """Pictures that a checkpoint has."""
    files = [path for path in out.glob(f"{CLUSTER_DIRECTORY}/*/checkpoint/*.parquet") if ".pending" not in path.name]
    return {value for path in files for value in pq.read_table(path)["id"].to_pylist()}


def ray_workers(name: str) -> Iterator[psutil.Process]:
    """Processes that do one step of a run just now."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if (words := process.cmdline()) and words[0].startswith("ray::") and name in words[0]:
                yield process


def wait_until(look: Callable[[], _Seen]) -> _Seen:
    give_up = time.monotonic() + PATIENCE_SECONDS
    while not (seen := look()):
        assert time.monotonic() < give_up
        time.sleep(0.05)
    return seen
