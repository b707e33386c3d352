from __future__ import annotations

import errno
import fcntl
import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from geosurge.archive.locked_database import LockedDatabase
from geosurge.errors import LedgerError, RunConflictError

SCHEMA = "CREATE TABLE IF NOT EXISTS picture (name TEXT);"


def opened(path: Path, *, version: int = 1, keeps: bool = True) -> LockedDatabase:
    return LockedDatabase(path, SCHEMA, version, keeps=keeps)


def names(path: Path) -> list[str]:
    with opened(path) as database:
        return [name for (name,) in database.connection.execute("SELECT name FROM picture")]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.mark.parametrize("keeps", [True, False])
def test_what_was_committed_is_kept_where_anything_is(keeps: bool, path: Path) -> None:
    with opened(path, keeps=keeps) as database:
        database.connection.execute("INSERT INTO picture VALUES ('kept')")
        database.commit()
        database.connection.execute("INSERT INTO picture VALUES ('lost')")
    assert names(path) == (["kept"] if keeps else [])


def test_a_power_failure_costs_nothing_that_was_committed(path: Path) -> None:
    with opened(path) as database:
        assert database.connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert database.connection.execute("PRAGMA synchronous").fetchone() == (2,), "FULL"


def test_only_one_can_have_it(path: Path) -> None:
    with opened(path), pytest.raises(RunConflictError, match=rf"another run in {re.escape(str(path.parent))} is under"):
        opened(path)
    opened(path).close()


def test_a_damaged_file_is_named_and_given_back(path: Path) -> None:
    path.write_bytes(b"not a database" * 1000)
    for _ in range(2):
        with pytest.raises(LedgerError, match=rf"{re.escape(str(path))} is damaged .*another directory"):
            opened(path)


def test_another_schema_is_refused(path: Path) -> None:
    opened(path, version=99).close()
    with pytest.raises(LedgerError, match="schema version 99, this program reads 1"):
        opened(path)


def test_a_file_of_another_schema_stays_as_it_is(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("CREATE TABLE photo (id INTEGER); PRAGMA user_version = 2;")
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="schema version 2, this program reads 1"):
        LockedDatabase(path, "CREATE INDEX photo_name ON photo (name);", 1, keeps=True)
    assert path.read_bytes() == before


def test_a_directory_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        LedgerError, match=rf"{re.escape(str(tmp_path))}/gone cannot be locked \(No such file.*readable"
    ):
        opened(tmp_path / "gone" / "ledger.sqlite")


def test_a_file_system_without_locks_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        with pytest.raises(LedgerError, match=r"cannot be locked \(No locks available\).*file system that has locks"):
            opened(path)
    opened(path).close()


def test_errors_of_any_statement_name_the_file(path: Path) -> None:
    named = rf"{re.escape(str(path))} cannot be written or read .*no such table"
    with pytest.raises(LedgerError, match=named), opened(path) as database:
        database.connection.execute("SELECT 1 FROM nowhere")
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
