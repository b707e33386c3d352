"""An SQLite file that survives a power failure, that one process has to itself, and whose errors name it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from geosurge.errors import LedgerError, RunConflictError


class LockedDatabase:
    """The file, opened, and the lock of its directory; belongs to the thread that opened it. A context manager.

    Attributes:
        connection: What carries out statements.
    """

    def __init__(self, path: Path, schema: str, schema_version: int, *, keeps: bool) -> None:
        """Opens the file, or makes it.

        Args:
            path: The file.
            schema: Statements that make the tables where there are none.
            schema_version: Of these tables.
            keeps: Whether anything is kept; otherwise all is forgotten when the file is closed.

        Raises:
            RunConflictError: Another process has it.
            LedgerError: It is damaged, has another schema, or cannot be written; or its directory cannot be locked.
        """
        self._path = path
        self._keeps = keeps
        self._lock = _lock(path.parent)
        try:
            with self._naming_errors():
                self.connection = sqlite3.connect(path)
                (version,) = self.connection.execute("PRAGMA user_version").fetchone()
                if version not in (0, schema_version):
                    raise LedgerError(
                        f"{path} has the schema version {version}, this program reads {schema_version}; finish the "
                        "run with the program that began it"
                    )
                # What is changed in pictures has to be known even after a power failure.
                self.connection.executescript(f"PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; {schema}")
                if version == 0:
                    self.connection.execute(f"PRAGMA user_version = {schema_version}")
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Gives the file and the lock back; what was not committed is lost."""
        self.connection.close()
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
            with self._naming_errors():
                self.connection.commit()

    @contextlib.contextmanager
    def _naming_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise _ledger_error(self._path, error) from error


def _lock(directory: Path) -> int:
    """Has a directory to itself until the descriptor that it returns is closed."""
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(directory, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunConflictError(f"another run in {directory} is under way; wait for its end") from error
        except OSError as error:
            raise LedgerError(
                f"{directory} cannot be locked ({error.strerror}); make it readable, or name one on a file system that "
                "has locks"
            ) from error
        stack.pop_all()
    return descriptor


def _ledger_error(path: Path, error: sqlite3.DatabaseError) -> LedgerError:
    if isinstance(error, sqlite3.OperationalError):
        return LedgerError(f"{path} cannot be written or read ({error}); make room, or check its permissions")
    return LedgerError(f"{path} is damaged ({error}); begin the run again in another directory")
