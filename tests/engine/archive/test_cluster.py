from __future__ import annotations

import contextlib
import logging
import os
import socket
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
from PIL import Image
from support.bundles import make_bundle, tiny_encoder
from typer.testing import CliRunner

from geosurge.archive import cluster as clusters
from geosurge.archive import run as runs
from geosurge.archive.cluster import CLUSTER_DIRECTORY, Cluster
from geosurge.archive.engines import open_index
from geosurge.archive.ledger import AnswerKey, Ledger
from geosurge.archive.locating import Asked
from geosurge.archive.outputs import read_rows
from geosurge.archive.rows import Row, Status
from geosurge.archive.run import Job, Plan, run
from geosurge.cli import app
from geosurge.errors import LedgerError, ServiceError, UsageError

ray = pytest.importorskip("ray", reason="needs the extra bulk: pip install 'geosurge[bulk]'")

_Seen = TypeVar("_Seen")

FEWEST_SLOTS = 3
BATCH_SIZE = 4
PATIENCE_SECONDS = 120.0

HOLDING = """
import os, signal, sys, time
from pathlib import Path

def wait():
    while Path(os.environ["HOLD_FILE"]).exists():
        time.sleep(0.01)

if any("geosurge.archive.decoding" in word for word in sys.orig_argv):
    from geosurge.archive.decoding import Decode

    decode = Decode.run

    def decode_as_named(task):
        if b"deadly" in task.found.path:
            os.kill(os.getpid(), signal.SIGKILL)
        if b"held" in task.found.path:
            wait()
        return decode(task)

    Decode.run = decode_as_named
elif any("default_worker.py" in word for word in sys.orig_argv):
    from geosurge.archive.engines import LocalEngine

    locate, seen = LocalEngine.locate, []

    def locate_when_let(engine, queries, options):
        if seen:
            wait()
        seen.append(queries)
        return locate(engine, queries, options)

    LocalEngine.locate = locate_when_let
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
    """Counts the pictures that are located."""

    count = 0

    def phase(self, name: str, total: int | None) -> Callable[[], None]:
        return self._located if name == "locating" else lambda: None

    def plan(self, plan: Plan) -> None:
        pass

    def _located(self) -> None:
        self.count += 1


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
        context = ray.init(
            "local", num_cpus=FEWEST_SLOTS, include_dashboard=False, log_to_driver=False, logging_level="error"
        )
        yield Setting(context.address_info["gcs_address"], bundle, hold_file)
        ray.shutdown()


def make_pictures(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in names:
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(folder / name)


def test_an_address_where_nobody_listens_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    # Comes first: once the process has a Ray, it is used.
    with pytest.raises(ServiceError, match=f"at 127.0.0.1:{port}: .*refused"), clusters._session(f"127.0.0.1:{port}"):
        pass


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
    here, there = (setting.rows(replace(job, sources=(*job.sources, str(tmp_path / "shard.tar")))) for job in jobs)
    assert there == here
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
            for name in ("_Decode", "_Locate"):
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
    note = clusters._note_answers

    def note_twice(ledger: Ledger, key: AnswerKey, asked: Asked, place: Path) -> None:
        answered.extend(pq.read_table(place / "answers")["id"].to_pylist())
        note(ledger, key, asked, place)
        # As if it had been killed before it removed them.
        note(ledger, key, asked, place)

    monkeypatch.setattr(clusters, "_note_answers", note_twice)
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
        patch.setattr(clusters, "_note_answers", fail)
        with pytest.raises(LedgerError):
            setting.rows(setting.job(folder, out))
    (folder / "4.jpg").unlink()
    os.utime(folder / "3.jpg", (0, 0))
    rows = setting.rows(setting.job(folder, out))
    assert rows == setting.rows(setting.job(folder, tmp_path / "here", on_ray=False))
    assert [row.status for row in rows] == [Status.DONE] * 4


def test_without_ray_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'geosurge\[bulk\]'"):
        Cluster("", tmp_path, "cpu", 1)


@pytest.mark.parametrize(
    ("words", "address", "sources"),
    [
        (["a", "--ray"], "", ["a"]),
        (["--ray", "a"], "", ["a"]),
        (["--ray", "--report", "a"], "", ["a"]),
        (["--ray", "local", "a"], "local", ["a"]),
        (["a", "--ray", "10.0.0.1:6379"], "10.0.0.1:6379", ["a"]),
        (["--ray=head:6379", "a", "b"], "head:6379", ["a", "b"]),
    ],
)
def test_the_address_of_ray_may_be_left_out(
    setting: Setting,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    address: str,
    sources: list[str],
) -> None:
    jobs: list[Job] = []
    monkeypatch.setattr(runs, "run", lambda job, *_, **__: jobs.append(job))
    ended = CliRunner().invoke(app, ["geotag", "--out", str(tmp_path), "--index", str(setting.bundle), *words])
    assert ended.exit_code == 0, ended.output
    assert jobs[0].cluster == Cluster(address, setting.bundle, "cpu", 32)
    assert jobs[0].sources == tuple(sources)


@pytest.mark.parametrize("words", [["--ray=here"], ["--ray=ray://head:10001"], ["--ray", "--server", "head:50051"]])
def test_what_is_no_address_of_ray_is_refused(tmp_path: Path, words: list[str]) -> None:
    ended = CliRunner().invoke(app, ["geotag", str(tmp_path), "--out", str(tmp_path / "out"), *words])
    assert ended.exit_code == UsageError.exit_code
    assert not (tmp_path / "out").exists()


def test_ray_chooses_among_gpus(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not cuda:1"):
        Cluster("", tmp_path, "cuda:1", 1)


@contextlib.contextmanager
def driver(setting: Setting, folder: Path, out: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command, in a process of its own."""
    words = ["geotag", folder, "--out", out, "--index", setting.bundle, "--batch-size", BATCH_SIZE]
    command = [sys.executable, "-m", "geosurge.cli", *map(str, words), "--ray", setting.address]
    with subprocess.Popen(command) as process:
        try:
            yield process
        finally:
            process.kill()


def checkpointed(out: Path) -> set[int]:
    """Pictures that a checkpoint has."""
    files = [path for path in out.glob("ray/*/checkpoint/*.parquet") if ".pending" not in path.name]
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
