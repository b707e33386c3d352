from __future__ import annotations

import hashlib
import io
import os
import re
import sqlite3
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import exiftool
from support.bad_archive import picture, with_gps
from support.metadata import xmp_packet

from geosurge.archive.ledger import LEDGER_FILE, AnswerKey, Ledger
from geosurge.archive.locating import note_pictures
from geosurge.archive.metadata.positions import read_claims, sidecar_paths
from geosurge.archive.rows import Reason, Row, Status
from geosurge.archive.sources import scan
from geosurge.archive.tasks import look
from geosurge.archive.writes import run_writes
from geosurge.archive.writes.file_write import Write, WriteKind, apply, prepare
from geosurge.archive.writes.journal import PREPARED
from geosurge.archive.writes.run_writes import BACKUP_DIRECTORY, finish_writes, undo_writes, write_positions
from geosurge.errors import FileChangedError
from geosurge.location import CredibleRegion, Location

KINDS: tuple[WriteKind, ...] = ("xmp", "exif")
kinds = pytest.mark.parametrize("kind", KINDS)
RATED = xmp_packet("", 'xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Rating="4"')
PLACED = xmp_packet("", 'exif:GPSLatitude="12,30.0N" exif:GPSLongitude="45,0.0W"')


def ignore(*, failed: bool = False) -> None:
    """Shows no progress."""


class Fixture:
    """A folder of pictures and the ledger of a run over it, without anything that locates."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.folder, self.out = folder, out
        self.ledger = Ledger.open(out, {})

    def add(self, *names: str) -> None:
        for name in names:
            path = self.folder / name
            path.write_bytes(picture(sum(name.encode()), "PNG" if name.endswith(".png") else "JPEG"))

    def locate(
        self,
        version: str = "tiny",
        latitude_deg: float = -33.856784,
        withheld: Reason | None = None,
        *,
        again: bool = False,
    ) -> None:
        """Scans, looks and locates what is not located yet; each picture a degree east of the one before."""
        key = AnswerKey(version, "ab" * 32, "{}")
        note_pictures(self.ledger, scan([self.folder]), ignore)
        for noted in self.ledger.to_look_at():
            position = look(noted.found).position
            self.ledger.looked_at(noted.key, position, None if position is None else Reason("HAS_POSITION", "it has"))
        if again:
            self.ledger.ask_again(key)
        for noted in self.ledger.to_locate():
            with noted.found.open() as file:
                content = hashlib.sha256(file.read()).digest()
            location = Location(
                latitude_deg=latitude_deg,
                longitude_deg=-70.25 + noted.key,
                radius_km=12.5,
                confidence_level=0.9,
                probability=0.25,
                path=(),
                alternatives=(),
                credible_region=CredibleRegion((), 0.0, 0.0),
                index_version=version,
            )
            known = self.ledger.answer(content, key) or (self.ledger.add_answer(content, key, location), location)
            self.ledger.located(noted.key, content, known[0], withheld)
        self.ledger.commit()

    def locate_again(self, withheld: Reason | None = None) -> None:
        self.locate("newer", 41.5, withheld, again=True)

    def write(self, kind: WriteKind = "xmp") -> int:
        """Writes; returns how many pictures were gone through."""
        failures: list[bool] = []

        def progress(*, failed: bool = False) -> None:
            failures.append(failed)

        before = self.ledger.counts().get(Status.FAILED, 0)
        written = write_positions(self.ledger, kind, self.out, progress)
        assert written <= len(failures) - sum(failures)
        assert self.ledger.counts().get(Status.FAILED, 0) - before == sum(failures)
        return len(failures)

    def begin_writes(self, kind: WriteKind, *, applied: bool) -> None:
        """What a run has done that is killed just before the end of its writes, or just before their beginning."""
        for each in self.ledger.journal.pending(kind):
            path = Path(os.fsdecode(each.found.path))
            write = prepare(path, kind, run_writes._guess(self.ledger, each), self.out / BACKUP_DIRECTORY)
            self.ledger.journal.note_prepared(each.key, each.answer, write)
            self.ledger.commit()
            if applied:
                apply(write)
        self.crash()

    def crash(self) -> None:
        """Closes the ledger without a commit and opens it again."""
        self.ledger.close()
        self.ledger = Ledger.open(self.out, {})

    def rows(self) -> dict[str, Row]:
        return {row.path.removeprefix(f"{self.folder}/"): row for row in self.ledger.rows()}

    def outcomes(self) -> dict[str, tuple[Status, str]]:
        return {name: (row.status, row.reason) for name, row in self.rows().items()}

    def undo(self) -> dict[str, FileChangedError | None]:
        return {Path(name).name: error for name, error in undo_writes(self.ledger, self.out)}  # type: ignore[misc]

    def guess(self, name: str) -> tuple[float, float, str] | None:
        """Where a picture says it was taken, and which run says so."""
        path = self.folder / name
        with path.open("rb") as image:
            claim = next(read_claims(image, sidecar_paths(path)), None)
        return None if claim is None else (claim.position.latitude_deg, claim.position.longitude_deg, claim.run_id)

    def is_written(self, name: str) -> bool:
        """Whether a picture carries the position of its row, as one of this run's guesses."""
        row, guess = self.rows()[name], self.guess(name)
        return (
            guess is not None
            and guess[:2] == pytest.approx((row.latitude_deg, row.longitude_deg), abs=1e-7)
            and guess[2] == self.run_id
        )

    @property
    def run_id(self) -> str:
        return self.ledger.run_id


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Fixture]:
    for name in ("photos", "out"):
        (tmp_path / name).mkdir()
    fixture = Fixture((tmp_path / "photos").resolve(), tmp_path / "out")
    yield fixture
    fixture.ledger.close()


def move(sidecar: Path) -> None:
    """Has a sidecar tell another position, as somebody does who knows better."""
    text, count = re.subn(r"<exif:GPSLatitude>[^<]*<", "<exif:GPSLatitude>12,30.0N<", sidecar.read_text())
    assert count == 1
    sidecar.write_text(text)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.iterdir())}


@kinds
def test_positions_are_written_once_and_taken_back(kind: WriteKind, run: Fixture) -> None:
    names = [f"{number}.jpg" for number in range(5)]
    run.add(*names)
    (run.folder / "0.xmp").write_text(RATED)
    run.locate()
    before = snapshot(run.folder)
    rows = run.rows()

    assert run.write(kind) == 5
    assert all(run.is_written(name) for name in names)
    written = snapshot(run.folder)
    changed = {name for name in written if written[name] != before.get(name)}
    sidecars = {"0.xmp", *(f"{number}.jpg.xmp" for number in range(1, 5))}
    assert changed == (sidecars if kind == "xmp" else set(names))

    run.locate()
    assert run.rows() == rows, "a rerun keeps what was located"
    assert run.write(kind) == 0
    assert snapshot(run.folder) == written

    assert run.undo() == dict.fromkeys(changed)
    assert snapshot(run.folder) == before
    assert run.undo() == {}
    run.locate()
    assert run.rows() == rows
    assert run.write(kind) == 5, "after an undo it can be written again"
    assert all(run.is_written(name) for name in names)


def test_exiftool_reads_what_the_rows_say(run: Fixture) -> None:
    run.add("0.jpg", "1.jpg")
    run.locate()
    run.write("exif")
    run.write("xmp")
    rows = run.rows()
    for name, tags in exiftool.read_tags([run.folder / "0.jpg", run.folder / "1.jpg.xmp"]).items():
        row = rows[name.name.removesuffix(".xmp")]
        assert exiftool.position(tags) == pytest.approx((row.latitude_deg, row.longitude_deg), abs=1e-6)
        group = "XMP" if name.suffix == ".xmp" else "EXIF"
        assert tags[f"{group}:GPSHPositioningError"] == 12500
        assert tags[f"{group}:GPSProcessingMethod"] == f"geosurge tiny run {run.run_id}"


def test_pictures_can_get_both_kinds(run: Fixture) -> None:
    run.add("a.jpg", "b.jpg")
    run.locate()
    before = snapshot(run.folder)
    assert run.write("xmp") == 2
    assert run.write("exif") == 2
    assert run.outcomes() == {"a.jpg": (Status.DONE, ""), "b.jpg": (Status.DONE, "")}
    assert snapshot(run.folder).keys() == {"a.jpg", "a.jpg.xmp", "b.jpg", "b.jpg.xmp"}
    (run.folder / "a.jpg.xmp").unlink()
    (run.folder / "b.jpg.xmp").write_text(RATED)
    assert run.is_written("a.jpg")
    assert run.is_written("b.jpg")
    assert run.undo() == dict.fromkeys(("a.jpg", "b.jpg", "a.jpg.xmp", "b.jpg.xmp"))
    assert snapshot(run.folder).keys() == {"a.jpg", "b.jpg", "b.jpg.xmp"}
    assert {name: snapshot(run.folder)[name] for name in before} == before


@kinds
@pytest.mark.parametrize("applied", [False, True])
def test_a_run_that_is_killed_while_it_writes_goes_on(kind: WriteKind, applied: bool, run: Fixture) -> None:
    run.add("a.jpg")
    run.locate()
    before, rows = snapshot(run.folder), run.rows()
    run.begin_writes(kind, applied=applied)

    finish_writes(run.ledger, kind, run.out)
    run.locate()
    assert run.rows() == rows
    assert run.is_written("a.jpg")
    assert run.write(kind) == 0
    assert list(run.ledger.journal.writes(PREPARED)) == []
    run.undo()
    assert snapshot(run.folder) == before


@kinds
@pytest.mark.parametrize("applied", [False, True])
def test_what_a_killed_run_wrote_is_taken_back_where_it_is_not_wanted_any_more(
    kind: WriteKind, applied: bool, run: Fixture
) -> None:
    run.add("a.jpg")
    run.locate()
    before, rows = snapshot(run.folder), run.rows()
    (noted,) = run.ledger.journal.pending(kind)
    write = prepare(run.folder / "a.jpg", kind, run_writes._guess(run.ledger, noted), run.out / BACKUP_DIRECTORY)
    run.ledger.journal.note_prepared(noted.key, noted.answer, write)
    if applied:
        apply(write)
    finish_writes(run.ledger, None, run.out)
    assert snapshot(run.folder) == before
    run.locate()
    assert run.rows() == rows


@kinds
@pytest.mark.parametrize("applied", [False, True])
def test_what_a_killed_run_began_is_taken_back_where_its_owner_came_first(
    kind: WriteKind, applied: bool, run: Fixture
) -> None:
    run.add("beside.jpg", "gone.jpg", "placed.jpg")
    run.locate()
    owners = {"beside.jpg": (run.folder / "beside.jpg").read_bytes(), "placed.jpg": with_gps(9, 20.0, 30.0)}
    run.begin_writes(kind, applied=applied)
    owners["beside.xmp"] = PLACED.encode()
    (run.folder / "beside.xmp").write_bytes(owners["beside.xmp"])
    (run.folder / "placed.jpg").write_bytes(owners["placed.jpg"])
    (run.folder / "gone.jpg").unlink()

    finish_writes(run.ledger, kind, run.out)
    assert {name: file[0] for name, file in snapshot(run.folder).items()} == owners
    run.locate()
    run.write(kind)
    assert run.outcomes() == dict.fromkeys(("beside.jpg", "placed.jpg"), (Status.SKIPPED, "HAS_POSITION"))
    assert {name: file[0] for name, file in snapshot(run.folder).items()} == owners


@kinds
def test_what_was_written_is_taken_back_when_the_picture_gets_a_position(kind: WriteKind, run: Fixture) -> None:
    run.add("a.jpg", "b.jpg")
    run.locate()
    before = snapshot(run.folder)
    run.write(kind)
    (run.folder / "a.xmp").write_text(PLACED)
    os.utime(run.folder / "a.jpg")
    run.locate()
    assert run.write(kind) == 0
    assert run.outcomes() == {"a.jpg": (Status.SKIPPED, "HAS_POSITION"), "b.jpg": (Status.DONE, "")}
    assert run.rows()["a.jpg"].content_hash == ""
    assert run.guess("a.jpg") == (12.5, -45.0, "")
    (run.folder / "a.xmp").unlink()
    assert run.guess("a.jpg") is None
    assert run.is_written("b.jpg")
    run.undo()
    assert {name: file[0] for name, file in snapshot(run.folder).items()} == {
        name: file[0] for name, file in before.items()
    }


def test_a_guess_that_its_owner_corrected_is_the_pictures_position(run: Fixture) -> None:
    run.add("a.jpg")
    run.locate()
    run.write()
    move(run.folder / "a.jpg.xmp")
    os.utime(run.folder / "a.jpg")
    before = snapshot(run.folder)
    run.locate()
    assert run.write() == 0
    assert run.outcomes() == {"a.jpg": (Status.SKIPPED, "HAS_POSITION")}
    assert snapshot(run.folder) == before


@kinds
def test_what_a_killed_run_left_can_be_undone_at_once(kind: WriteKind, run: Fixture) -> None:
    run.add("a.jpg", "b.jpg")
    run.locate()
    before = snapshot(run.folder)
    for each in run.ledger.journal.pending(kind):
        name = Path(os.fsdecode(each.found.path)).name
        write = prepare(run.folder / name, kind, run_writes._guess(run.ledger, each), run.out / BACKUP_DIRECTORY)
        run.ledger.journal.note_prepared(each.key, each.answer, write)
        if name == "a.jpg":
            run.ledger.commit()
            apply(write)
    run.ledger.commit()
    run.crash()
    assert set(run.undo().values()) == {None}
    assert snapshot(run.folder) == before


@kinds
def test_a_run_whose_backups_are_in_a_folder_of_the_older_name_is_undone(kind: WriteKind, run: Fixture) -> None:
    run.add("a.jpg")
    (run.folder / "a.jpg.xmp").write_text(RATED)
    run.locate()
    before = snapshot(run.folder)
    assert run.write(kind) == 1
    (run.out / BACKUP_DIRECTORY).rename(run.out / "backup")
    assert run.undo() == {("a.jpg" if kind == "exif" else "a.jpg.xmp"): None}
    assert snapshot(run.folder) == before


def test_a_folder_of_the_owner_is_left_alone(run: Fixture) -> None:
    run.add("a.jpg")
    (run.out / "backup").mkdir()
    (run.out / "backup" / ".geosurgeignore").write_text("drafts\n")
    run.locate()
    assert run.write() == 1
    run.undo()
    assert [path.name for path in (run.out / "backup").iterdir()] == [".geosurgeignore"]
    assert (run.out / "backup" / ".geosurgeignore").read_text() == "drafts\n"


@kinds
def test_no_file_is_touched_before_the_journal_is_on_the_disk(
    kind: WriteKind, run: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.add("a.jpg", "b.jpg")
    run.locate()
    journal = sqlite3.connect(run.out / LEDGER_FILE)
    seen: list[bytes] = []

    def apply_noted(write: Write) -> None:
        seen.extend(target for (target,) in journal.execute("SELECT target FROM write WHERE state = 'prepared'"))
        assert write.target in seen
        apply(write)

    monkeypatch.setattr(run_writes, "apply", apply_noted)
    run.write(kind)
    journal.close()
    assert len(set(seen)) == 2


def test_a_sidecar_that_somebody_changed_meanwhile_is_written_by_the_next_run(run: Fixture) -> None:
    run.add("a.jpg")
    sidecar = run.folder / "a.jpg.xmp"
    run.locate()
    run.begin_writes("xmp", applied=False)
    sidecar.write_text(RATED)

    finish_writes(run.ledger, "xmp", run.out)
    assert run.outcomes() == {"a.jpg": (Status.FAILED, "FILE_CHANGED")}
    assert sidecar.read_text() == RATED
    run.locate()
    assert run.write() == 1
    assert run.outcomes() == {"a.jpg": (Status.DONE, "")}
    assert run.is_written("a.jpg")
    assert "Rating" in sidecar.read_text()
    run.undo()
    assert sidecar.read_text() == RATED


@kinds
def test_a_picture_that_changed_since_it_was_located_gets_no_position(kind: WriteKind, run: Fixture) -> None:
    run.add("a.jpg", "b.jpg")
    run.locate()
    (run.folder / "a.jpg").write_bytes(picture(99))
    (run.folder / "b.jpg").unlink()
    before = snapshot(run.folder)
    run.write(kind)
    assert run.outcomes() == {
        "a.jpg": (Status.FAILED, "INPUT_CHANGED"),
        "b.jpg": (Status.FAILED, "INPUT_NOT_READABLE"),
    }
    assert snapshot(run.folder) == before


def test_a_picture_that_changed_under_a_write_of_its_sidecar_counts_as_changed(run: Fixture) -> None:
    run.add("a.jpg")
    run.locate()
    (noted,) = run.ledger.journal.pending("xmp")
    write = prepare(run.folder / "a.jpg", "xmp", run_writes._guess(run.ledger, noted), run.out / BACKUP_DIRECTORY)
    run.ledger.journal.note_prepared(noted.key, noted.answer, write)
    (run.folder / "a.jpg").write_bytes(picture(99))
    finish_writes(run.ledger, "xmp", run.out)
    run.ledger.begin_scan()
    run.ledger.note(scan([run.folder]))
    assert [noted.key for noted in run.ledger.to_look_at()] == [noted.key]


@pytest.mark.parametrize("sidecar", ["photo.xmp", "photo.XMP"])
def test_a_sidecar_that_two_pictures_share_is_written_once(sidecar: str, run: Fixture) -> None:
    run.add("photo.jpg", "photo.png")
    (run.folder / sidecar).write_text(RATED)
    run.locate()
    before = snapshot(run.folder)
    run.write()
    assert run.outcomes() == {"photo.jpg": (Status.DONE, ""), "photo.png": (Status.SKIPPED, "HAS_POSITION")}
    assert run.is_written("photo.jpg")
    assert run.guess("photo.png") == run.guess("photo.jpg")
    written = snapshot(run.folder)
    run.locate()
    assert run.outcomes() == {"photo.jpg": (Status.DONE, ""), "photo.png": (Status.SKIPPED, "HAS_POSITION")}
    run.write()
    assert snapshot(run.folder) == written
    assert run.undo() == {sidecar: None}
    assert snapshot(run.folder) == before


def test_pictures_in_shards_are_located_but_not_written(run: Fixture) -> None:
    shard = run.folder / "shard.tar"
    with tarfile.open(shard, "w") as tar:
        info = tarfile.TarInfo("1.jpg")
        info.size = len(picture(1))
        tar.addfile(info, io.BytesIO(picture(1)))
    run.add("a.jpg")
    run.ledger.begin_scan()
    before = shard.read_bytes()
    run.ledger.note(scan([shard, run.folder]))
    for noted in run.ledger.to_look_at():
        run.ledger.looked_at(noted.key, None)
    key = AnswerKey("tiny", "", "{}")
    location = Location(1.0, 2.0, 3.0, 0.9, 0.5, (), (), CredibleRegion((), 0.0, 0.0), "tiny")
    for noted in run.ledger.to_locate():
        answer = run.ledger.add_answer(noted.key.to_bytes(32, "big"), key, location)
        run.ledger.located(noted.key, noted.key.to_bytes(32, "big"), answer)
    run.write()
    assert run.outcomes() == {"a.jpg": (Status.DONE, ""), "shard.tar/1.jpg": (Status.FAILED, "WRITE_UNSUPPORTED")}
    assert "unpack" in run.rows()["shard.tar/1.jpg"].detail
    assert shard.read_bytes() == before
    assert {path.name for path in run.folder.iterdir()} == {"shard.tar", "a.jpg", "a.jpg.xmp"}


def test_what_got_a_position_or_a_broken_sidecar_meanwhile_is_left_alone(run: Fixture) -> None:
    run.add("broken.jpg", "fine.jpg", "placed.jpg", "tagged.jpg")
    run.locate()
    (run.folder / "broken.jpg.xmp").write_text("rating: 4")
    (run.folder / "placed.xmp").write_text(PLACED)
    tagged = run.folder / "tagged.jpg"
    status = tagged.stat()
    size = len(tagged.read_bytes())
    tagged.write_bytes(with_gps(9, 20.0, 30.0)[:size].ljust(size, b"\0"))
    os.utime(tagged, ns=(status.st_mtime_ns, status.st_mtime_ns))
    before = snapshot(run.folder)
    run.write()
    assert run.outcomes() == {
        "broken.jpg": (Status.FAILED, "SIDECAR_INVALID"),
        "fine.jpg": (Status.DONE, ""),
        "placed.jpg": (Status.SKIPPED, "HAS_POSITION"),
        "tagged.jpg": (Status.SKIPPED, "HAS_POSITION"),
    }
    after = snapshot(run.folder)
    assert after.pop("fine.jpg.xmp")
    assert after == before
    assert run.rows()["placed.jpg"].latitude_deg is None


@kinds
def test_what_was_written_for_an_older_answer_is_replaced(kind: WriteKind, run: Fixture) -> None:
    run.add("a.jpg", "b.jpg")
    (run.folder / "a.xmp").write_text(RATED)
    run.locate()
    before = snapshot(run.folder)
    run.write(kind)
    old = {name: run.guess(name) for name in ("a.jpg", "b.jpg")}
    run.locate_again()
    assert {row.index_version for row in run.rows().values()} == {"newer"}
    assert run.write(kind) == 2
    for name, guess in old.items():
        assert run.is_written(name)
        assert run.guess(name) != guess
    run.locate()
    assert run.write(kind) == 0
    run.undo()
    assert snapshot(run.folder) == before


@kinds
def test_what_was_written_is_taken_back_when_the_new_guess_is_withheld(kind: WriteKind, run: Fixture) -> None:
    run.add("a.jpg", "b.jpg")
    run.locate()
    before = snapshot(run.folder)
    run.write(kind)
    if kind == "xmp":
        move(run.folder / "b.jpg.xmp")
    run.locate_again(withheld=Reason("PROBABILITY_TOO_LOW", "too low"))
    assert run.write(kind) == 0
    assert run.rows()["a.jpg"].status is Status.WITHHELD
    assert run.guess("a.jpg") is None
    if kind == "xmp":
        assert run.outcomes()["b.jpg"] == (Status.SKIPPED, "HAS_POSITION")
        (run.folder / "b.jpg.xmp").unlink()
    assert snapshot(run.folder) == before


def test_an_undo_leaves_what_is_somebody_elses_by_now(run: Fixture) -> None:
    run.add("a.jpg", "b.jpg", "c.jpg")
    run.locate()
    run.write()
    other, rated = run.folder / "a.jpg.xmp", run.folder / "b.jpg.xmp"
    move(other)
    moved = other.read_text()
    rated.write_text(rated.read_text().replace("<exif:GPSMapD", '<x:Mine xmlns:x="x">1</x:Mine><exif:GPSMapD'))
    outcome = run.undo()
    assert isinstance(outcome.pop("a.jpg.xmp"), FileChangedError)
    assert outcome == {"b.jpg.xmp": None, "c.jpg.xmp": None}
    assert other.read_text() == moved
    assert "Mine" in rated.read_text()
    assert run.guess("b.jpg") is None
    assert not (run.folder / "c.jpg.xmp").exists()
    other.unlink()
    assert run.undo() == {"a.jpg.xmp": None}, "it can be tried again"


@kinds
def test_an_undo_while_the_pictures_are_away_is_not_lost(kind: WriteKind, run: Fixture) -> None:
    run.add("a.jpg", "b.jpg")
    run.locate()
    before = snapshot(run.folder)
    run.write(kind)
    away = run.folder.with_name("away")
    run.folder.rename(away)
    run.folder.mkdir()
    outcome = run.undo()
    ending = {"exif": "", "xmp": ".xmp"}[kind]
    assert outcome.keys() == {f"a.jpg{ending}", f"b.jpg{ending}"}
    for error in outcome.values():
        assert isinstance(error, FileChangedError)
        assert "is not there" in str(error)
        assert "undo again" in str(error)
    run.folder.rmdir()
    away.rename(run.folder)
    assert run.undo() == dict.fromkeys(outcome)
    assert snapshot(run.folder) == before


def test_a_new_sidecar_that_its_owner_removed_is_taken_back(run: Fixture) -> None:
    run.add("a.jpg")
    run.locate()
    run.write()
    (run.folder / "a.jpg.xmp").unlink()
    assert run.undo() == {"a.jpg.xmp": None}
    assert run.undo() == {}


def test_a_picture_that_its_owner_removed_with_its_sidecar_needs_no_undo(run: Fixture) -> None:
    run.add("a.jpg", "b.jpg")
    run.locate()
    run.write()
    for name in ("a.jpg", "a.jpg.xmp"):
        (run.folder / name).unlink()
    assert run.undo() == {"a.jpg.xmp": None, "b.jpg.xmp": None}
    assert run.undo() == {}


def test_many_pictures_are_written_in_one_go(run: Fixture) -> None:
    run.add(*(f"{'x' * number}.jpg" for number in range(1, 71)))
    run.locate()
    assert run.write() == 70
    assert all(map(run.is_written, run.rows()))
