"""What a run knows of its pictures: the only thing that a run resumes from.

| table | one row for each | key |
|---|---|---|
| `run` | fact about the run: options, outputs | its name |
| `picture` | picture that was ever found | path and member |
| `answer` | content that was located | content hash, index version, encoder hash, options |
| `write` | file changed, or about to be (see `Journal`) | picture, and whether it is a sidecar |

A picture without a status is still to be done. Everything that a crash may interrupt is one transaction, so that a
killed run loses at most what it had not committed, and does that again.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Final, Self

from geosurge.archive.locked_database import LockedDatabase
from geosurge.archive.rows import Format, Position, Reason, Row, Status
from geosurge.archive.sidecar_states import state_after_write
from geosurge.archive.sources import Found
from geosurge.archive.tasks import Failure
from geosurge.archive.writes.journal import WRITE_TABLE, Journal
from geosurge.errors import RunConflictError
from geosurge.location import Location
from geosurge.wire import bytes_to_location, location_to_bytes

LEDGER_FILE: Final = "ledger.sqlite"
LEDGER_FILES: Final = (LEDGER_FILE, f"{LEDGER_FILE}-wal", f"{LEDGER_FILE}-shm")
"""The ledger, and what SQLite keeps beside it."""

_OWN_FACTS: Final = ("scan", "id", "outputs", "relocated")
"""Facts about a run that are no options."""

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
    sidecars TEXT,
    UNIQUE (path, member)
);
CREATE INDEX IF NOT EXISTS picture_status ON picture (status, id);
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


class Ledger:
    """The tables of a run; belongs to the thread that opened it, and to no other process. A context manager.

    Attributes:
        journal: What the run has written into sidecars and pictures.
    """

    def __init__(self, database: LockedDatabase) -> None:
        """Made by `open` and `reopen`."""
        self._file = database
        self._database = database.connection
        self._scan = int(self._fact("scan", "0"))
        self._is_asking_again = False
        self.journal = Journal(database.connection)

    @classmethod
    def open(cls, directory: Path, options: Mapping[str, object], *, keeps: bool = True) -> Self:
        """Opens the ledger of a run, or begins one.

        Args:
            directory: Where the run's files are.
            options: What the run was asked for, as far as it changes any row; JSON values.
            keeps: Whether anything is kept; what a dry run notes is forgotten when the ledger is closed.

        Raises:
            RunConflictError: The directory holds a run with other options that has come to something, or one that is
                under way.
            LedgerError: The file is damaged, or cannot be written.
        """
        wanted = {name: json.dumps(value) for name, value in options.items()}
        with contextlib.ExitStack() as stack:
            ledger = cls._open(directory, keeps=keeps)
            stack.push(ledger)
            facts = dict(ledger._database.execute("SELECT name, value FROM run"))
            recorded = {name: value for name, value in facts.items() if name not in _OWN_FACTS}
            # As long as there is no answer and no row, nothing depends on them: what was mistyped can be corrected.
            has_rows = any(
                ledger.is_output(form.file_name) and (directory / form.file_name).exists() for form in Format
            )
            if recorded and recorded != wanted and (has_rows or ledger._has_answers()):
                raise RunConflictError(
                    f"{directory} holds a run with other options: {_difference(recorded, wanted)}; give the same "
                    "ones, or another directory"
                )
            ledger._database.executemany("DELETE FROM run WHERE name = ?", [(name,) for name in recorded])
            if not recorded and ledger._outputs() is None:
                ledger._set_fact("outputs", "[]")
            for name, value in wanted.items():
                ledger._set_fact(name, value)
            ledger.commit()
            stack.pop_all()
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
        return cls._open(directory, keeps=True)

    @classmethod
    def _open(cls, directory: Path, *, keeps: bool) -> Self:
        database = LockedDatabase(directory / LEDGER_FILE, _SCHEMA + WRITE_TABLE, _SCHEMA_VERSION, keeps=keeps)
        with contextlib.ExitStack() as stack:
            stack.push(database)
            _add_sidecars(database.connection)
            ledger = cls(database)
            stack.pop_all()
        return ledger

    def close(self) -> None:
        """Gives the file and the lock back; what was not committed is lost."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Closes it; what SQLite could not do, in whatever call, is told as a `LedgerError`."""
        self._file.__exit__(kind, error, trace)

    def commit(self) -> None:
        """Makes everything so far survive a crash.

        Raises:
            LedgerError: It cannot be written.
        """
        self._file.commit()

    @property
    def run_id(self) -> str:
        """Names the run, in what is written to pictures."""
        if not (name := self._fact("id", "")):
            name = uuid.uuid4().hex[:12]
            self._set_fact("id", name)
        return name

    def is_output(self, name: str) -> bool:
        """Whether a file of the run's directory is one that the run put out.

        Of a run that was begun by a version that did not note them, every file that has such a name is.
        """
        outputs = self._outputs()
        return outputs is None or name in outputs

    def note_outputs(self, names: Iterable[str]) -> None:
        """Notes, on the disk, which files of the run's directory are about to be put out."""
        if (outputs := self._outputs()) is not None:
            self._set_fact("outputs", json.dumps(sorted(outputs.union(names))))
            self.commit()

    def begin_scan(self) -> None:
        """From now on only what is noted counts as found."""
        self._scan += 1
        self._set_fact("scan", str(self._scan))

    def note(self, found: Iterable[Found]) -> None:
        """Notes what was found.

        A picture keeps what became of it as long as neither it nor its sidecars have changed, unless it failed for a
        reason that may be gone.
        """
        for item in found:
            identity = (item.path, item.member)
            error = item.error
            state = (None, *_columns(None)) if error is None else (Status.FAILED, *_columns(Reason.of(error)))
            known = self._database.execute(
                "SELECT size, mtime_ns, offset, scan, status IN ('done', 'withheld') OR is_final,"
                " coalesce(sidecars, ?) FROM picture WHERE path = ? AND member = ?",
                (item.sidecars, *identity),
            ).fetchone()
            seen = (item.size, item.mtime_ns, item.offset)
            if known is None:
                self._database.execute(
                    "INSERT INTO picture (path, member, size, mtime_ns, offset, sidecars, scan, status, reason, detail)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (*identity, *seen, item.sidecars, self._scan, *state),
                )
            elif known[3] == self._scan and known[:3] == seen:
                continue
            elif error is None and known[:3] == seen and known[4] and known[5] == item.sidecars:
                self._database.execute(
                    "UPDATE picture SET scan = ?, sidecars = ? WHERE path = ? AND member = ?",
                    (self._scan, item.sidecars, *identity),
                )
            else:
                self._database.execute(
                    "UPDATE picture SET size = ?, mtime_ns = ?, offset = ?, sidecars = ?, scan = ?, status = ?,"
                    " reason = ?, detail = ?, is_looked_at = 0, is_final = 0, content_hash = NULL, answer = NULL"
                    " WHERE path = ? AND member = ?",
                    (*seen, item.sidecars, self._scan, *state, *identity),
                )

    def ask_again(self, key: AnswerKey) -> None:
        """Has every picture located again that was located by another index version, encoder or with other options.

        From now on other answers do not count.
        """
        self._is_asking_again = True
        self._set_fact("relocated", json.dumps([key.index_version, key.encoder_hash]))
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

    def looked_at(self, key: int, position: Position | None, skipped: Reason | None = None) -> None:
        """Notes a picture's position; with a reason the picture is skipped, whatever was known of it."""
        self._database.execute(
            "UPDATE picture SET is_looked_at = 1, position_latitude_deg = ?, position_longitude_deg = ?,"
            " position_source = ?, status = ?, reason = ?, detail = ?, content_hash = NULL, answer = NULL WHERE id = ?",
            (
                *((None, None, None) if position is None else astuple(position)),
                Status.SKIPPED if skipped else None,
                *_columns(skipped),
                key,
            ),
        )

    def failed(self, key: int, failure: Failure, content_hash: bytes | None = None) -> None:
        """Notes why nothing came of a picture."""
        self._database.execute(
            "UPDATE picture SET status = ?, reason = ?, detail = ?, is_final = ?,"
            " content_hash = coalesce(?, content_hash) WHERE id = ?",
            (Status.FAILED, *_columns(failure), failure.is_final, content_hash, key),
        )

    def answer(self, content_hash: bytes, key: AnswerKey) -> tuple[int, Location] | None:
        """What was answered for this content before, and where in the ledger.

        Until somebody asks again, what another index version or encoder answered counts as well, so that a picture
        that was only touched keeps its row: of several answers, that of the one that was asked again last.
        """
        relocated = self._fact("relocated", "")
        preferred = json.loads(relocated) if relocated else [key.index_version, key.encoder_hash]
        row = self._database.execute(
            "SELECT id, response FROM answer WHERE content_hash = ? AND options = ?"
            " AND (NOT ? OR (index_version = ? AND encoder_hash = ?))"
            " ORDER BY index_version = ? AND encoder_hash = ? DESC, id DESC LIMIT 1",
            (content_hash, key.options, self._is_asking_again, *preferred, *preferred),
        ).fetchone()
        return None if row is None else (row[0], bytes_to_location(row[1]))

    def add_answer(self, content_hash: bytes, key: AnswerKey, location: Location) -> int:
        """Notes an answer; returns where."""
        response = location_to_bytes(location)
        cursor = self._database.execute(
            "INSERT INTO answer (content_hash, index_version, encoder_hash, options, response) VALUES (?, ?, ?, ?, ?)",
            (content_hash, key.index_version, key.encoder_hash, key.options, response),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def located(self, key: int, content_hash: bytes, answer: int, withheld: Reason | None = None) -> None:
        """Notes that a picture has an answer; with a reason this is withheld."""
        self._database.execute(
            "UPDATE picture SET status = ?, reason = ?, detail = ?, content_hash = ?, answer = ? WHERE id = ?",
            (Status.WITHHELD if withheld else Status.DONE, *_columns(withheld), content_hash, answer, key),
        )

    def picture_is_now(self, key: int, size: int, mtime_ns: int, content_hash: bytes) -> None:
        """Notes what a picture is since this run changed it, so that it does not count as changed.

        A picture whose content is of no matter, as of one that is skipped, stays without a hash of it.
        """
        self._database.execute(
            "UPDATE picture SET size = ?, mtime_ns = ?,"
            " content_hash = CASE WHEN content_hash IS NOT NULL THEN ? END WHERE id = ?",
            (size, mtime_ns, content_hash, key),
        )

    def sidecar_is_now(self, key: int, picture: Path, sidecar: Path) -> None:
        """Notes that this run changed, made or removed a sidecar, so that it does not count as changed.

        Args:
            key: Of the picture.
            picture: The picture.
            sidecar: The sidecar, links followed.
        """
        (before,) = self._database.execute("SELECT sidecars FROM picture WHERE id = ?", (key,)).fetchone()
        if before is not None:
            state = state_after_write(before, picture, sidecar)
            self._database.execute("UPDATE picture SET sidecars = ? WHERE id = ?", (state, key))

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

    def example(self, status: Status, reason: str) -> str:
        """Name of a picture with a status for a reason, one of `reasons`."""
        path, member = self._database.execute(
            "SELECT path, member FROM picture WHERE scan = ? AND status = ? AND reason = ? ORDER BY path, member"
            " LIMIT 1",
            (self._scan, status, reason),
        ).fetchone()
        return Found(path, member).name

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
            yield row if response is None else row.with_answer(bytes_to_location(response), encoder_hash)

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

    def _has_answers(self) -> bool:
        (has_answers,) = self._database.execute("SELECT EXISTS (SELECT 1 FROM answer)").fetchone()
        return bool(has_answers)

    def _outputs(self) -> set[str] | None:
        noted = self._fact("outputs", "")
        return set(json.loads(noted)) if noted else None

    def _fact(self, name: str, default: str) -> str:
        row = self._database.execute("SELECT value FROM run WHERE name = ?", (name,)).fetchone()
        return default if row is None else str(row[0])

    def _set_fact(self, name: str, value: str) -> None:
        self._database.execute("INSERT OR REPLACE INTO run VALUES (?, ?)", (name, value))


def _add_sidecars(database: sqlite3.Connection) -> None:
    """Of a ledger that was begun by a version that did not note sidecars, they are noted from now on."""
    columns = {name for _, name, *_ in database.execute("PRAGMA table_info (picture)")}
    if "sidecars" not in columns:
        # In a transaction, because a dry run changes nothing.
        database.execute("BEGIN")
        database.execute("ALTER TABLE picture ADD COLUMN sidecars TEXT")


def _columns(reason: Reason | None) -> tuple[str, str]:
    return ("", "") if reason is None else (reason.name, reason.detail)


def _difference(recorded: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    names = sorted(name for name in {*recorded, *wanted} if recorded.get(name) != wanted.get(name))
    return ", ".join(
        f"{name} was {recorded.get(name, 'absent')} and is now {wanted.get(name, 'absent')}" for name in names
    )
