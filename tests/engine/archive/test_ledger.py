from __future__ import annotations

import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.limits import limited

from geosurge.archive.ledger import LEDGER_FILE, AnswerKey, Ledger
from geosurge.archive.rows import Position, Reason, Row, Status
from geosurge.archive.sources import Found
from geosurge.archive.tasks import Failure
from geosurge.errors import InputNotReadableError, LedgerError, RunConflictError
from geosurge.location import Alternative, CredibleRegion, Location, PathCell, Place, Timings

KEY = AnswerKey("tiny", "ab" * 32, "{}")
OTHER_KEY = replace(KEY, index_version="other")
OPTIONS = {"sources": ["/photos"], "top_k": 5, "min_probability": 0.25}
PLACE = Place("Nairobi", "Nairobi Area", "Kenya", "KE", 12.5)
LOCATION = Location(
    latitude_deg=-1.25,
    longitude_deg=36.75,
    radius_km=120.5,
    confidence_level=0.9,
    probability=0.5,
    path=(PathCell(1, "17", 0.75), PathCell(2, "182f", 0.5)),
    alternatives=(Alternative("182f", 0.5, -1.25, 36.75, PLACE), Alternative("1831", 0.25, -1.5, 36.0)),
    credible_region=CredibleRegion((), 0.0, 0.0),
    index_version="tiny",
    place=PLACE,
    timings=Timings(decode_ms=2.5, encode_ms=1.5),
)
GONE = InputNotReadableError("it has gone")


def photos(count: int) -> list[Found]:
    return [Found(b"/photos/%d.jpg" % number, size=100 + number, mtime_ns=number) for number in range(count)]


def content(number: int) -> bytes:
    return number.to_bytes(32, "big")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path, OPTIONS) as ledger:
        ledger.begin_scan()
        yield ledger


def scan_again(ledger: Ledger, found: list[Found]) -> None:
    ledger.begin_scan()
    ledger.note(found)


def look(ledger: Ledger) -> list[bytes]:
    """Looks at all that is to be looked at, finding no position."""
    looked_at = list(ledger.to_look_at())
    for noted in looked_at:
        ledger.looked_at(noted.key, None)
    return [noted.found.path for noted in looked_at]


def locate(ledger: Ledger, key: AnswerKey = KEY) -> list[bytes]:
    """Locates all that is to be located, each a content of its own."""
    located = list(ledger.to_locate())
    for noted in located:
        known = ledger.answer(content(noted.key), key)
        answer = known[0] if known else ledger.add_answer(content(noted.key), key, LOCATION)
        ledger.located(noted.key, content(noted.key), answer)
    return [noted.found.path for noted in located]


def statuses(ledger: Ledger) -> dict[str, tuple[Status, str]]:
    return {row.path: (row.status, row.reason) for row in ledger.rows()}


def test_a_picture_goes_from_found_over_looked_at_to_done(ledger: Ledger) -> None:
    ledger.note(photos(3))
    assert ledger.counts() == {None: 3}
    assert not list(ledger.to_locate()), "nothing is located before it was looked at"
    assert [noted.found for noted in ledger.to_look_at()] == photos(3)
    first, second, third = ledger.to_look_at()
    ledger.looked_at(first.key, Position(1.0, 2.0, "exif"), Reason("HAS_POSITION", "it has one"))
    ledger.looked_at(second.key, None)
    ledger.failed(third.key, Failure("SIDECAR_INVALID", "no XMP"))
    assert ledger.counts() == {Status.SKIPPED: 1, Status.FAILED: 1, None: 1}
    assert locate(ledger) == [b"/photos/1.jpg"]
    assert list(ledger.rows()) == [
        Row("/photos/0.jpg", Status.SKIPPED, "HAS_POSITION", "it has one", position=Position(1.0, 2.0, "exif")),
        Row("/photos/1.jpg", Status.DONE, content_hash=content(2).hex()).with_answer(LOCATION, KEY.encoder_hash),
        Row("/photos/2.jpg", Status.FAILED, "SIDECAR_INVALID", "no XMP"),
    ]
    assert ledger.counts() == {Status.SKIPPED: 1, Status.FAILED: 1, Status.DONE: 1}
    assert ledger.index_versions() == ["tiny"]


def test_rows_come_in_the_order_of_paths_and_only_of_what_is_there(ledger: Ledger) -> None:
    found = [Found(b"/b.jpg"), Found(b"/s.tar", b"2.jpg"), Found(b"/a\xff.jpg"), Found(b"/s.tar", b"1.jpg")]
    ledger.note(found)
    look(ledger)
    locate(ledger)
    assert list(statuses(ledger)) == ["/a\\xff.jpg", "/b.jpg", "/s.tar/1.jpg", "/s.tar/2.jpg"]
    scan_again(ledger, found[1:2])
    assert list(statuses(ledger)) == ["/s.tar/2.jpg"]
    assert ledger.counts() == {Status.DONE: 1}
    scan_again(ledger, found)
    assert look(ledger) == []
    assert ledger.counts() == {Status.DONE: 4}, "what comes back is still known"


def test_what_has_not_changed_is_kept(ledger: Ledger) -> None:
    ledger.note(photos(2))
    look(ledger)
    locate(ledger)
    before = list(ledger.rows())
    scan_again(ledger, photos(2))
    assert look(ledger) == []
    assert locate(ledger) == []
    assert list(ledger.rows()) == before


@pytest.mark.parametrize("change", [{"size": 1}, {"mtime_ns": 77}, {"offset": 512}])
def test_what_has_changed_is_done_again(change: dict[str, Any], ledger: Ledger) -> None:
    ledger.note(photos(2))
    look(ledger)
    locate(ledger)
    changed = replace(photos(1)[0], **change)
    scan_again(ledger, [changed, photos(2)[1]])
    assert [noted.found for noted in ledger.to_look_at()] == [changed]
    assert [row.path for row in ledger.rows()] == ["/photos/1.jpg"], "the old answer is none any more"
    look(ledger)
    assert locate(ledger) == [b"/photos/0.jpg"]


@pytest.mark.parametrize("is_final", [False, True])
def test_what_failed_is_tried_again_unless_the_content_is_to_blame(is_final: bool, ledger: Ledger) -> None:
    ledger.note(photos(1))
    look(ledger)
    (noted,) = ledger.to_locate()
    ledger.failed(noted.key, Failure("SOME_REASON", "why", is_final=is_final), content(1))
    scan_again(ledger, photos(1))
    assert look(ledger) == ([] if is_final else [b"/photos/0.jpg"])
    scan_again(ledger, [replace(photos(1)[0], mtime_ns=5)])
    assert look(ledger) == [b"/photos/0.jpg"], "another content may be better"


def test_what_has_a_position_is_looked_at_in_every_run(ledger: Ledger) -> None:
    """A sidecar can change or go without its picture."""
    ledger.note(photos(1))
    (noted,) = ledger.to_look_at()
    ledger.looked_at(noted.key, Position(1.0, 2.0, "sidecar"), Reason("HAS_POSITION", "it has one"))
    scan_again(ledger, photos(1))
    assert look(ledger) == [b"/photos/0.jpg"]
    locate(ledger)
    (row,) = ledger.rows()
    assert (row.status, row.position) == (Status.DONE, None)


def test_what_cannot_be_read_fails_until_it_can(ledger: Ledger) -> None:
    ledger.note([replace(photos(1)[0], error=GONE)])
    assert statuses(ledger) == {"/photos/0.jpg": (Status.FAILED, "INPUT_NOT_READABLE")}
    assert look(ledger) == []
    scan_again(ledger, photos(1))
    look(ledger)
    locate(ledger)
    scan_again(ledger, [replace(photos(1)[0], error=GONE)])
    assert statuses(ledger) == {"/photos/0.jpg": (Status.FAILED, "INPUT_NOT_READABLE")}


def test_a_picture_that_is_found_twice_counts_once(ledger: Ledger) -> None:
    ledger.note([*photos(2), *photos(2)])
    assert ledger.counts() == {None: 2}
    look(ledger)
    ledger.note(photos(1))
    assert look(ledger) == []
    changed = replace(photos(1)[0], size=7)
    ledger.note([changed])
    assert [noted.found for noted in ledger.to_look_at()] == [changed]
    assert ledger.counts() == {None: 2}


def test_answers_are_told_apart_by_content_and_options(ledger: Ledger) -> None:
    answer = ledger.add_answer(content(1), KEY, LOCATION)
    known = ledger.answer(content(1), KEY)
    assert known is not None
    assert known[0] == answer
    assert known[1].latitude_deg == LOCATION.latitude_deg
    assert ledger.answer(content(2), KEY) is None
    assert ledger.answer(content(1), replace(KEY, options='{"top_k": 1}')) is None


def known_answer(ledger: Ledger, key: AnswerKey) -> int | None:
    known = ledger.answer(content(1), key)
    return None if known is None else known[0]


@pytest.mark.parametrize("other", [{"index_version": "b"}, {"encoder_hash": "cd"}])
def test_what_another_index_answered_counts_until_it_is_asked_again(other: dict[str, str], ledger: Ledger) -> None:
    first = ledger.add_answer(content(1), KEY, LOCATION)
    newer = replace(KEY, **other)
    assert known_answer(ledger, newer) == known_answer(ledger, KEY) == first
    ledger.ask_again(newer)
    assert known_answer(ledger, newer) is None
    second = ledger.add_answer(content(1), newer, LOCATION)
    assert known_answer(ledger, newer) == second


def test_an_answer_is_that_of_the_index_that_was_asked_again_last(tmp_path: Path) -> None:
    with Ledger.open(tmp_path, OPTIONS) as ledger:
        expected = {key: ledger.add_answer(content(1), key, LOCATION) for key in (KEY, OTHER_KEY)}
        ledger.commit()
    for asked_again in (OTHER_KEY, KEY, OTHER_KEY):
        with Ledger.open(tmp_path, OPTIONS) as ledger:
            ledger.ask_again(asked_again)
            assert known_answer(ledger, asked_again) == expected[asked_again]
            ledger.commit()
        with Ledger.open(tmp_path, OPTIONS) as ledger:
            assert {known_answer(ledger, key) for key in (KEY, OTHER_KEY)} == {expected[asked_again]}


def test_asking_again_takes_what_another_index_answered(ledger: Ledger) -> None:
    ledger.note(photos(4))
    look(ledger)
    old, new, withheld, bad = ledger.to_locate()
    first = ledger.add_answer(content(1), OTHER_KEY, LOCATION)
    ledger.located(old.key, content(1), first)
    ledger.located(new.key, content(1), ledger.add_answer(content(1), KEY, LOCATION))
    ledger.located(withheld.key, content(1), first, Reason("RADIUS_TOO_LARGE", "too large"))
    ledger.failed(bad.key, Failure("IMAGE_EMPTY", "empty", is_final=True))
    ledger.ask_again(KEY)
    assert locate(ledger) == [old.found.path, withheld.found.path]
    assert not [row for row in ledger.rows() if row.reason == "RADIUS_TOO_LARGE"]


def test_many_pages_can_be_gone_through_while_they_change(ledger: Ledger) -> None:
    found = photos(2500)
    ledger.note(found)
    assert look(ledger) == [item.path for item in found]
    seen = []
    for noted in ledger.to_locate():
        seen.append(noted.found.path)
        ledger.failed(noted.key, Failure("X", "x"))
    assert seen == [item.path for item in found]


def test_reasons_are_counted_most_frequent_first(ledger: Ledger) -> None:
    ledger.note(photos(6))
    for noted, reason in zip(ledger.to_look_at(), "CABABA", strict=True):
        ledger.failed(noted.key, Failure(reason, "why"))
    assert list(ledger.reasons(Status.FAILED).items()) == [("A", 3), ("B", 2), ("C", 1)]
    assert [ledger.example(Status.FAILED, reason) for reason in "ABC"] == [
        f"/photos/{number}.jpg" for number in (1, 2, 0)
    ]
    assert ledger.reasons(Status.SKIPPED) == {}


def test_a_picture_that_the_run_itself_changed_counts_as_unchanged(ledger: Ledger) -> None:
    ledger.note(photos(1))
    look(ledger)
    (noted,) = ledger.to_locate()
    locate(ledger)
    ledger.picture_is_now(noted.key, 4321, 99, content(7))
    scan_again(ledger, [replace(photos(1)[0], size=4321, mtime_ns=99)])
    assert ledger.counts() == {Status.DONE: 1}
    (row,) = ledger.rows()
    assert row.content_hash == content(7).hex()


def test_what_could_not_be_written_is_located_all_the_same(ledger: Ledger) -> None:
    ledger.note(photos(1))
    look(ledger)
    locate(ledger)
    (row,) = ledger.rows()
    (picture,) = ledger.journal.pending("xmp")
    ledger.failed(picture.key, Failure("FILE_NOT_WRITABLE", "read-only"))
    (failed,) = ledger.rows()
    assert failed == replace(row, status=Status.FAILED, reason="FILE_NOT_WRITABLE", detail="read-only")


def test_only_what_was_committed_is_there_after_a_crash(tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from typing import Any
from geosurge.archive.ledger import Ledger
from geosurge.archive.sources import Found
ledger = Ledger.open(Path({str(tmp_path)!r}), {OPTIONS!r})
ledger.begin_scan()
ledger.note([Found(b"/kept.jpg")])
name = ledger.run_id
ledger.commit()
print(name, flush=True)
ledger.note([Found(b"/lost.jpg")])
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with Ledger.open(tmp_path, OPTIONS) as ledger:
        assert [noted.found.path for noted in ledger.to_look_at()] == [b"/kept.jpg"]
        assert ledger.run_id == killed.stdout.strip()


def test_a_dry_run_keeps_nothing(tmp_path: Path) -> None:
    with Ledger.open(tmp_path, OPTIONS) as ledger:
        scan_again(ledger, photos(2))
        look(ledger)
        locate(ledger)
        ledger.commit()
    with Ledger.open(tmp_path, OPTIONS, keeps=False) as ledger:
        scan_again(ledger, [replace(photos(1)[0], size=1)])
        assert len(list(ledger.to_look_at())) == 1
        ledger.commit()
    with Ledger.open(tmp_path, OPTIONS) as ledger:
        assert ledger.counts() == {Status.DONE: 2}


def test_other_options_are_refused_and_spelled_out(tmp_path: Path) -> None:
    with Ledger.open(tmp_path, OPTIONS) as ledger:
        ledger.add_answer(content(1), KEY, LOCATION)
        ledger.commit()
    Ledger.open(tmp_path, dict(reversed(OPTIONS.items()))).close()
    wanted = {"sources": ["/photos"], "top_k": 3, "region": "47a"}
    with pytest.raises(RunConflictError) as refused:
        Ledger.open(tmp_path, wanted)
    message = str(refused.value)
    assert str(tmp_path) in message
    assert "top_k was 5 and is now 3" in message
    assert "min_probability was 0.25 and is now absent" in message
    assert 'region was absent and is now "47a"' in message
    assert "sources" not in message
    Ledger.open(tmp_path, OPTIONS).close()


def test_options_can_be_corrected_before_a_run_comes_to_anything(tmp_path: Path) -> None:
    Ledger.open(tmp_path, OPTIONS).close()
    Ledger.open(tmp_path, {"top_k": 3}).close()
    (tmp_path / "results.csv").touch()
    Ledger.open(tmp_path, {"top_k": 4}).close()
    with Ledger.open(tmp_path, {"top_k": 3}) as ledger:
        ledger.note_outputs(["results.csv"])
    with pytest.raises(RunConflictError, match="top_k was 3 and is now 5"):
        Ledger.open(tmp_path, OPTIONS)


def test_the_runs_outputs_are_those_that_it_noted(tmp_path: Path) -> None:
    with Ledger.open(tmp_path, OPTIONS) as ledger:
        assert not ledger.is_output("results.csv")
        ledger.note_outputs(["results.csv"])
        ledger.note_outputs(["report.html", "results.csv"])
    with Ledger.open(tmp_path, OPTIONS) as ledger:
        assert [ledger.is_output(name) for name in ("results.csv", "report.html", "results.kml")] == [True, True, False]


def test_a_folder_without_a_ledger_holds_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunConflictError, match="holds no run"):
        Ledger.reopen(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_ledger_that_is_damaged_further_in_is_named(tmp_path: Path) -> None:
    with Ledger.open(tmp_path, OPTIONS) as ledger:
        scan_again(ledger, photos(3000))
        ledger.commit()
    path = tmp_path / LEDGER_FILE
    data = bytearray(path.read_bytes())
    half = len(data) // 2
    data[half:] = random.Random(1).randbytes(len(data) - half)
    path.write_bytes(data)
    with (
        pytest.raises(LedgerError, match=rf"{LEDGER_FILE} is damaged .*another directory"),
        Ledger.open(tmp_path, OPTIONS) as ledger,
    ):
        list(ledger.to_look_at())


def test_a_full_disk_is_named_wherever_it_shows(tmp_path: Path) -> None:
    with Ledger.open(tmp_path, OPTIONS) as ledger:
        scan_again(ledger, photos(10))
        ledger.commit()
    found = photos(40_000)
    with (
        limited(resource.RLIMIT_FSIZE, 300_000),
        pytest.raises(LedgerError, match=rf"{LEDGER_FILE} cannot be written.*make room"),
        Ledger.open(tmp_path, OPTIONS) as ledger,
    ):
        # More than SQLite holds in memory until a commit.
        scan_again(ledger, found)
    with limited(resource.RLIMIT_FSIZE, 300_000), Ledger.open(tmp_path, OPTIONS) as ledger:
        scan_again(ledger, found[:6000])
        with pytest.raises(LedgerError, match=rf"{LEDGER_FILE} cannot be written.*make room"):
            ledger.commit()
    with Ledger.open(tmp_path, OPTIONS) as ledger:
        assert ledger.counts() == {None: 10}
        scan_again(ledger, found)
        ledger.commit()
        assert ledger.counts() == {None: 40_000}
