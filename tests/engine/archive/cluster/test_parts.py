from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from geosurge.archive.cluster.parts import ANSWERS, ID, PICTURES, export_pictures, note_answers
from geosurge.archive.ledger import AnswerKey, Ledger
from geosurge.archive.locating import Thresholds
from geosurge.archive.rows import Status
from geosurge.archive.sources import Found
from geosurge.errors import OutputNotWritableError
from geosurge.location import CredibleRegion, Location
from geosurge.wire import location_to_bytes

KEY = AnswerKey("tiny", "ab" * 32, "{}")
LOCATION = Location(-1.25, 36.75, 120.5, 0.9, 0.5, (), (), CredibleRegion((), 0.0, 0.0), "tiny")
BATCH_SIZE, SLOTS = 4, 3


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path, {}) as ledger:
        yield ledger


def find(ledger: Ledger, *found: Found) -> None:
    """Scans, and looks at what was found."""
    ledger.begin_scan()
    ledger.note(found)
    for noted in ledger.to_look_at():
        ledger.looked_at(noted.key, None)


def photos(count: int) -> list[Found]:
    return [Found(b"/photos/%d.jpg" % number, size=100 + number) for number in range(count)]


def exported(ledger: Ledger, exchange: Path) -> list[dict[str, Any]]:
    export_pictures(ledger, exchange, BATCH_SIZE, SLOTS)
    return [row for path in sorted((exchange / PICTURES).iterdir()) for row in pq.read_table(path).to_pylist()]


def put_answers(exchange: Path, *answers: dict[str, Any]) -> None:
    (exchange / ANSWERS).mkdir(exist_ok=True)
    names = (ID, "key", "content_hash", "response", "reason", "detail", "is_final")
    table = pa.Table.from_pylist([dict.fromkeys(names) | answer for answer in answers])
    pq.write_table(table, exchange / ANSWERS / "0.parquet")


def answer(row: dict[str, Any], probability: float = 0.5) -> dict[str, Any]:
    """What comes back for a row that was exported."""
    response = location_to_bytes(replace(LOCATION, probability=probability))
    return {ID: row[ID], "key": row["key"], "content_hash": row["path"].rjust(32), "response": response}


@pytest.mark.parametrize(("count", "rows_a_part"), [(1, 4), (25, 4), (4 * 3 * 4 * 2, 8), (2000, 32)])
def test_parts_are_whole_batches_and_enough_for_all(
    count: int, rows_a_part: int, ledger: Ledger, tmp_path: Path
) -> None:
    find(ledger, *photos(count), Found(b"/s.tar", b"a.jpg", 7, 8, 512))
    rows = exported(ledger, tmp_path / "exchange")
    assert [Found(row["path"], row["member"], row["size"], row["mtime_ns"], row["offset"]) for row in rows] == [
        noted.found for noted in ledger.to_locate()
    ]
    sizes = [pq.read_metadata(path).num_rows for path in sorted((tmp_path / "exchange" / PICTURES).iterdir())]
    assert set(sizes[:-1]) <= {rows_a_part}
    assert 0 < sizes[-1] <= rows_a_part
    assert sum(sizes) == count + 1


def test_a_picture_keeps_its_name_until_it_changes(ledger: Ledger, tmp_path: Path) -> None:
    find(ledger, *photos(9))
    before = [row[ID] for row in exported(ledger, tmp_path / "exchange")]
    assert len(set(before)) == 9
    assert [row[ID] for row in exported(ledger, tmp_path / "exchange")] == before
    find(ledger, *photos(8), replace(photos(9)[8], mtime_ns=5))
    after = [row[ID] for row in exported(ledger, tmp_path / "exchange")]
    assert after[:8] == before[:8]
    assert after[8] != before[8]


def test_what_comes_back_is_noted_as_often_as_it_comes(ledger: Ledger, tmp_path: Path) -> None:
    find(ledger, *photos(3))
    done, weak, bad = exported(ledger, tmp_path / "exchange")
    broken = {ID: bad[ID], "key": bad["key"], "reason": "IMAGE_EMPTY", "detail": "no bytes", "is_final": True}
    put_answers(tmp_path / "exchange", answer(done), answer(weak, probability=0.01), broken)
    for _ in range(2):
        note_answers(ledger, KEY, Thresholds(min_probability=0.1), tmp_path / "exchange")
        rows = {row.path: (row.status, row.reason, row.probability) for row in ledger.rows()}
        assert rows == {
            "/photos/0.jpg": (Status.DONE, "", 0.5),
            "/photos/1.jpg": (Status.WITHHELD, "PROBABILITY_TOO_LOW", 0.01),
            "/photos/2.jpg": (Status.FAILED, "IMAGE_EMPTY", None),
        }


def test_an_answer_for_what_a_picture_was_before_is_passed_over(ledger: Ledger, tmp_path: Path) -> None:
    find(ledger, *photos(2))
    same, changed = exported(ledger, tmp_path / "exchange")
    find(ledger, photos(1)[0], replace(photos(2)[1], size=7))
    exported(ledger, tmp_path / "exchange")
    put_answers(tmp_path / "exchange", answer(same), answer(changed))
    note_answers(ledger, KEY, Thresholds(), tmp_path / "exchange")
    assert ledger.counts() == {Status.DONE: 1, None: 1}


def test_a_place_that_cannot_be_written_is_named(ledger: Ledger, tmp_path: Path) -> None:
    find(ledger, *photos(1))
    (tmp_path / "file").touch()
    with pytest.raises(OutputNotWritableError, match=r"file/exchange/pictures cannot be written"):
        export_pictures(ledger, tmp_path / "file" / "exchange", BATCH_SIZE, SLOTS)
