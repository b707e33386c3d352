"""Writes of a run, noted before and after: the table of its ledger that undoing reads.

A write is `PREPARED` before its file is touched, `APPLIED` once the file is as it should be, and `UNDONE` when that was
taken back.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Final

from geosurge.archive.metadata.guess import Guess
from geosurge.archive.rows import Position, Status
from geosurge.archive.sources import Found
from geosurge.archive.writes.file_write import Write, WriteKind
from geosurge.location import Location
from geosurge.wire import bytes_to_location

PREPARED: Final = "prepared"
APPLIED: Final = "applied"
UNDONE: Final = "undone"
"""States of a write."""

WRITE_TABLE: Final = """
CREATE TABLE IF NOT EXISTS write (
    id INTEGER PRIMARY KEY,
    picture INTEGER NOT NULL REFERENCES picture (id),
    kind TEXT NOT NULL,
    answer INTEGER NOT NULL REFERENCES answer (id),
    state TEXT NOT NULL,
    target BLOB NOT NULL,
    change TEXT NOT NULL,
    UNIQUE (picture, kind)
);
"""

_PAGE: Final = 1000


@dataclass(frozen=True)
class PendingWrite:
    """A picture whose position is to be written.

    Attributes:
        key: Of the picture.
        found: The picture.
        answer: Where its answer is in the ledger.
        location: The answer.
        encoder_hash: SHA-256 of the encoder behind it.
    """

    key: int
    found: Found
    answer: int
    location: Location
    encoder_hash: str


class Journal:
    """The table of writes, one row for each picture and kind."""

    def __init__(self, database: sqlite3.Connection) -> None:
        """Made by `geosurge.archive.ledger.Ledger`, which commits."""
        self._database = database

    def pending(self, kind: WriteKind) -> Iterator[PendingWrite]:
        """Pictures that are done and whose position has not been written, or not as it was meant to be."""
        last = 0
        while True:
            page = self._database.execute(
                "SELECT picture.id, path, member, size, mtime_ns, offset, answer.id, response, encoder_hash FROM"
                " picture JOIN answer ON answer.id = picture.answer"
                " LEFT JOIN write ON write.picture = picture.id AND write.kind = ? AND write.state = ?"
                " WHERE scan = (SELECT CAST(value AS INTEGER) FROM run WHERE name = 'scan') AND status = ?"
                " AND (write.answer IS NULL OR write.answer != answer.id)"
                " AND picture.id > ? ORDER BY picture.id LIMIT ?",
                (kind, APPLIED, Status.DONE, last, _PAGE),
            ).fetchall()
            if not page:
                return
            for key, path, member, size, mtime_ns, offset, answer, response, encoder_hash in page:
                found = Found(path, member, size, mtime_ns, offset)
                yield PendingWrite(key, found, answer, bytes_to_location(response), encoder_hash)
            last = page[-1][0]

    def note_prepared(self, key: int, answer: int, write: Write) -> None:
        """Notes what is about to be written for a picture."""
        change = asdict(write)
        target, kind = change.pop("target"), change.pop("kind")
        self._database.execute(
            "INSERT OR REPLACE INTO write (picture, kind, answer, state, target, change) VALUES (?, ?, ?, ?, ?, ?)",
            (key, kind, answer, PREPARED, target, json.dumps(change)),
        )

    def note_ended(self, key: int, kind: WriteKind, state: str) -> None:
        """Notes that a write was applied or undone."""
        self._database.execute("UPDATE write SET state = ? WHERE picture = ? AND kind = ?", (state, key, kind))

    def writes(self, *states: str, status: Status | None = None) -> Iterator[tuple[int, Found, Write]]:
        """Writes in one of some states, with the pictures that they are for: all, or those of a status in this scan."""
        last = 0
        while True:
            page = self._database.execute(
                "SELECT write.id, picture.id, path, member, size, mtime_ns, target, write.kind, change FROM write"
                " JOIN picture ON picture.id = write.picture"
                " WHERE state IN (SELECT value FROM json_each(?))"
                " AND (? IS NULL OR status = ?"
                " AND scan = (SELECT CAST(value AS INTEGER) FROM run WHERE name = 'scan'))"
                " AND write.id > ? ORDER BY write.id LIMIT ?",
                (json.dumps(states), status, status, last, _PAGE),
            ).fetchall()
            if not page:
                return
            for _, key, path, member, size, mtime_ns, *write in page:
                yield key, Found(path, member, size, mtime_ns), _to_write(*write)
            last = page[-1][0]

    def write_of(self, key: int, kind: WriteKind) -> Write | None:
        """What has been written for a picture, or was about to be, and not been taken back."""
        row = self._database.execute(
            "SELECT target, kind, change FROM write WHERE picture = ? AND kind = ? AND state != ?", (key, kind, UNDONE)
        ).fetchone()
        return None if row is None else _to_write(*row)

    def hash_before(self, key: int, content_hash: bytes) -> bytes:
        """The hash of a picture without what was written into it; the one given if it has not just that in it."""
        write = self.write_of(key, "exif")
        if write is None or write.sha256_after != content_hash.hex():
            return content_hash
        return bytes.fromhex(write.sha256_before)

    def is_own_guess(self, key: int, position: Position, run_id: str) -> bool:
        """Whether a position that a picture carries is the guess that this very run wrote for it.

        Somebody who corrects the position may leave the marks of the guess beside it.
        """
        query = "SELECT change FROM write WHERE picture = ? AND state != ?"
        guesses = (Guess(**json.loads(change)["guess"]) for (change,) in self._database.execute(query, (key, UNDONE)))
        return any(
            guess.run_id == run_id and guess.is_at(position.latitude_deg, position.longitude_deg) for guess in guesses
        )

    def written_kinds(self) -> set[str]:
        """Where positions are that were written and not taken back."""
        query = "SELECT DISTINCT kind FROM write WHERE state != ?"
        return {kind for (kind,) in self._database.execute(query, (UNDONE,))}


def _to_write(target: bytes, kind: WriteKind, change: str) -> Write:
    fields = json.loads(change)
    return Write(target=target, kind=kind, guess=Guess(**fields.pop("guess")), **fields)
