from __future__ import annotations

import io
import os
import resource
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.bad_archive import picture, with_gps
from support.bundles import make_bundle, tiny_encoder
from support.limits import limited
from support.metadata import xmp_packet
from support.runs import Archive, Watcher, never, opening

from geosurge.archive.ledger import LEDGER_FILE, Ledger
from geosurge.archive.locating import Asked
from geosurge.archive.outputs import Format
from geosurge.archive.rows import Status
from geosurge.archive.run import run
from geosurge.archive.tagging import undo_writes
from geosurge.errors import (
    BundleNotFoundError,
    LedgerError,
    OutputNotWritableError,
    RunConflictError,
    ServiceError,
    UsageError,
)
from geosurge.location import LocateOptions
from geosurge.locator import Locator

DONE, SKIPPED, WITHHELD, FAILED = Status.DONE, Status.SKIPPED, Status.WITHHELD, Status.FAILED
PLACED = xmp_packet("", 'exif:GPSLatitude="12,30.0N" exif:GPSLongitude="45,0.0W"')


@pytest.fixture(scope="module")
def locators(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Locator]]:
    """Two index versions whose answers differ."""
    folder = tmp_path_factory.mktemp("indexes")
    with (
        Locator.open(make_bundle(folder / "one", name="one", encoder=tiny_encoder())) as one,
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


def undo(archive: Archive) -> None:
    with Ledger.reopen(archive.out) as ledger:
        assert {error for _, error in undo_writes(ledger, archive.out)} == {None}


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_every_picture_has_a_row_and_the_numbers_reconcile(archive: Archive) -> None:
    before = snapshot(archive.folder)
    engine, watcher = archive.engine(), Watcher()
    result = archive.run(engine, watcher, formats=tuple(Format), report=True)
    assert outcomes(archive) == OUTCOMES
    assert result.counts == COUNTS
    assert result.failures == {"IMAGE_NOT_DECODABLE": 1}
    assert (result.located, engine.count) == (5, 4), "the same content is located once"
    (plan,) = watcher.plans
    assert (plan.found, plan.to_locate, plan.passed_over.other_files) == (7, 6, 1)
    assert plan.counts == {DONE: 0, SKIPPED: 1, WITHHELD: 0, FAILED: 0}
    assert watcher.steps == {"finding pictures": 7, "looking for positions": 7, "locating": 6}
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


def test_what_is_new_gone_or_changed_is_all_that_a_second_run_does(archive: Archive) -> None:
    archive.run()
    before = archive.rows()
    (archive.folder / "0.jpg").unlink()
    (archive.folder / "1.jpg").write_bytes(picture(11))
    (archive.folder / "2.jpg").write_bytes(b"no picture any more")
    (archive.folder / "new.jpg").write_bytes(picture(12))
    (archive.folder / "trip" / "text.png").write_bytes(picture(13, "PNG"))
    engine = archive.engine()
    result = archive.run(engine)
    after = archive.rows()
    assert engine.count == 3
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
    engine = archive.engine()
    archive.run(engine)
    assert engine.count == 0
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
    engine, watcher = archive.engine(), Watcher()
    archive.run(engine, watcher)
    assert outcomes(archive) == {**OUTCOMES, "gone.jpg": (DONE, "")}
    assert archive.rows()["trip/text.png"] == before
    assert watcher.plans[0].to_locate == 2
    assert engine.count == 2


def test_a_picture_that_changes_under_the_run_is_located_by_the_next_one(archive: Archive) -> None:
    changed = archive.folder / "3.jpg"

    class Changing(Watcher):
        def plan(self, plan: object) -> None:
            changed.write_bytes(picture(33))

    archive.run(watcher=Changing())
    assert outcomes(archive) == {**OUTCOMES, "3.jpg": (FAILED, "INPUT_CHANGED")}
    engine = archive.engine()
    archive.run(engine)
    assert outcomes(archive) == OUTCOMES
    assert engine.count == 1


def test_sources_may_overlap(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(archive.folder)
    listed = tmp_path / "list.txt"
    listed.write_text("photos/1.jpg\nphotos/trip/../2.jpg\n")
    sources = [archive.folder / "trip", archive.folder, tmp_path / "link", listed, archive.folder / "0.jpg"]
    engine = archive.engine()
    result = archive.run(engine, sources=tuple(map(str, sources)))
    assert outcomes(archive) == OUTCOMES
    assert result.counts == COUNTS
    again = tuple(str(source) for source in reversed(sources))
    assert archive.run(engine, sources=again).located == 0, "their order makes no other run"


def test_a_source_that_does_not_exist_leaves_no_directory(archive: Archive) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        archive.run(sources=(str(archive.folder), str(archive.folder / "nowhere")))
    assert not archive.out.exists()


def test_other_options_are_refused_and_the_run_stays_as_it_is(archive: Archive) -> None:
    archive.run()
    before = archive.rows()
    for job, message in (
        ({"asked": Asked(LocateOptions(top_k=3))}, "top_k was 5 and is now 3"),
        ({"asked": Asked(min_probability=0.5)}, "min_probability was 0.0 and is now 0.5"),
        ({"sources": (str(archive.folder / "trip"),)}, r"sources was .*photos.* and is now .*photos/trip"),
        ({"globs": ("*.jpg",)}, r'glob was \[\] and is now \["\*.jpg"\]'),
        ({"audit": True}, "audit was false and is now true"),
    ):
        with pytest.raises(RunConflictError, match=message):
            archive.run(**job)
    archive.run(report=True, formats=(Format.CSV, Format.PARQUET), workers=2)
    assert archive.rows() == before, "what changes no row may change"


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
    run(archive.job(write="xmp", relocate=True), opening(archive.engine("two")), relocating, dry_run=True)
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


def test_an_engine_that_fails_loses_nothing(archive: Archive) -> None:
    for number in range(20):
        (archive.folder / f"more{number}.jpg").write_bytes(picture(100 + number))
    failing = replace(archive.engine(), fails_after=8)
    with pytest.raises(ServiceError, match="GPU is lost"):
        archive.run(failing)
    assert failing.count == 8
    assert not (archive.out / "results.parquet").exists()
    rest = archive.engine()
    archive.run(rest)
    assert rest.count == 24 - 8
    whole = replace(archive, out=archive.out.with_name("whole"))
    whole.run()
    assert archive.rows() == whole.rows()


def test_an_index_that_cannot_be_opened_is_told_before_anything_is_lost(archive: Archive, tmp_path: Path) -> None:
    from geosurge.archive.engines import open_index

    with pytest.raises(BundleNotFoundError):
        run(archive.job(), lambda: open_index(tmp_path / "nowhere", "cpu", 4), Watcher())
    assert archive.run().counts == COUNTS


def test_weak_guesses_are_withheld_and_never_written(archive: Archive) -> None:
    archive.run()
    probabilities = sorted({row.probability for row in archive.rows().values() if row.probability is not None})
    least = (probabilities[1] + probabilities[2]) / 2
    strict = replace(archive, out=archive.out.with_name("strict"))
    result = strict.run(asked=Asked(min_probability=least), write="xmp")
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
    other = archive.engine("two")
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
    again = archive.engine("two")
    assert archive.run(again, write="xmp", relocate=True).located == 0
    back = archive.engine("one")
    archive.run(back, write="xmp", relocate=True)
    assert back.count == 0, "what an index answered before is known"
    assert archive.rows() == before


def test_rows_never_come_to_disagree_with_what_was_written(archive: Archive) -> None:
    archive.run(write="xmp")
    before = archive.rows()
    with pytest.raises(RunConflictError, match=r"written positions \(xmp\).*--undo.*--write"):
        archive.run(archive.engine("two"), relocate=True)
    with pytest.raises(RunConflictError):
        archive.run(archive.engine("two"), relocate=True, write="exif")
    archive.run(archive.engine("two"))
    assert archive.rows() == before
    undo(archive)
    archive.run(archive.engine("two"), relocate=True)
    assert {row.index_version for row in archive.rows().values() if row.status is DONE} == {"two"}


def test_a_relocation_that_is_interrupted_goes_on(archive: Archive) -> None:
    archive.run(write="xmp")
    failing = replace(archive.engine("two", batch_size=1), fails_after=2)
    with pytest.raises(ServiceError):
        archive.run(failing, write="xmp", relocate=True)
    rest = archive.engine("two")
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
    assert (result.counts, result.located) == (COUNTS, 0)
    assert archive.rows() == rows
    assert snapshot(archive.folder) == written

    undo(archive)
    assert snapshot(archive.folder) == before
    run(archive.job(), never, Watcher())
    assert archive.rows() == rows


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


def test_the_runs_own_files_are_no_pictures_wherever_its_directory_is(archive: Archive) -> None:
    inside = replace(archive, out=archive.folder / "geotags")
    inside.run(write="exif")
    assert list(inside.out.rglob("backup/*/*.jpg")), "there are pictures in it"
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


def test_members_of_shards_are_located_once_and_again_when_the_shard_changes(archive: Archive) -> None:
    shard = archive.folder / "shard.tar"

    def pack(*seeds: int) -> None:
        with tarfile.open(shard, "w") as tar:
            for seed in seeds:
                info = tarfile.TarInfo(f"{seed}.jpg")
                info.size = len(picture(seed))
                tar.addfile(info, io.BytesIO(picture(seed)))

    pack(50, 0)
    engine = archive.engine()
    archive.run(engine, sources=(str(archive.folder), str(shard)))
    assert engine.count == 5
    assert outcomes(archive) == {**OUTCOMES, "shard.tar/50.jpg": (DONE, ""), "shard.tar/0.jpg": (DONE, "")}
    assert replace(archive.rows()["shard.tar/0.jpg"], path="") == replace(archive.rows()["0.jpg"], path="")
    pack(0, 50, 51)
    archive.run(engine, sources=(str(archive.folder), str(shard)))
    assert engine.count == 6


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


def test_a_run_without_pictures_has_no_rows(archive: Archive) -> None:
    shutil.rmtree(archive.folder)
    archive.folder.mkdir()
    result = run(archive.job(report=True), never, Watcher())
    assert result is not None
    assert sum(result.counts.values()) == 0
    assert archive.rows() == {}
