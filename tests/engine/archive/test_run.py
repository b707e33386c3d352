from __future__ import annotations

import contextlib
import hashlib
import io
import os
import resource
import sqlite3
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from support.bad_archive import picture, with_gps
from support.bundles import make_bundle, tiny_encoder
from support.limits import limited
from support.metadata import exif_block, gps, xmp_packet
from support.runs import Archive, Watcher, never, opening

from geosurge.archive.cluster import CLUSTER_DIRECTORY
from geosurge.archive.ledger import LEDGER_FILE, Ledger
from geosurge.archive.locating import Thresholds
from geosurge.archive.outputs import Format
from geosurge.archive.rows import Status
from geosurge.archive.run import run
from geosurge.archive.writes.run_writes import BACKUP_DIRECTORY, undo_writes
from geosurge.commands.cli import app
from geosurge.errors import (
    BundleNotFoundError,
    LedgerError,
    NothingFoundError,
    OutputNotWritableError,
    RunConflictError,
    ServiceError,
    UsageError,
)
from geosurge.images import OWN_LIMITS
from geosurge.location import LocateOptions
from geosurge.locator import Locator

DONE, SKIPPED, WITHHELD, FAILED = Status.DONE, Status.SKIPPED, Status.WITHHELD, Status.FAILED
RATED = xmp_packet("", 'xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Rating="4"')
PLACED = xmp_packet("", 'exif:GPSLatitude="12,30.0N" exif:GPSLongitude="45,0.0W"')


@pytest.fixture(scope="module")
def locators(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Locator]]:
    """Two index versions whose answers differ."""
    folder = tmp_path_factory.mktemp("indexes")
    with (
        Locator.open(make_bundle(folder / "one", name="one", encoder=tiny_encoder()), limits=OWN_LIMITS) as one,
        Locator.open(make_bundle(folder / "two", name="two", encoder=tiny_encoder(), seed=1)) as two,
    ):
        yield {"one": one, "two": two}


@pytest.fixture
def archive(tmp_path: Path, locators: dict[str, Locator]) -> Archive:
    """Six pictures, two of them the same, one that has a position, one that is none."""
    folder = tmp_path / "photos"
    (folder / "trip").mkdir(parents=True)
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    (folder / "trip" / "again.jpg").write_bytes(picture(0))
    (folder / "trip" / "placed.jpg").write_bytes(with_gps(7, 20.0, 30.0))
    (folder / "trip" / "text.png").write_bytes(b"Dear diary")
    (folder / "notes.txt").write_text("nothing")
    return Archive(folder, tmp_path / "out", locators)


OUTCOMES = {
    "0.jpg": (DONE, ""),
    "1.jpg": (DONE, ""),
    "2.jpg": (DONE, ""),
    "3.jpg": (DONE, ""),
    "trip/again.jpg": (DONE, ""),
    "trip/placed.jpg": (SKIPPED, "HAS_POSITION"),
    "trip/text.png": (FAILED, "IMAGE_NOT_DECODABLE"),
}
COUNTS = {DONE: 5, SKIPPED: 1, WITHHELD: 0, FAILED: 1}


def outcomes(archive: Archive) -> dict[str, tuple[Status, str]]:
    return {name: (row.status, row.reason) for name, row in archive.rows().items()}


def run_id(archive: Archive) -> str:
    with Ledger.reopen(archive.out) as ledger:
        return ledger.run_id


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def undo(archive: Archive) -> None:
    with Ledger.reopen(archive.out) as ledger:
        assert {error for _, error in undo_writes(ledger, archive.out)} == {None}


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_every_picture_has_a_row_and_the_numbers_reconcile(archive: Archive) -> None:
    before = snapshot(archive.folder)
    backend, watcher = archive.backend(), Watcher()
    result = archive.run(backend, watcher, formats=tuple(Format), report=True)
    assert outcomes(archive) == OUTCOMES
    placed = archive.rows()["trip/placed.jpg"]
    assert (placed.content_hash, placed.latitude_deg, placed.longitude_deg) == ("", None, None)
    assert result.counts == COUNTS
    assert result.failures == {"IMAGE_NOT_DECODABLE": 1}
    assert result.examples == {"IMAGE_NOT_DECODABLE": f"{archive.folder}/trip/text.png"}
    assert (result.located, backend.count) == (5, 4), "the same content is located once"
    (plan,) = watcher.plans
    assert (plan.found, plan.to_locate, str(plan.passed_over)) == (7, 6, "1 other file (1 .txt)")
    assert plan.counts == {DONE: 0, SKIPPED: 1, WITHHELD: 0, FAILED: 0}
    assert watcher.steps == {"finding pictures": 7, "looking for positions": 7, "locating": 6}
    assert +watcher.failures == {"locating": 1}
    names = {"results.parquet", "results.csv", "results.geojson", "results.kml", "report.html"}
    assert {path.name for path in result.files} == names
    assert {path.name for path in archive.out.iterdir()} == {*names, LEDGER_FILE}
    assert result.audit is None
    assert snapshot(archive.folder) == before


def test_a_second_run_needs_no_index_and_changes_nothing(archive: Archive) -> None:
    archive.run(formats=(Format.PARQUET, Format.CSV))
    before = {path.name: path.read_bytes() for path in archive.out.glob("results.*")}
    watcher = Watcher()
    result = run(archive.job(formats=(Format.PARQUET, Format.CSV)), never, watcher)
    assert result is not None
    assert (result.counts, result.located) == (COUNTS, 0)
    assert watcher.plans[0].counts == COUNTS
    assert {path.name: path.read_bytes() for path in archive.out.glob("results.*")} == before


def test_what_an_earlier_run_put_out_in_another_form_is_kept_up_to_date(archive: Archive) -> None:
    archive.run(formats=(Format.PARQUET, Format.GEOJSON), report=True)
    report = (archive.out / "report.html").read_bytes()
    (archive.folder / "new.jpg").write_bytes(picture(12))
    result = archive.run(formats=(Format.CSV,))
    names = ["results.csv", "results.parquet", "results.geojson"]
    assert [path.name for path in result.files] == names, "it says which"
    assert outcomes(archive) == {**OUTCOMES, "new.jpg": (DONE, "")}
    for name in names[::2]:
        assert "new.jpg" in (archive.out / name).read_text()
    assert not (archive.out / "results.kml").exists()
    assert (archive.out / "report.html").read_bytes() == report, "it tells of the run that was asked for it"


def test_what_is_new_gone_or_changed_is_all_that_a_second_run_does(archive: Archive) -> None:
    archive.run()
    before = archive.rows()
    (archive.folder / "0.jpg").unlink()
    (archive.folder / "1.jpg").write_bytes(picture(11))
    (archive.folder / "2.jpg").write_bytes(b"no picture any more")
    (archive.folder / "new.jpg").write_bytes(picture(12))
    (archive.folder / "trip" / "text.png").write_bytes(picture(13, "PNG"))
    backend = archive.backend()
    result = archive.run(backend)
    after = archive.rows()
    assert backend.count == 3
    assert result.counts == {DONE: 5, SKIPPED: 1, WITHHELD: 0, FAILED: 1}
    assert outcomes(archive)["2.jpg"] == (FAILED, "IMAGE_NOT_DECODABLE")
    assert outcomes(archive)["trip/text.png"] == (DONE, "")
    assert "0.jpg" not in after
    assert after["1.jpg"].content_hash != before["1.jpg"].content_hash
    assert {name: after[name] for name in ("3.jpg", "trip/again.jpg")} == {
        name: before[name] for name in ("3.jpg", "trip/again.jpg")
    }


def test_a_moved_archive_is_not_located_again(archive: Archive) -> None:
    archive.run()
    (archive.folder / "0.jpg").rename(archive.folder / "trip" / "moved.jpg")
    backend = archive.backend()
    archive.run(backend)
    assert backend.count == 0
    assert outcomes(archive)["trip/moved.jpg"] == (DONE, "")


def test_what_failed_for_the_machines_sake_is_tried_again(archive: Archive) -> None:
    text, gone = archive.folder / "trip" / "text.png", archive.folder / "gone.jpg"
    gone.symlink_to("nowhere.jpg")
    (archive.folder / "1.jpg.xmp").write_text("rating: 5")
    archive.run()
    assert outcomes(archive) == {
        **OUTCOMES,
        "gone.jpg": (FAILED, "INPUT_NOT_READABLE"),
        "1.jpg": (FAILED, "SIDECAR_INVALID"),
    }
    gone.unlink()
    gone.write_bytes(picture(21))
    (archive.folder / "1.jpg.xmp").unlink()
    # Nobody looks into it: what it holds by now, under the same size and time, is never known.
    status = text.stat()
    text.write_bytes(b"Dear world")
    os.utime(text, ns=(status.st_mtime_ns, status.st_mtime_ns))
    before = archive.rows()["trip/text.png"]
    backend, watcher = archive.backend(), Watcher()
    archive.run(backend, watcher)
    assert outcomes(archive) == {**OUTCOMES, "gone.jpg": (DONE, "")}
    assert archive.rows()["trip/text.png"] == before
    assert watcher.plans[0].to_locate == 2
    assert backend.count == 2


def test_heic_is_located_once_its_plug_in_is_there(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (archive.folder / "phone.heic").write_bytes(picture(20, "HEIF"))
    (archive.folder / "placed.heic").write_bytes(
        picture(21, "HEIF", exif=b"Exif\0\0" + exif_block(gps_tags=gps(12.5, -7.25)))
    )
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    # Run by every interpreter that finds it, so by those that decode.
    (hidden / "sitecustomize.py").write_text("import sys; sys.modules['pillow_heif'] = None")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(hidden)
        archive.run()
    # A position can be read without it.
    placed = {"placed.heic": (SKIPPED, "HAS_POSITION")}
    assert outcomes(archive) == OUTCOMES | placed | {"phone.heic": (FAILED, "IMAGE_PLUG_IN_MISSING")}
    assert "pip install 'geosurge[heif]'" in archive.rows()["phone.heic"].detail

    backend = archive.backend()
    archive.run(backend)
    assert backend.batches == [1]
    assert outcomes(archive) == OUTCOMES | placed | {"phone.heic": (DONE, "")}


def test_a_picture_that_changes_under_the_run_is_located_by_the_next_one(archive: Archive) -> None:
    changed = archive.folder / "3.jpg"

    class Changing(Watcher):
        def plan(self, plan: object) -> None:
            changed.write_bytes(picture(33))

    archive.run(watcher=Changing())
    assert outcomes(archive) == {**OUTCOMES, "3.jpg": (FAILED, "INPUT_CHANGED")}
    backend = archive.backend()
    archive.run(backend)
    assert outcomes(archive) == OUTCOMES
    assert backend.count == 1


def test_what_killed_runs_on_ray_have_left_goes_once_nothing_is_left_to_locate(archive: Archive) -> None:
    home = archive.out / CLUSTER_DIRECTORY
    left = [home / name for name in ("0123456789abcdef", "fedcba9876543210")]
    for exchange in left:
        (exchange / "pictures").mkdir(parents=True)
        (exchange / "pictures" / "00000000.parquet").touch()
    backend = archive.backend()
    with pytest.raises(ServiceError):
        archive.run(replace(backend, fails_after=0))
    assert sorted(home.iterdir()) == left
    archive.run()
    assert not home.exists()
    left[0].mkdir(parents=True)
    (home / "mine").mkdir()
    archive.run()
    assert [path.name for path in home.iterdir()] == ["mine"]


def test_sources_may_overlap(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(archive.folder)
    listed = tmp_path / "list.txt"
    listed.write_text("photos/1.jpg\nphotos/trip/../2.jpg\n")
    sources = [archive.folder / "trip", archive.folder, tmp_path / "link", listed, archive.folder / "0.jpg"]
    backend = archive.backend()
    result = archive.run(backend, sources=tuple(map(str, sources)))
    assert outcomes(archive) == OUTCOMES
    assert result.counts == COUNTS
    again = tuple(str(source) for source in reversed(sources))
    assert archive.run(backend, sources=again).located == 0, "their order makes no other run"


def test_a_source_that_does_not_exist_leaves_no_directory(archive: Archive) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        archive.run(sources=(str(archive.folder), str(archive.folder / "nowhere")))
    assert not archive.out.exists()


def test_other_options_are_refused_and_the_run_stays_as_it_is(archive: Archive) -> None:
    archive.run()
    before = archive.rows()
    for job, message in (
        ({"options": LocateOptions(top_k=3)}, "top_k was 5 and is now 3"),
        ({"thresholds": Thresholds(min_probability=0.5)}, "min_probability was 0.0 and is now 0.5"),
        ({"sources": (str(archive.folder / "trip"),)}, r"sources was .*photos.* and is now .*photos/trip"),
        ({"globs": ("*.jpg",)}, r'glob was \[\] and is now \["\*.jpg"\]'),
        ({"audit": True}, "audit was false and is now true"),
    ):
        with pytest.raises(RunConflictError, match=message):
            archive.run(**job)
    archive.run(report=True, formats=(Format.CSV, Format.PARQUET), workers=2)
    assert archive.rows() == before, "what changes no row may change"


def test_what_was_asked_for_goes_by_the_names_of_its_flags(archive: Archive) -> None:
    assert archive.job().asked_for() == {}
    job = archive.job(
        globs=("*.jpg",),
        options=LocateOptions(top_k=3, region_tokens=("47a",)),
        thresholds=Thresholds(max_radius_km=50.0),
    )
    flags = {"--glob": '["*.jpg"]', "--max-radius-km": "50.0", "--top-k": "3", "--region": '["47a"]'}
    assert job.asked_for() == flags
    options = {
        option for parameter in typer.main.get_command(app).commands["geotag"].params for option in parameter.opts
    }
    assert flags.keys() <= options


def test_options_that_cannot_be_answered_can_be_corrected(archive: Archive) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        archive.run(options=LocateOptions(region_tokens=("nowhere",)))
    assert archive.run().counts == COUNTS


def test_two_runs_at_once_are_refused(archive: Archive) -> None:
    class Second(Watcher):
        def plan(self, plan: object) -> None:
            with pytest.raises(RunConflictError, match="under way"):
                run(archive.job(), never, Watcher())
            self.steps.update(["refused"])

    watcher = Second()
    assert archive.run(watcher=watcher).counts == COUNTS
    assert watcher.steps["refused"] == 1


def test_a_dry_run_leaves_nothing(archive: Archive) -> None:
    watcher = Watcher()
    assert run(archive.job(write="xmp"), never, watcher, dry_run=True) is None
    (plan,) = watcher.plans
    assert (plan.found, plan.to_locate, plan.counts[SKIPPED]) == (7, 6, 1)
    assert not archive.out.exists()
    archive.out.mkdir()
    run(archive.job(), never, Watcher(), dry_run=True)
    assert list(archive.out.iterdir()) == []


def test_a_dry_run_over_a_run_says_what_is_left_and_leaves_it_as_it_is(archive: Archive) -> None:
    archive.run(write="xmp")
    (archive.folder / "1.jpg").write_bytes(picture(11))
    (archive.folder / "2.jpg").unlink()
    photos, out = snapshot(archive.folder), snapshot(archive.out)
    watcher = Watcher()
    run(archive.job(write="xmp"), never, watcher, dry_run=True)
    (plan,) = watcher.plans
    assert (plan.found, plan.to_locate) == (6, 1)
    assert plan.counts == {DONE: 3, SKIPPED: 1, WITHHELD: 0, FAILED: 1}
    relocating = Watcher()
    run(archive.job(write="xmp", relocate=True), opening(archive.backend("two")), relocating, dry_run=True)
    assert relocating.plans[0].to_locate == 4
    assert snapshot(archive.folder) == photos
    assert snapshot(archive.out) == out


def test_a_dry_run_finishes_no_write_that_a_crash_cut_short(archive: Archive) -> None:
    archive.run(write="xmp")
    with Ledger.reopen(archive.out) as ledger:
        ledger._database.execute("UPDATE write SET state = 'prepared'")
        ledger.commit()
    for sidecar in archive.folder.rglob("*.xmp"):
        sidecar.unlink()
    photos = snapshot(archive.folder)
    run(archive.job(write="xmp"), never, Watcher(), dry_run=True)
    assert snapshot(archive.folder) == photos
    run(archive.job(write="xmp"), never, Watcher())
    assert len(list(archive.folder.rglob("*.xmp"))) == 5


def test_a_backend_that_fails_loses_nothing(archive: Archive) -> None:
    for number in range(20):
        (archive.folder / f"more{number}.jpg").write_bytes(picture(100 + number))
    failing = replace(archive.backend(), fails_after=8)
    with pytest.raises(ServiceError, match="GPU is lost"):
        archive.run(failing)
    assert failing.count == 8
    assert not (archive.out / "results.parquet").exists()
    rest = archive.backend()
    archive.run(rest)
    assert rest.count == 24 - 8
    whole = replace(archive, out=archive.out.with_name("whole"))
    whole.run()
    assert archive.rows() == whole.rows()


def test_an_index_that_cannot_be_opened_is_told_before_anything_is_lost(archive: Archive, tmp_path: Path) -> None:
    from geosurge.archive.backends import open_index

    with pytest.raises(BundleNotFoundError):
        run(archive.job(), lambda: open_index(tmp_path / "nowhere", "cpu", 4), Watcher())
    assert archive.run().counts == COUNTS


def test_weak_guesses_are_withheld_and_never_written(archive: Archive) -> None:
    archive.run()
    probabilities = sorted({row.probability for row in archive.rows().values() if row.probability is not None})
    least = (probabilities[1] + probabilities[2]) / 2
    strict = replace(archive, out=archive.out.with_name("strict"))
    result = strict.run(thresholds=Thresholds(min_probability=least), write="xmp")
    withheld = {name for name, (status, _) in outcomes(strict).items() if status is WITHHELD}
    assert withheld == {name for name, row in archive.rows().items() if (row.probability or 1.0) < least}
    assert result.counts[WITHHELD] == len(withheld) >= 2
    assert sum(result.counts.values()) == 7
    for name in withheld:
        row = strict.rows()[name]
        assert (row.latitude_deg, row.longitude_deg, row.cells, row.place) == (None, None, (), None)
        assert row.reason == "PROBABILITY_TOO_LOW"
        assert row.probability == archive.rows()[name].probability
        assert not (archive.folder / f"{name}.xmp").exists()
    written = {str(path.relative_to(archive.folder))[:-4] for path in archive.folder.rglob("*.xmp")}
    assert written == {name for name, (status, _) in outcomes(strict).items() if status is DONE} != set()


def test_another_index_locates_again_only_when_asked(archive: Archive) -> None:
    archive.run(write="xmp")
    before, sidecars = archive.rows(), snapshot(archive.folder)
    other = archive.backend("two")
    assert archive.run(other, write="xmp").located == 0
    assert archive.rows() == before
    assert snapshot(archive.folder) == sidecars

    result = archive.run(other, write="xmp", relocate=True)
    after = archive.rows()
    assert (result.counts, result.located, other.count) == (COUNTS, 5, 4)
    for name, (status, _) in OUTCOMES.items():
        if status is DONE:
            assert (before[name].index_version, after[name].index_version) == ("one", "two")
            assert after[name].latitude_deg != before[name].latitude_deg
            sidecar = (archive.folder / f"{name}.xmp").read_text()
            assert f"geosurge two run {run_id(archive)}" in sidecar
            assert "geosurge one" not in sidecar
        else:
            assert after[name] == before[name]
    again = archive.backend("two")
    assert archive.run(again, write="xmp", relocate=True).located == 0
    back = archive.backend("one")
    archive.run(back, write="xmp", relocate=True)
    assert back.count == 0, "what an index answered before is known"
    assert archive.rows() == before


@pytest.mark.parametrize("kind", ["xmp", "exif"])
def test_another_index_locates_nothing_again_that_was_only_touched_copied_or_not_written(
    kind: str, archive: Archive
) -> None:
    original = (archive.folder / "1.jpg").read_bytes()
    shard = archive.folder.with_name("shard.tar")
    with tarfile.open(shard, "w") as tar:
        tar.add(archive.folder / "2.jpg", "2.jpg")
    sources = (str(archive.folder), str(shard))
    archive.run(write=kind, sources=sources)
    rows = archive.rows()
    written = {name: content for name, (content, _) in snapshot(archive.folder).items()}
    assert rows[f"{shard}/2.jpg"].reason == "WRITE_UNSUPPORTED"
    assert rows[f"{shard}/2.jpg"].latitude_deg is not None
    for path in archive.folder.rglob("*.jpg"):
        os.utime(path)
    (archive.folder / "copy.jpg").write_bytes(original)
    for write in (None, kind):
        other = archive.backend("two")
        archive.run(other, write=write, sources=sources)
        assert other.count == 0
        after = archive.rows()
        assert after.pop("copy.jpg") == replace(rows["1.jpg"], path=str(archive.folder.resolve() / "copy.jpg"))
        if write is None:
            assert after.pop(f"{shard}/2.jpg").index_version == "one"
            assert after == {name: row for name, row in rows.items() if name in after}
            assert {name: content for name, (content, _) in snapshot(archive.folder).items()} == written | {
                "copy.jpg": original
            }
    assert after == rows


def test_a_sidecar_that_comes_changes_or_goes_counts(archive: Archive) -> None:
    archive.run()
    before, sidecar = archive.rows(), archive.folder / "1.xmp"
    for text, expected in (
        (RATED, before["1.jpg"]),
        (PLACED, (SKIPPED, "HAS_POSITION")),
        (RATED, before["1.jpg"]),
        (PLACED, (SKIPPED, "HAS_POSITION")),
        ("", before["1.jpg"]),
    ):
        sidecar.write_text(text) if text else sidecar.unlink()
        backend = archive.backend()
        archive.run(backend)
        assert backend.count == 0
        row = archive.rows()["1.jpg"]
        assert expected in (row, (row.status, row.reason))
    assert archive.rows() == before
    (archive.folder / "trip" / "text.png.xmp").write_text(PLACED)
    archive.run()
    assert outcomes(archive)["trip/text.png"] == (SKIPPED, "HAS_POSITION"), "what failed for good is looked at as well"


def test_a_sidecar_that_comes_beside_one_that_the_run_takes_back_counts(archive: Archive) -> None:
    archive.run(write="xmp")
    (archive.folder / "1.xmp").write_text(PLACED)
    undo(archive)
    archive.run()
    assert outcomes(archive) == OUTCOMES | {"1.jpg": (SKIPPED, "HAS_POSITION")}


def test_a_run_that_was_begun_before_sidecars_were_noted_goes_on(archive: Archive) -> None:
    archive.run()
    rows = archive.rows()
    with contextlib.closing(sqlite3.connect(archive.out / LEDGER_FILE)) as database:
        database.execute("ALTER TABLE picture DROP COLUMN sidecars")
        database.commit()
        (archive.folder / "1.xmp").write_text(RATED)
        archive.run(dry_run=True)
        assert "sidecars" not in {name for _, name, *_ in database.execute("PRAGMA table_info (picture)")}
    run(archive.job(), never, Watcher())
    assert archive.rows() == rows
    (archive.folder / "1.xmp").write_text(PLACED)
    run(archive.job(), never, Watcher())
    assert outcomes(archive) == OUTCOMES | {"1.jpg": (SKIPPED, "HAS_POSITION")}


def test_rows_never_come_to_disagree_with_what_was_written(archive: Archive) -> None:
    archive.run(write="xmp")
    before = archive.rows()
    with pytest.raises(RunConflictError, match=r"written positions \(xmp\).*--undo.*--write"):
        archive.run(archive.backend("two"), relocate=True)
    with pytest.raises(RunConflictError):
        archive.run(archive.backend("two"), relocate=True, write="exif")
    archive.run(archive.backend("two"))
    assert archive.rows() == before
    undo(archive)
    archive.run(archive.backend("two"), relocate=True)
    assert {row.index_version for row in archive.rows().values() if row.status is DONE} == {"two"}


def test_a_relocation_that_is_interrupted_goes_on(archive: Archive) -> None:
    archive.run(write="xmp")
    failing = replace(archive.backend("two", batch_size=1), fails_after=2)
    with pytest.raises(ServiceError):
        archive.run(failing, write="xmp", relocate=True)
    rest = archive.backend("two")
    archive.run(rest, write="xmp", relocate=True)
    assert rest.count == 4 - 2
    assert outcomes(archive) == OUTCOMES
    assert {row.index_version for row in archive.rows().values() if row.status is DONE} == {"two"}
    assert all("geosurge two" in path.read_text() for path in archive.folder.rglob("*.xmp"))


@pytest.mark.parametrize("kind", ["xmp", "exif"])
def test_what_was_written_is_no_reason_to_do_anything_again(kind: str, archive: Archive) -> None:
    before = snapshot(archive.folder)
    archive.run(write=kind)
    rows, written = archive.rows(), snapshot(archive.folder)
    assert len({*written.items()} - {*before.items()}) == 5
    result = run(archive.job(write=kind), never, Watcher())
    assert result is not None
    assert (result.counts, result.located, result.written) == (COUNTS, 0, 0)
    assert archive.rows() == rows
    assert snapshot(archive.folder) == written

    undo(archive)
    assert snapshot(archive.folder) == before
    run(archive.job(), never, Watcher())
    assert archive.rows() == rows


@pytest.mark.parametrize("kind", ["xmp", "exif"])
def test_what_was_written_and_is_gone_is_written_again(kind: str, archive: Archive) -> None:
    before = snapshot(archive.folder)
    archive.run(write=kind)
    rows, written = archive.rows(), snapshot(archive.folder)
    # As a copy from before the run does, with the times of the files.
    for name in ("0.jpg", "1.jpg"):
        (archive.folder / f"{name}.xmp").unlink(missing_ok=True)
        content, mtime_ns = before[name]
        (archive.folder / name).write_bytes(content)
        os.utime(archive.folder / name, ns=(mtime_ns, mtime_ns))
    (archive.folder / "1.jpg.xmp").write_text(PLACED)
    backend = archive.backend()
    archive.run(backend, write=kind)
    assert backend.count == 0, "the content is known"
    after = snapshot(archive.folder)
    assert after.keys() == written.keys() | {"1.jpg.xmp"}
    changed = {name for name in after if after[name][0] != written.get(name, (b"",))[0]}
    assert changed == ({"1.jpg.xmp"} if kind == "xmp" else {"1.jpg", "1.jpg.xmp"})
    assert (archive.folder / "1.jpg.xmp").read_text() == PLACED, "where somebody wrote another one, it stays"
    assert archive.rows()["0.jpg"] == rows["0.jpg"]
    undo(archive)
    (archive.folder / "1.jpg.xmp").unlink()
    assert {name: content for name, (content, _) in snapshot(archive.folder).items()} == {
        name: content for name, (content, _) in before.items()
    }


def test_pictures_that_share_a_sidecar_have_the_same_rows_in_every_run(archive: Archive) -> None:
    (archive.folder / "1.png").write_bytes(picture(41, "PNG"))
    (archive.folder / "1.xmp").write_text(xmp_packet("", 'xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Rating="4"'))
    archive.run(write="xmp")
    rows = archive.rows()
    assert [rows[name].status for name in ("1.jpg", "1.png")] == [DONE, SKIPPED]
    assert rows["1.png"].position is not None
    assert f"(sidecar, a guess of run {run_id(archive)})" in rows["1.png"].detail
    archive.run(write="xmp")
    assert archive.rows() == rows


def test_the_hash_is_that_of_the_picture_without_what_the_run_wrote_into_it(archive: Archive) -> None:
    hashes = {str(path.relative_to(archive.folder)): sha256(path) for path in archive.folder.rglob("*.jpg")}

    def told() -> dict[str, str]:
        return {name: row.content_hash for name, row in archive.rows().items() if row.status is DONE}

    expected = {name: hashes[name] for name, (status, _) in OUTCOMES.items() if status is DONE}
    archive.run(write="exif")
    assert told() == expected
    archive.run(archive.backend("two"), write="exif", relocate=True)
    assert told() == expected
    assert sha256(archive.folder / "0.jpg") != expected["0.jpg"]
    archive.run(archive.backend("one"), write="exif", relocate=True)
    assert told() == expected
    undo(archive)
    archive.run()
    assert told() == expected


def test_a_picture_that_changed_after_its_sidecar_was_written_is_located_again(archive: Archive) -> None:
    archive.run(write="xmp")
    before = archive.rows()["1.jpg"]
    (archive.folder / "1.jpg").write_bytes(picture(11))
    archive.run(write="xmp")
    after = archive.rows()["1.jpg"]
    assert outcomes(archive) == OUTCOMES
    assert after.probability != before.probability
    assert f"{after.probability:.6g}" in (archive.folder / "1.jpg.xmp").read_text()
    undo(archive)
    assert list(archive.folder.rglob("*.xmp")) == []


def test_another_runs_guess_is_a_position(archive: Archive) -> None:
    archive.run(write="xmp")
    other = replace(archive, out=archive.out.with_name("other"))
    other.run()
    rows = other.rows()
    assert {row.status for name, row in rows.items() if name != "trip/text.png"} == {SKIPPED}
    assert f"(sidecar, a guess of run {run_id(archive)})" in rows["0.jpg"].detail


def test_an_audit_compares_with_the_truth_and_not_with_guesses(archive: Archive) -> None:
    archive.run(write="xmp")
    (archive.folder / "3.xmp").write_text(PLACED)
    audited = replace(archive, out=archive.out.with_name("audit"))
    result = audited.run(audit=True)
    assert {name for name, (status, _) in outcomes(audited).items() if status is DONE} == {"3.jpg", "trip/placed.jpg"}
    assert outcomes(audited)["0.jpg"] == (SKIPPED, "NO_POSITION")
    assert "itself a guess" in audited.rows()["0.jpg"].detail
    assert result.audit is not None
    assert result.audit.count == 2
    positions = {(miss.true_latitude_deg, miss.true_longitude_deg) for miss in result.audit.worst}
    assert positions == {(12.5, -45.0), (20.0, 30.0)}


def test_an_audit_with_nothing_left_to_compare_leaves_no_comparison(archive: Archive) -> None:
    assert archive.run(audit=True).audit is not None
    assert (archive.out / "audit.json").exists()
    (archive.folder / "trip" / "placed.jpg").unlink()
    assert archive.run(audit=True).audit is None
    assert not (archive.out / "audit.json").exists()


def test_what_another_program_left_is_not_renewed(archive: Archive) -> None:
    archive.out.mkdir()
    listed = archive.out / "results.csv"
    listed.write_text(f"path\n{archive.folder}/0.jpg\n{archive.folder}/1.jpg\n")
    before = listed.read_bytes()
    for _ in range(2):
        result = archive.run(sources=(str(listed),))
        assert [path.name for path in result.files] == ["results.parquet"]
        assert listed.read_bytes() == before
    assert archive.rows().keys() == {"0.jpg", "1.jpg"}


@pytest.mark.parametrize(
    ("name", "asked"),
    [("results.csv", {"formats": (Format.CSV,)}), ("report.html", {"report": True}), ("audit.json", {"audit": True})],
)
def test_what_another_program_left_is_not_overwritten(name: str, asked: dict[str, object], archive: Archive) -> None:
    archive.out.mkdir()
    (archive.out / name).write_text("mine")
    with pytest.raises(UsageError, match=rf"out/{name} was not written by this run.*move it away"):
        run(archive.job(**asked), never, Watcher())
    assert [path.name for path in archive.out.iterdir()] == [name], "nothing was begun"
    (archive.out / name).unlink()
    archive.run(**asked)
    # What is the run's own may be written again.
    assert name in {path.name for path in archive.run(**asked).files}


def test_a_later_run_overwrites_nothing_of_another_program_either(archive: Archive) -> None:
    archive.run()
    (archive.out / "results.csv").write_text("mine")
    before = snapshot(archive.out), archive.rows()
    with pytest.raises(UsageError, match=r"results\.csv was not written by this run"):
        run(archive.job(formats=(Format.PARQUET, Format.CSV)), never, Watcher())
    after = snapshot(archive.out), archive.rows()
    for files, _ in (before, after):
        files.pop(LEDGER_FILE)
    assert after == before


def test_a_run_that_was_begun_before_outputs_were_noted_goes_on(archive: Archive) -> None:
    archive.run(formats=(Format.CSV, Format.PARQUET))
    with Ledger.reopen(archive.out) as ledger:
        ledger._database.execute("DELETE FROM run WHERE name = 'outputs'")
        ledger.commit()
    for _ in range(2):
        result = archive.run()
        assert [path.name for path in result.files] == ["results.parquet", "results.csv"]


def test_a_picture_may_be_called_nearly_like_the_runs_own_files(archive: Archive) -> None:
    (archive.folder / "results.jpg").write_bytes(picture(12))
    (archive.folder / "report.html.jpg").write_bytes(picture(13))
    inside = replace(archive, out=archive.folder)
    for _ in range(2):
        inside.run(formats=tuple(Format), report=True, globs=("*", "!notes.txt"))
        assert outcomes(inside) == {**OUTCOMES, "results.jpg": (DONE, ""), "report.html.jpg": (DONE, "")}


def test_the_runs_own_files_are_no_pictures_wherever_its_directory_is(archive: Archive) -> None:
    inside = replace(archive, out=archive.folder / "geotags")
    inside.run(write="exif")
    assert list(inside.out.glob(f"{BACKUP_DIRECTORY}/*/*.jpg")), "there are pictures in it"
    assert outcomes(inside) == OUTCOMES
    rows = inside.rows()
    inside.run(write="exif")
    assert inside.rows() == rows
    everything = replace(archive, out=archive.folder / "everything")
    for _ in range(2):
        everything.run(globs=("*", "!geotags/**"), formats=tuple(Format), report=True)
        assert everything.rows().keys() == {*OUTCOMES, "notes.txt"}
    beside = replace(archive, out=archive.folder.parent)
    beside.run()
    assert beside.rows().keys() == OUTCOMES.keys(), "a source in the directory is one"


@pytest.mark.parametrize("name", ["ray", "backup"])
def test_an_owners_folder_may_have_any_name(name: str, archive: Archive) -> None:
    (archive.folder / name).mkdir()
    (archive.folder / name / "new.jpg").write_bytes(picture(12))
    inside = replace(archive, out=archive.folder)
    inside.run(write="xmp")
    assert outcomes(inside) == {**OUTCOMES, f"{name}/new.jpg": (DONE, "")}


def test_members_of_shards_are_located_once_and_again_when_the_shard_changes(archive: Archive) -> None:
    shard = archive.folder / "shard.tar"

    def pack(*seeds: int) -> None:
        with tarfile.open(shard, "w") as tar:
            for seed in seeds:
                info = tarfile.TarInfo(f"{seed}.jpg")
                info.size = len(picture(seed))
                tar.addfile(info, io.BytesIO(picture(seed)))

    pack(50, 0)
    backend = archive.backend()
    archive.run(backend, sources=(str(archive.folder), str(shard)))
    assert backend.count == 5
    assert outcomes(archive) == {**OUTCOMES, "shard.tar/50.jpg": (DONE, ""), "shard.tar/0.jpg": (DONE, "")}
    assert replace(archive.rows()["shard.tar/0.jpg"], path="") == replace(archive.rows()["0.jpg"], path="")
    pack(0, 50, 51)
    archive.run(backend, sources=(str(archive.folder), str(shard)))
    assert backend.count == 6


def test_a_member_that_a_shard_has_twice_is_the_last_one_and_settles(archive: Archive) -> None:
    shard = archive.folder / "shard.tar"
    with tarfile.open(shard, "w") as tar:
        for seed, name in ((50, "a.jpg"), (51, "b.jpg"), (52, "a.jpg")):
            info = tarfile.TarInfo(name)
            info.size = len(picture(seed))
            tar.addfile(info, io.BytesIO(picture(seed)))
    archive.run(sources=(str(shard),))
    rows = archive.rows()
    assert rows["shard.tar/a.jpg"].content_hash == hashlib.sha256(picture(52)).hexdigest()
    watcher = Watcher()
    run(archive.job(sources=(str(shard),)), never, watcher)
    assert (watcher.plans[0].found, watcher.plans[0].counts[DONE]) == (2, 2)
    assert archive.rows() == rows


def test_a_full_disk_ends_the_run_and_the_next_one_does_the_rest(archive: Archive) -> None:
    for number in range(40):
        (archive.folder / f"more{number}.jpg").write_bytes(picture(100 + number))
    with (
        limited(resource.RLIMIT_FSIZE, 60_000),
        pytest.raises(LedgerError, match=rf"{LEDGER_FILE} cannot be written.*make room"),
    ):
        archive.run()
    archive.run()
    assert len(archive.rows()) == 47
    archive.out.joinpath("results.parquet").unlink()
    with limited(resource.RLIMIT_FSIZE, 2_000), pytest.raises((OutputNotWritableError, LedgerError)):
        run(archive.job(), never, Watcher())
    result = run(archive.job(), never, Watcher())
    assert result is not None
    assert result.counts[DONE] == 45


def test_a_directory_that_cannot_be_made_is_told(archive: Archive) -> None:
    blocked = replace(archive, out=archive.folder / "0.jpg" / "out")
    with pytest.raises(OutputNotWritableError, match=r"0\.jpg.*another directory"):
        blocked.run()


def test_no_picture_at_all_is_no_run(archive: Archive) -> None:
    with pytest.raises(
        NothingFoundError, match=r"photos: looked for what --glob \*\.jepg takes; passed over 8 other files \(6 .jpg"
    ):
        archive.run(globs=("*.jepg",))
    assert not archive.out.exists(), "so that the pattern can be corrected"
    archive.run()
    rows = archive.rows()
    for path in archive.folder.rglob("*.*"):
        path.unlink()
    (archive.folder / "shard.tar").write_bytes(b"")
    with pytest.raises(NothingFoundError, match=r"trip: nothing is there; what the run"):
        archive.run(sources=(str(archive.folder / "trip"),))
    for dry_run in (False, True):
        with pytest.raises(NothingFoundError) as raised:
            archive.run(dry_run=dry_run)
        message = str(raised.value)
        assert message.startswith(f"no pictures found in {archive.folder}: looked for names such as .jpg, ")
        assert "; passed over 1 other file (1 .tar); name .tar files as sources" in message
        assert message.endswith(f"; what the run in {archive.out} has found before stays as it is")
    assert archive.rows() == rows, "a disk that is not mounted is an empty folder"
