from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.metadata import GUESS

from geosurge.archive.ledger import AnswerKey, Ledger, Noted
from geosurge.archive.rows import Reason
from geosurge.archive.sources import Found
from geosurge.archive.tasks import Failure
from geosurge.archive.writes.file_write import Write
from geosurge.archive.writes.journal import APPLIED, PREPARED, UNDONE, PendingWrite
from geosurge.location import CredibleRegion, Location

KEY = AnswerKey("tiny", "ab" * 32, "{}")
OTHER_KEY = replace(KEY, index_version="other")
CONTENT = bytes(32)
LOCATION = Location(-1.25, 36.75, 120.5, 0.9, 0.5, (), (), CredibleRegion((), 0.0, 0.0), "tiny")
WRITE = Write(b"/photos/0.jpg.xmp", "xmp", False, "", "", "cd" * 32, 1234, 0, GUESS)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path, {}) as ledger:
        ledger.begin_scan()
        yield ledger


def to_locate(ledger: Ledger, count: int) -> list[Noted]:
    """Pictures that were looked at and have no position."""
    ledger.note(Found(b"/photos/%d.jpg" % number) for number in range(count))
    for noted in ledger.to_look_at():
        ledger.looked_at(noted.key, None)
    return list(ledger.to_locate())


def pending(ledger: Ledger) -> list[PendingWrite]:
    return list(ledger.journal.pending("xmp"))


def test_a_position_is_to_be_written_until_it_is(ledger: Ledger) -> None:
    done, withheld, other = to_locate(ledger, 3)
    answer = ledger.add_answer(CONTENT, KEY, LOCATION)
    ledger.located(done.key, CONTENT, answer)
    ledger.located(withheld.key, CONTENT, answer, Reason("PROBABILITY_TOO_LOW", "low"))
    ledger.failed(other.key, Failure("X", "x"))
    (picture,) = pending(ledger)
    assert (picture.key, picture.found, picture.encoder_hash) == (done.key, done.found, KEY.encoder_hash)
    assert picture.location.longitude_deg == LOCATION.longitude_deg

    ledger.journal.note_prepared(done.key, answer, WRITE)
    assert [(write, found.path) for _, found, write in ledger.journal.writes(PREPARED)] == [(WRITE, done.found.path)]
    assert [each.key for each in pending(ledger)] == [done.key], "what did not come to its end is done again"
    ledger.journal.note_ended(done.key, "xmp", APPLIED)
    assert pending(ledger) == []
    assert list(ledger.journal.writes(PREPARED)) == []
    assert ledger.journal.write_of(done.key, "xmp") == WRITE
    assert len(list(ledger.journal.pending("exif"))) == 1, "into the picture it was not written"

    ledger.journal.note_ended(done.key, "xmp", UNDONE)
    assert ledger.journal.write_of(done.key, "xmp") is None
    assert len(pending(ledger)) == 1
    ledger.journal.note_prepared(done.key, answer, WRITE)
    ledger.journal.note_ended(done.key, "xmp", APPLIED)
    ledger.located(done.key, CONTENT, ledger.add_answer(CONTENT, OTHER_KEY, LOCATION))
    assert len(pending(ledger)) == 1, "another answer is to be written"


def test_both_kinds_of_writes_of_many_pictures_can_be_undone(ledger: Ledger) -> None:
    answer = ledger.add_answer(CONTENT, KEY, LOCATION)
    keys = [noted.key for noted in to_locate(ledger, 1200)]
    for key in random.Random(1).sample(keys, len(keys)):
        ledger.journal.note_prepared(key, answer, WRITE)
        ledger.journal.note_prepared(key, answer, replace(WRITE, kind="exif"))
    seen = []
    for key, _, write in ledger.journal.writes(PREPARED, APPLIED):
        seen.append((key, write.kind))
        ledger.journal.note_ended(key, write.kind, UNDONE)
    assert sorted(seen) == sorted((key, kind) for key in keys for kind in ("xmp", "exif"))
    assert list(ledger.journal.writes(PREPARED, APPLIED)) == []
