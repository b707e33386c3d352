from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from support import exiftool
from support.bad_archive import picture, with_gps
from support.bundles import make_bundle, tiny_encoder
from support.processes import SLOW_ENCODER, server_process, wait_until
from support.servers import background_server, settings_for
from typer.testing import CliRunner, Result

from geosurge.archive import run as runs
from geosurge.archive.audit import audit
from geosurge.archive.cluster import Cluster
from geosurge.archive.ledger import LEDGER_FILE, Ledger
from geosurge.archive.outputs import read_rows
from geosurge.archive.rows import Row, Status
from geosurge.archive.run import Job
from geosurge.commands import cli, geotag_display

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra bulk: pip install 'geosurge[bulk]'")
SLOWLY = {"ENCODE_SECONDS": "0.2"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("index") / "tiny", encoder=tiny_encoder())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures, of which one has a position and one is none."""
    path = tmp_path / "photos"
    path.mkdir()
    for number in range(4):
        (path / f"{number}.jpg").write_bytes(picture(number))
    (path / "placed.jpg").write_bytes(with_gps(7, 20.0, 30.0))
    (path / "text.jpg").write_bytes(b"Dear diary")
    (path / "notes.txt").write_text("nothing")
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def geotag(*arguments: str | Path, check: int = 0) -> Result:
    """Runs the command in this process and checks its exit code."""
    done = CliRunner().invoke(cli.app, ["geotag", *map(str, arguments)])
    assert done.exit_code == check, done.output
    return done


def started(*arguments: str | Path) -> subprocess.Popen[str]:
    """Starts the command as a shell does, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "geosurge.commands.cli", "geotag", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # What runs the tests may ignore Ctrl-C, as jobs in the background do, and would hand that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509 - no threads here
    )


def located(out: Path) -> int:
    """Pictures that a run in another process has located so far."""
    with contextlib.suppress(sqlite3.OperationalError):
        database = sqlite3.connect(f"file:{out / LEDGER_FILE}?mode=ro", uri=True)
        try:
            (count,) = database.execute("SELECT count(*) FROM picture WHERE status = 'done'").fetchone()
            return int(count)
        finally:
            database.close()
    return 0


def read_all(descriptor: int) -> str:
    """What is written to a terminal until nobody has it open any more."""
    data = bytearray()
    with contextlib.suppress(OSError):
        while chunk := os.read(descriptor, 65536):
            data += chunk
    os.close(descriptor)
    return data.decode()


def rows(out: Path) -> dict[str, Row]:
    return {Path(row.path).name: replace(row, timings=None) for row in read_rows(out / "results.parquet")}


def test_an_archive_is_geotagged(folder: Path, out: Path, bundle: Path) -> None:
    done = geotag(
        folder, "--out", out, "--index", bundle, "--format", "csv", "--format", "parquet", "--report", check=1
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "6 pictures found: 5 to locate, 1 with a position, 0 done"
    assert lines[1] == "passed over: 1 other file (1 .txt)"
    assert lines[2] == "6 pictures: 4 done, 1 skipped, 0 withheld, 1 failed"
    assert re.fullmatch(r"4 located in \d+ s, \d+\.\d a second", lines[3])
    assert re.search(rf"IMAGE_NOT_DECODABLE\W+1\W+{folder}/text.jpg", done.stdout)
    for name in ("results.csv", "results.parquet", "report.html"):
        assert f"written: {out / name}" in lines
        assert (out / name).stat().st_size > 0
    assert {row.status for row in rows(out).values()} == {Status.DONE, Status.SKIPPED, Status.FAILED}

    (folder / "text.jpg").unlink()
    again = geotag(folder, "--out", out, "--index", bundle)
    assert again.stdout.startswith("5 pictures found: 0 to locate, 1 with a position, 4 done\n")
    assert "5 pictures: 4 done, 1 skipped, 0 withheld, 0 failed\nwritten" in again.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "name at least one SOURCE"),
        (["--out", "out"], "name at least one SOURCE"),
        (["photos"], "name a directory for the results: --out DIR"),
        (["photos", "--out", ""], "an argument is empty"),
        (["photos", "", "--out", "out"], "an argument is empty"),
        (["--undo="], "an argument is empty"),
        (["photos", "--out", "out", "--device", "gpu"], "the device 'gpu' is unknown"),
        (["photos", "--out", "out", "--device", "cuda:99"], "PyTorch sees"),
        (["photos", "--out", "out", "--in-place"], "--in-place belongs to --write exif"),
        (["photos", "--out", "out", "--write", "exif"], "needs --in-place"),
        (["photos", "--out", "out", "--write", "xmp", "--in-place"], "--in-place belongs to --write exif"),
        (["photos", "--out", "out", "--audit", "--write", "xmp"], "leave out --write and the thresholds"),
        (["photos", "--out", "out", "--audit", "--min-probability", "0.5"], "leave out --write and the thresholds"),
        (["photos", "--out", "out", "--audit", "--max-radius-km", "50"], "leave out --write and the thresholds"),
        (["photos", "--out", "out", "--server", "localhost:1", "--index", "i"], "leave out --index and --device"),
        (["photos", "--out", "out", "--server", "localhost:1", "--device", "cpu"], "leave out --index and --device"),
        (["photos", "--undo", "out"], "--undo DIR stands alone"),
        (["--undo", "out", "--write", "xmp"], "--undo DIR stands alone"),
        (["--undo", "photos"], "holds no run"),
        (["nowhere", "--out", "out"], "nowhere"),
        (["photos", "--out", "out", "--glob", "["], "glob"),
        (
            ["photos", "--out", "out", "--glob", "*.jepg"],
            "no pictures found in photos: looked for what --glob *.jepg takes",
        ),
        (["photos", "--out", "photos/0.jpg/out"], "another directory"),
        (["photos", "--out", "photos/0.jpg"], "photos/0.jpg cannot be made: it is a file; name another directory"),
    ],
)
def test_wrong_usage_is_told_and_leaves_nothing(
    flags: list[str], message: str, folder: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("GEOSURGE_INDEX", str(bundle))
    before = sorted(folder.parent.rglob("*"))
    done = geotag(*flags, check=2)
    assert message in re.sub(r"\s+", " ", done.stderr)
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize(
    "flags",
    [
        ["photos"],
        ["--out", "out"],
        ["--dry-run"],
        ["--write", "exif"],
        ["--in-place"],
        ["--min-probability", "0.5"],
        ["--max-radius-km", "50"],
        ["--format", "csv"],
        ["--report"],
        ["--audit"],
        ["--relocate"],
        ["--glob", "*.jpg"],
        ["--index", "i"],
        ["--server", "localhost:1"],
        ["--device", "cpu"],
        ["--batch-size", "8"],
        ["--workers", "2"],
        ["--ray"],
        ["--timeout", "9"],
        ["--top-k", "3"],
        ["--beam-width", "9"],
        ["--exact"],
        ["--confidence-level", "0.5"],
        ["--region", "1"],
        ["--tls-ca", "f"],
        ["--tls"],
        ["--tls-certificate", "f"],
        ["--tls-key", "f"],
        ["--token-file", "f"],
    ],
    ids=lambda flags: flags[0],
)
def test_nothing_stands_beside_undo(flags: list[str], tmp_path: Path) -> None:
    done = geotag("--undo", tmp_path, *flags, check=2)
    assert "--undo DIR stands alone: " in done.stderr
    assert done.stderr.endswith(f"leave out {flags[0] if flags[0].startswith('--') else 'SOURCE'}\n")


def test_a_wrong_index_is_told_before_the_archive_is_searched(folder: Path, out: Path, tmp_path: Path) -> None:
    assert "nowhere" in geotag(folder, "--out", out, "--index", tmp_path / "nowhere", check=3).stderr
    bare = make_bundle(tmp_path / "bare")
    assert "has no encoder" in geotag(folder, "--out", out, "--index", bare, check=3).stderr
    assert not out.exists()
    with server_process(bare) as server:
        assert "has no encoder" in geotag(folder, "--out", out, "--server", server.address, check=3).stderr


def test_a_dry_run_prints_the_plan_and_leaves_nothing(folder: Path, out: Path, bundle: Path) -> None:
    done = geotag(folder, "--out", out, "--index", bundle, "--dry-run", "--write", "xmp")
    assert done.stdout.splitlines() == [
        "6 pictures found: 5 to locate, 1 with a position, 0 done",
        "passed over: 1 other file (1 .txt)",
    ]
    assert not out.exists()
    assert len(list(folder.iterdir())) == 7


def test_globs_and_ignore_files_choose_what_is_located(folder: Path, out: Path, bundle: Path) -> None:
    (folder / ".geosurgeignore").write_text("3.jpg\n")
    geotag(folder, "--out", out, "--index", bundle, "--glob", "?.jpg", "--glob", "!1.jpg")
    assert list(rows(out)) == ["0.jpg", "2.jpg"]


def test_other_options_and_runs_under_way_are_refused(folder: Path, out: Path, bundle: Path) -> None:
    geotag(folder, "--out", out, "--index", bundle, check=1)
    done = geotag(folder, "--out", out, "--index", bundle, "--top-k", "3", "--min-probability", "0.5", check=2)
    message = re.sub(r"\s+", " ", done.stderr)
    assert "min_probability was 0.0 and is now 0.5, top_k was 5 and is now 3" in message
    with Ledger.reopen(out):
        assert "is under way" in geotag(folder, "--out", out, "--index", bundle, check=2).stderr
        assert "is under way" in geotag("--undo", out, check=2).stderr


def test_the_plan_of_a_run_says_what_has_become_of_every_picture(folder: Path, out: Path, bundle: Path) -> None:
    flags = (folder, "--out", out, "--index", bundle, "--min-probability", "1")
    geotag(*flags, check=1)
    done = geotag(*flags, "--dry-run")
    assert done.stdout.splitlines()[0] == (
        "6 pictures found: 0 to locate, 1 with a position, 0 done, 4 withheld, 1 failed (1 IMAGE_NOT_DECODABLE)"
    )
    audited = geotag(folder / "0.jpg", "--out", out.with_name("audit"), "--index", bundle, "--audit", "--dry-run")
    assert audited.stdout == "1 picture found: 0 to locate, 1 without a position, 0 done\n"


def test_folders_may_have_names_that_are_not_utf_8(folder: Path, tmp_path: Path, bundle: Path) -> None:
    named, out = (tmp_path / os.fsdecode(name) for name in (b"caf\xe9", b"r\xe9sultats"))
    folder.rename(named)
    (named / os.fsdecode(b"notes.t\xe9xt")).touch()
    (named / "text.jpg").unlink()
    # In this process, output would go through what tests put in the place of a terminal.
    run = started(named, "--out", out, "--index", bundle, "--report", "--write", "xmp")
    stdout, stderr = run.communicate(timeout=60)
    assert (run.returncode, stderr) == (0, "")
    shown = f"{tmp_path}/r\\xe9sultats"
    assert f"written: {shown}/report.html\n" in stdout
    assert f"to take back what was: geosurge geotag --undo {shown}\n" in stdout
    assert "caf\\xe9" in (out / "report.html").read_text()


@needs_ray
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
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    address: str,
    sources: list[str],
) -> None:
    jobs: list[Job] = []
    monkeypatch.setattr(runs, "run", lambda job, *_, **__: jobs.append(job))
    geotag("--out", tmp_path, "--index", bundle, *words)
    assert jobs[0].cluster == Cluster(address, bundle, "cpu", 32)
    assert jobs[0].sources == tuple(sources)


@pytest.mark.parametrize("words", [["--ray=here"], ["--ray=ray://head:10001"], ["--ray", "--server", "head:50051"]])
def test_what_is_no_address_of_ray_is_refused(tmp_path: Path, words: list[str]) -> None:
    geotag(tmp_path, "--out", tmp_path / "out", *words, check=2)
    assert not (tmp_path / "out").exists()


def test_thresholds_hold_guesses_back(folder: Path, out: Path, bundle: Path) -> None:
    done = geotag(folder, "--out", out, "--index", bundle, "--max-radius-km", "1", "--write", "xmp", check=1)
    assert "6 pictures: 0 done, 1 skipped, 4 withheld, 1 failed" in done.stdout
    assert rows(out)["0.jpg"].reason == "RADIUS_TOO_LARGE"
    assert rows(out)["0.jpg"].latitude_deg is None
    assert list(folder.glob("*.xmp")) == []


@pytest.mark.parametrize("kind", [["--write", "xmp"], ["--write", "exif", "--in-place"]])
def test_what_was_written_can_be_taken_back(kind: list[str], folder: Path, out: Path, bundle: Path) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    done = geotag(folder, "--out", out, "--index", bundle, *kind, check=1)
    assert f"4 positions written; to take back what was: geosurge geotag --undo {out}\n" in done.stdout
    targets = [folder / (f"{number}.jpg.xmp" if kind[1] == "xmp" else f"{number}.jpg") for number in range(4)]
    for path, tags in exiftool.read_tags(targets).items():
        row = rows(out)[path.name.removesuffix(".xmp")]
        assert exiftool.position(tags) == pytest.approx((row.latitude_deg, row.longitude_deg), abs=1e-6)
    done = geotag("--undo", out)
    assert done.stdout == "taken back from 4 files; 0 left as they are\n"
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert geotag("--undo", out).stdout == "taken back from 0 files; 0 left as they are\n"


def test_an_undo_says_what_it_leaves_as_it_is(folder: Path, out: Path, bundle: Path) -> None:
    geotag(folder, "--out", out, "--index", bundle, "--write", "xmp", check=1)
    sidecar = folder / "2.jpg.xmp"
    sidecar.write_text(re.sub(r"<exif:GPSLatitude>[^<]*<", "<exif:GPSLatitude>12,30.0N<", sidecar.read_text()))
    done = geotag("--undo", out, check=1)
    assert f"{sidecar}: left as it is: " in done.stdout
    assert done.stdout.endswith("taken back from 3 files; 1 left as they are\n")
    assert list(folder.glob("*.xmp")) == [sidecar]


def test_an_audit_is_printed_and_written(folder: Path, out: Path, bundle: Path) -> None:
    for number in range(9):
        (folder / f"placed{number}.jpg").write_bytes(with_gps(70 + number, 5.0 + number, 10.0 * number))
    done = geotag(folder, "--out", out, "--index", bundle, "--audit")
    found = audit(read_rows(out / "results.parquet"))
    assert found is not None
    assert f"{found.count:,} compared: median error {found.median_km:,.0f} km" in done.stdout
    assert f"{found.inside_radius:.1%} lie inside the radius, which claims 90%" in done.stdout
    assert found.count == 10
    assert Path(found.worst[0].path).name in re.sub(r"[\s│|]+", "", done.stdout)
    written = json.loads((out / "audit.json").read_text())
    assert written == json.loads(json.dumps(asdict(found)))
    assert "written: " in done.stdout


def test_an_audit_without_positions_says_so(folder: Path, out: Path, bundle: Path) -> None:
    (folder / "placed.jpg").unlink()
    done = geotag(folder, "--out", out, "--index", bundle, "--audit")
    assert "5 pictures: 0 done, 5 skipped" in done.stdout
    assert "nothing to compare: no picture has a position" in done.stdout
    assert not (out / "audit.json").exists()


def test_whatever_ends_a_run_the_next_one_does_the_rest(folder: Path, out: Path, bundle: Path) -> None:
    """A run at a server, which gives the same rows as the index, is ended by Ctrl-C and then by the server's end."""
    for number in range(60):
        (folder / f"more{number}.jpg").write_bytes(picture(100 + number))
    (folder / "text.jpg").unlink()
    geotag(folder, "--out", out, "--index", bundle)
    served = out.with_name("served")
    with server_process(bundle, prelude=SLOW_ENCODER, environment=SLOWLY, max_batch_size=2) as server:
        flags = (folder, "--out", served, "--server", server.address, "--batch-size", "2", "--timeout", "20")
        run = started(*flags)
        wait_until(lambda: located(served) >= 4, "some pictures are located")
        family = psutil.Process(run.pid).children(recursive=True)
        os.killpg(run.pid, signal.SIGINT)
        _, stderr = run.communicate(timeout=60)
        assert run.returncode == 130
        assert stderr == "interrupted; give the same command again to do the rest\n"
        wait_until(lambda: not any(map(psutil.Process.is_running, family)), "its processes end with it")
        first = located(served)
        assert 4 <= first < 64

        run = started(*flags)
        wait_until(lambda: located(served) >= first + 4, "more pictures are located")
        server.send(signal.SIGKILL)
        stdout, stderr = run.communicate(timeout=60)
        assert run.returncode == 3, stderr
        assert f"65 pictures found: {64 - first} to locate, 1 with a position, {first} done" in stdout
        assert server.address in stderr
        assert "Traceback" not in stderr
        second = located(served)
        assert first + 4 <= second < 64

    done = geotag(folder, "--out", served, "--index", bundle)
    assert f"65 pictures found: {64 - second} to locate, 1 with a position, {second} done" in done.stdout
    assert "65 pictures: 64 done, 1 skipped, 0 withheld, 0 failed" in done.stdout
    expected = rows(out)
    assert rows(served).keys() == expected.keys()
    inexact = {"latitude_deg", "longitude_deg", "radius_km", "probability", "cells", "alternatives"}
    for name, row in rows(served).items():
        other = expected[name]
        assert {field: value for field, value in asdict(row).items() if field not in inexact} == {
            field: value for field, value in asdict(other).items() if field not in inexact
        }
        if row.status is Status.DONE:
            numbers = [
                (each.latitude_deg, each.longitude_deg, each.radius_km, each.probability) for each in (row, other)
            ]
            assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)
        assert [cell.token for cell in row.cells] == [cell.token for cell in other.cells]
        assert [leaf.token for leaf in row.alternatives] == [leaf.token for leaf in other.alternatives]


def test_what_is_too_large_for_a_server_is_asked_of_the_next_one(folder: Path, out: Path, bundle: Path) -> None:
    (folder / "0.jpg").write_bytes(picture(0, size=(400, 300)))
    with background_server(settings_for(bundle, max_image_pixels=100_000)) as address:
        geotag(folder, "--out", out, "--server", address, check=1)
    row = rows(out)["0.jpg"]
    assert (row.status, row.reason) == (Status.FAILED, "IMAGE_TOO_MANY_PIXELS")
    assert row.detail.endswith("(by the limits of the server; the next run asks again)")
    done = geotag(folder, "--out", out, "--index", bundle, check=1)
    assert "6 pictures found: 1 to locate, 1 with a position, 3 done, 1 failed" in done.stdout
    assert rows(out)["0.jpg"].status is Status.DONE


def test_ctrl_c_while_processes_start_is_as_quiet(folder: Path, out: Path, bundle: Path) -> None:
    run = started(folder, "--out", out, "--index", bundle, "--workers", "2")
    wait_until(lambda: psutil.Process(run.pid).children(), "a decoding process is there")
    os.killpg(run.pid, signal.SIGINT)
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 130
    assert stderr == "interrupted; give the same command again to do the rest\n"


def test_without_a_terminal_a_line_says_now_and_then_how_it_goes_on(
    folder: Path, out: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert geotag(folder, "--out", out.with_name("quiet"), "--index", bundle, check=1).stderr == ""
    monkeypatch.setattr(geotag_display, "_LOG_SECONDS", 0.0)
    lines = geotag(folder, "--out", out, "--index", bundle, check=1).stderr.splitlines()
    assert re.fullmatch(r"finding pictures: 6, [\d,]+\.\d a second", lines[5])
    assert re.fullmatch(r"looking for positions: 6 of 6, 0 minutes left, [\d,]+\.\d a second", lines[11])
    assert re.fullmatch(r"locating: [1-5] of 5(, 1 failed)?, \d+ minutes left, [\d,]+\.\d a second", lines[12])
    assert re.fullmatch(r"locating: 5 of 5, 1 failed, 0 minutes left, [\d,]+\.\d a second", lines[16])
    assert len(lines) == 6 + 6 + 5


def test_a_terminal_gets_a_bar(folder: Path, out: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    with ThreadPoolExecutor(1) as reader:
        reading = reader.submit(read_all, ours)
        with os.fdopen(theirs, "w") as terminal, contextlib.suppress(SystemExit):
            monkeypatch.setattr(sys, "stderr", terminal)
            cli.app(["geotag", str(folder), "--out", str(out), "--index", str(bundle)])
        monkeypatch.undo()
        shown = reading.result(timeout=30)
    for phase, count in (("finding pictures", "6/?"), ("looking for positions", "6/6"), ("locating", "5/5")):
        assert re.search(rf"{phase}.*{re.escape(count)}", shown), shown
    assert re.search(r"locating.*5/5.*1 failed", shown), shown
    assert not re.search("finding pictures.*failed", shown), shown
    assert "/s" in shown
