"""What a run knows of its pictures, in one SQLite file (write-ahead log): the only thing that a run resumes from.

| table | one row for each | key |
|---|---|---|
| `run` | fact about the run: schema, options | its name |
| `picture` | picture that was ever found | path and member |
| `answer` | content that was located | content hash, index version, encoder hash, options |
| `write` | file that was changed, or is about to be | picture, and whether it is a sidecar |

A picture without a status is still to be done. Everything that a crash may interrupt is one transaction, so that a
killed run loses at most what it had not committed, and does that again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Final, Self

from geosurge.archive.decoding import Failure
from geosurge.archive.guess import Guess
from geosurge.archive.rows import Position, Row, Status
from geosurge.archive.sources import Found
from geosurge.archive.writes import Write, WriteKind
from geosurge.errors import LedgerError, RunConflictError
from geosurge.location import Location
from geosurge.v1 import geolocation_pb2
from geosurge.wire import location_to_response, response_to_location

LEDGER_FILE: Final = "ledger.sqlite"

PREPARED: Final = "prepared"
APPLIED: Final = "applied"
UNDONE: Final = "undone"
"""States of a write."""

_SCHEMA_VERSION: Final = 1
_PAGE: Final = 1000

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS run (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS answer (
    id INTEGER PRIMARY KEY,
    content_hash BLOB NOT NULL,
    index_version TEXT NOT NULL,
    encoder_hash TEXT NOT NULL,
    options TEXT NOT NULL,
    response BLOB NOT NULL,
    UNIQUE (content_hash, index_version, encoder_hash, options)
);
CREATE TABLE IF NOT EXISTS picture (
    id INTEGER PRIMARY KEY,
    path BLOB NOT NULL,
    member BLOB NOT NULL,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    offset INTEGER NOT NULL,
    scan INTEGER NOT NULL,
    is_looked_at INTEGER NOT NULL DEFAULT 0,
    status TEXT,
    reason TEXT NOT NULL DEFAULT '',
    detail TEXT NOT NULL DEFAULT '',
    is_final INTEGER NOT NULL DEFAULT 0,
    content_hash BLOB,
    position_latitude_deg REAL,
    position_longitude_deg REAL,
    position_source TEXT,
    answer INTEGER REFERENCES answer (id),
    UNIQUE (path, member)
);
CREATE INDEX IF NOT EXISTS picture_status ON picture (status, id);
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


@dataclass(frozen=True)
class AnswerKey:
    """What makes two answers for the same content the same.

    Attributes:
        index_version: Name of the index bundle.
        encoder_hash: SHA-256 of its encoder.
        options: The options of `geosurge.location.LocateOptions`, as JSON.
    """

    index_version: str
    encoder_hash: str
    options: str


@dataclass(frozen=True)
class Noted:
    """A picture that something is to be done with, and its key in the ledger."""

    key: int
    found: Found


@dataclass(frozen=True)
class ToWrite:
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


class Ledger:
    """The file, opened, and its lock; belongs to the thread that opened it. A context manager."""

    def __init__(self, connection: sqlite3.Connection, lock: int, path: Path, *, keeps: bool) -> None:
        """Made by `open` and `reopen`."""
        self._database = connection
        self._lock = lock
        self._path = path
        self._keeps = keeps
        self._scan = int(self._fact("scan", "0"))

    @classmethod
    def open(cls, directory: Path, options: Mapping[str, object], *, keeps: bool = True) -> Self:
        """Opens the ledger of a run, or begins one.

        Args:
            directory: Where the run's files are.
            options: What the run was asked for, as far as it changes any row; JSON values.
            keeps: Whether anything is kept; what a dry run notes is forgotten when the ledger is closed.

        Raises:
            RunConflictError: The directory holds a run with other options, or one that is under way.
            LedgerError: The file is damaged, or cannot be written.
        """
        wanted = {name: json.dumps(value) for name, value in options.items()}
        ledger = cls._connect(directory, keeps=keeps)
        try:
            recorded = dict(ledger._database.execute("SELECT name, value FROM run WHERE name NOT IN ('scan', 'id')"))
            if recorded and recorded != wanted:
                raise RunConflictError(
                    f"{directory} holds a run with other options: {_difference(recorded, wanted)}; give the same "
                    "ones, or another directory"
                )
            for name, value in wanted.items():
                ledger._set_fact(name, value)
            ledger.commit()
        except BaseException:
            ledger.close()
            raise
        return ledger

    @classmethod
    def reopen(cls, directory: Path) -> Self:
        """Opens the ledger of a run that is there.

        Raises:
            RunConflictError: There is none, or it is under way.
            LedgerError: It is damaged.
        """
        if not (directory / LEDGER_FILE).is_file():
            raise RunConflictError(f"{directory} holds no run: there is no {LEDGER_FILE} in it")
        return cls._connect(directory, keeps=True)

    @classmethod
    def _connect(cls, directory: Path, *, keeps: bool) -> Self:
        path = directory / LEDGER_FILE
        lock = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with _naming(path):
                database = sqlite3.connect(path)
                # What is changed in pictures has to be known even after a power failure.
                database.executescript(f"PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; {_SCHEMA}")
                (version,) = database.execute("PRAGMA user_version").fetchone()
                if version not in (0, _SCHEMA_VERSION):
                    raise LedgerError(
                        f"{path} has the schema version {version}, this program reads {_SCHEMA_VERSION}; finish the "
                        "run with the program that began it"
                    )
                if version == 0:
                    database.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
                return cls(database, lock, path, keeps=keeps)
        except BlockingIOError as error:
            os.close(lock)
            raise RunConflictError(f"another run in {directory} is under way; wait for its end") from error
        except BaseException:
            os.close(lock)
            raise

    def close(self) -> None:
        """Gives the file and the lock back; what was not committed is lost."""
        self._database.close()
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Closes it; what SQLite could not do, in whatever call, is told as a `LedgerError`."""
        self.close()
        if isinstance(error, sqlite3.DatabaseError):
            raise _ledger_error(self._path, error) from error

    def commit(self) -> None:
        """Makes everything so far survive a crash.

        Raises:
            LedgerError: It cannot be written.
        """
        if self._keeps:
            with _naming(self._path):
                self._database.commit()

    @property
    def run_id(self) -> str:
        """Names the run, in what is written to pictures."""
        if not (name := self._fact("id", "")):
            name = uuid.uuid4().hex[:12]
            self._set_fact("id", name)
        return name

    def begin_scan(self) -> None:
        """From now on only what is noted counts as found."""
        self._scan += 1
        self._set_fact("scan", str(self._scan))

    def note(self, found: Iterable[Found]) -> None:
        """Notes what was found.

        A picture keeps what became of it as long as it has not changed, unless it failed for a reason that may be gone.
        """
        for item in found:
            identity = (item.path, item.member)
            error = item.error
            state = ("failed", error.reason, str(error)) if error is not None else (None, "", "")
            known = self._database.execute(
                "SELECT size, mtime_ns, offset, scan, status IN ('done', 'withheld') OR is_final FROM picture"
                " WHERE path = ? AND member = ?",
                identity,
            ).fetchone()
            seen = (item.size, item.mtime_ns, item.offset)
            if known is None:
                self._database.execute(
                    "INSERT INTO picture (path, member, size, mtime_ns, offset, scan, status, reason, detail)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (*identity, *seen, self._scan, *state),
                )
            elif known[3] == self._scan and known[:3] == seen:
                continue
            elif error is None and known[:3] == seen and known[4]:
                self._database.execute(
                    "UPDATE picture SET scan = ? WHERE path = ? AND member = ?", (self._scan, *identity)
                )
            else:
                self._database.execute(
                    "UPDATE picture SET size = ?, mtime_ns = ?, offset = ?, scan = ?, status = ?, reason = ?,"
                    " detail = ?, is_looked_at = 0, is_final = 0, content_hash = NULL, answer = NULL"
                    " WHERE path = ? AND member = ?",
                    (*seen, self._scan, *state, *identity),
                )

    def ask_again(self, key: AnswerKey) -> None:
        """Has every picture located again that was located by another index version, encoder or with other options."""
        self._database.execute(
            "UPDATE picture SET status = NULL, reason = '', detail = '', answer = NULL WHERE answer IN (SELECT id FROM"
            " answer WHERE index_version != ? OR encoder_hash != ? OR options != ?)",
            (key.index_version, key.encoder_hash, key.options),
        )

    def to_look_at(self) -> Iterator[Noted]:
        """Pictures of which it is not known whether they have a position."""
        return self._pending(is_looked_at=False)

    def to_locate(self) -> Iterator[Noted]:
        """Pictures that have been looked at and are to be located."""
        return self._pending(is_looked_at=True)

    def looked_at(self, key: int, position: Position | None, skip_reason: str, skip_detail: str) -> None:
        """Notes a picture's position; with a reason the picture is skipped."""
        self._database.execute(
            "UPDATE picture SET is_looked_at = 1, position_latitude_deg = ?, position_longitude_deg = ?,"
            " position_source = ?, status = ?, reason = ?, detail = ? WHERE id = ?",
            (
                *((None, None, None) if position is None else astuple(position)),
                Status.SKIPPED if skip_reason else None,
                skip_reason,
                skip_detail,
                key,
            ),
        )

    def skipped(self, key: int, reason: str, detail: str) -> None:
        """Notes why a picture is left as it is."""
        self._database.execute(
            "UPDATE picture SET status = ?, reason = ?, detail = ?, answer = NULL WHERE id = ?",
            (Status.SKIPPED, reason, detail, key),
        )

    def failed(self, key: int, failure: Failure, content_hash: bytes | None = None) -> None:
        """Notes why nothing came of a picture."""
        self._database.execute(
            "UPDATE picture SET status = ?, reason = ?, detail = ?, is_final = ?,"
            " content_hash = coalesce(?, content_hash) WHERE id = ?",
            (Status.FAILED, failure.reason, failure.detail, failure.is_final, content_hash, key),
        )

    def answer(self, content_hash: bytes, key: AnswerKey) -> tuple[int, Location] | None:
        """What was answered for this content before, and where in the ledger."""
        row = self._database.execute(
            "SELECT id, response FROM answer WHERE content_hash = ? AND index_version = ? AND encoder_hash = ?"
            " AND options = ?",
            (content_hash, key.index_version, key.encoder_hash, key.options),
        ).fetchone()
        return None if row is None else (row[0], _to_location(row[1]))

    def add_answer(self, content_hash: bytes, key: AnswerKey, location: Location) -> int:
        """Notes an answer; returns where."""
        response = location_to_response(location, "").SerializeToString()
        cursor = self._database.execute(
            "INSERT INTO answer (content_hash, index_version, encoder_hash, options, response) VALUES (?, ?, ?, ?, ?)",
            (content_hash, key.index_version, key.encoder_hash, key.options, response),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def located(self, key: int, content_hash: bytes, answer: int, reason: str, detail: str) -> None:
        """Notes that a picture has an answer; with a reason this is withheld."""
        self._database.execute(
            "UPDATE picture SET status = ?, reason = ?, detail = ?, content_hash = ?, answer = ? WHERE id = ?",
            (Status.WITHHELD if reason else Status.DONE, reason, detail, content_hash, answer, key),
        )

    def to_write(self, kind: WriteKind) -> Iterator[ToWrite]:
        """Pictures that are done and whose position has not been written, or not as it was meant to be."""
        last = 0
        while True:
            page = self._database.execute(
                "SELECT picture.id, path, member, size, mtime_ns, offset, answer.id, response, encoder_hash FROM"
                " picture JOIN answer ON answer.id = picture.answer"
                " LEFT JOIN write ON write.picture = picture.id AND write.kind = ? AND write.state = ?"
                " WHERE scan = ? AND status = ? AND (write.answer IS NULL OR write.answer != answer.id)"
                " AND picture.id > ? ORDER BY picture.id LIMIT ?",
                (kind, APPLIED, self._scan, Status.DONE, last, _PAGE),
            ).fetchall()
            if not page:
                return
            for key, path, member, size, mtime_ns, offset, answer, response, encoder_hash in page:
                found = Found(path, member, size, mtime_ns, offset)
                yield ToWrite(key, found, answer, _to_location(response), encoder_hash)
            last = page[-1][0]

    def write_prepared(self, key: int, answer: int, write: Write) -> None:
        """Notes what is about to be written for a picture."""
        change = asdict(write)
        target, kind = change.pop("target"), change.pop("kind")
        self._database.execute(
            "INSERT OR REPLACE INTO write (picture, kind, answer, state, target, change) VALUES (?, ?, ?, ?, ?, ?)",
            (key, kind, answer, PREPARED, target, json.dumps(change)),
        )

    def write_ended(self, key: int, kind: WriteKind, state: str) -> None:
        """Notes that a write was applied or undone."""
        self._database.execute("UPDATE write SET state = ? WHERE picture = ? AND kind = ?", (state, key, kind))

    def picture_is_now(self, key: int, size: int, mtime_ns: int) -> None:
        """Notes what a picture is since this run changed it, so that it does not count as changed."""
        self._database.execute("UPDATE picture SET size = ?, mtime_ns = ? WHERE id = ?", (size, mtime_ns, key))

    def writes(self, *states: str, status: Status | None = None) -> Iterator[tuple[int, Found, Write]]:
        """Writes in one of some states, with the pictures that they are for: all, or those of a status in this scan."""
        last = 0
        while True:
            page = self._database.execute(
                "SELECT write.id, picture.id, path, member, size, mtime_ns, target, write.kind, change FROM write"
                " JOIN picture ON picture.id = write.picture"
                " WHERE state IN (SELECT value FROM json_each(?)) AND (? IS NULL OR status = ? AND scan = ?)"
                " AND write.id > ? ORDER BY write.id LIMIT ?",
                (json.dumps(states), status, status, self._scan, last, _PAGE),
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

    def wrote(self, key: int, position: Position, run_id: str) -> bool:
        """Whether a position that a picture carries is the guess that this very run wrote for it.

        Somebody who corrects the position may leave the marks of the guess beside it.
        """
        if run_id != self.run_id:
            return False
        query = "SELECT change FROM write WHERE picture = ? AND state != ?"
        guesses = (Guess(**json.loads(change)["guess"]) for (change,) in self._database.execute(query, (key, UNDONE)))
        return any(guess.is_at(position.latitude_deg, position.longitude_deg) for guess in guesses)

    def written_kinds(self) -> set[str]:
        """Where positions are that were written and not taken back."""
        query = "SELECT DISTINCT kind FROM write WHERE state != ?"
        return {kind for (kind,) in self._database.execute(query, (UNDONE,))}

    def counts(self) -> dict[Status | None, int]:
        """Pictures found, by what became of them; ``None`` stands for those still to be done."""
        rows = self._database.execute(
            "SELECT status, count(*) FROM picture WHERE scan = ? GROUP BY status", (self._scan,)
        )
        return {None if status is None else Status(status): count for status, count in rows}

    def reasons(self, status: Status) -> dict[str, int]:
        """Pictures with a status, by the reason for it; most frequent first."""
        return dict(
            self._database.execute(
                "SELECT reason, count(*) FROM picture WHERE scan = ? AND status = ? GROUP BY reason ORDER BY 2 DESC, 1",
                (self._scan, status),
            )
        )

    def index_versions(self) -> list[str]:
        """Index versions that answers of this scan came from."""
        rows = self._database.execute(
            "SELECT DISTINCT index_version FROM picture JOIN answer ON answer.id = picture.answer WHERE scan = ?"
            " ORDER BY 1",
            (self._scan,),
        )
        return [version for (version,) in rows]

    def rows(self) -> Iterator[Row]:
        """A row for every picture found, in the order of their paths."""
        cursor = self._database.execute(
            "SELECT path, member, status, reason, detail, picture.content_hash, position_latitude_deg,"
            " position_longitude_deg, position_source, response, encoder_hash FROM picture LEFT JOIN answer"
            " ON answer.id = picture.answer WHERE scan = ? AND status IS NOT NULL ORDER BY path, member",
            (self._scan,),
        )
        for path, member, status, reason, detail, content_hash, *position, response, encoder_hash in cursor:
            row = Row(
                Found(path, member).name,
                Status(status),
                reason,
                detail,
                "" if content_hash is None else content_hash.hex(),
                None if position[0] is None else Position(*position),
            )
            yield row if response is None else row.with_answer(_to_location(response), encoder_hash)

    def _pending(self, *, is_looked_at: bool) -> Iterator[Noted]:
        """Page by page, so that pictures may be changed meanwhile."""
        last = 0
        while True:
            page = self._database.execute(
                "SELECT id, path, member, size, mtime_ns, offset FROM picture WHERE scan = ? AND status IS NULL"
                " AND is_looked_at = ? AND id > ? ORDER BY id LIMIT ?",
                (self._scan, is_looked_at, last, _PAGE),
            ).fetchall()
            if not page:
                return
            for key, *found in page:
                yield Noted(key, Found(*found))
            last = page[-1][0]

    def _fact(self, name: str, default: str) -> str:
        row = self._database.execute("SELECT value FROM run WHERE name = ?", (name,)).fetchone()
        return default if row is None else str(row[0])

    def _set_fact(self, name: str, value: str) -> None:
        self._database.execute("INSERT OR REPLACE INTO run VALUES (?, ?)", (name, value))


def _to_location(response: bytes) -> Location:
    return response_to_location(geolocation_pb2.LocateResponse.FromString(response))


def _to_write(target: bytes, kind: WriteKind, change: str) -> Write:
    fields = json.loads(change)
    return Write(target=target, kind=kind, guess=Guess(**fields.pop("guess")), **fields)


def _difference(recorded: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    names = sorted(name for name in {*recorded, *wanted} if recorded.get(name) != wanted.get(name))
    return ", ".join(
        f"{name} was {recorded.get(name, 'absent')} and is now {wanted.get(name, 'absent')}" for name in names
    )


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Has SQLite's errors name the file."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise _ledger_error(path, error) from error


def _ledger_error(path: Path, error: sqlite3.DatabaseError) -> LedgerError:
    if isinstance(error, sqlite3.OperationalError):
        return LedgerError(f"{path} cannot be written or read ({error}); make room, or check its permissions")
    return LedgerError(f"{path} is damaged ({error}); begin the run again in another directory")
