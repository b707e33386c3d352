"""The records of an open tree: reading one by its row, and finding rows by their token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import lmdb

from geosurge.cells.environment import Environment, corruption_of, release
from geosurge.cells.layout import MAX_TOKEN_BYTES, cell_key, token_prefix, unpack_ordinal
from geosurge.errors import BundleCorruptError
from geosurge.v1 import cell_pb2


class CellRecords:
    """The records of one tree, until it is closed; safe to use from many threads at once.

    Attributes:
        file: The file that they are in, to name in errors.
        is_closed: Whether they can no longer be read.
    """

    def __init__(self, environment: Environment) -> None:
        """Takes over an environment that was acquired."""
        self.file = environment.file
        self.is_closed = False
        self._environment = environment

    def close(self) -> None:
        """Gives the environment back; calling it again does nothing."""
        if not self.is_closed:
            self.is_closed = True
            release(self._environment)

    @contextlib.contextmanager
    def reading(self) -> Iterator[RecordReader]:
        """Reads one state of the file inside the ``with`` block.

        Raises:
            RuntimeError: The tree is closed.
            BundleCorruptError: What is read is damaged.
        """
        if self.is_closed:
            raise RuntimeError(f"the cell tree {self.file} is closed")
        try:
            with corruption_of(self.file), self._environment.lmdb.begin() as transaction:
                yield RecordReader(self._environment, transaction)
        except BundleCorruptError as error:
            # Another thread that closes the tree takes the transaction from under this one.
            if self.is_closed:
                raise RuntimeError(f"the cell tree {self.file} was closed while it was read") from error
            raise


@dataclass(frozen=True, eq=False)
class RecordReader:
    """What can be read inside `CellRecords.reading`."""

    _environment: Environment
    _transaction: lmdb.Transaction

    def read(self, level: int, ordinal: int) -> cell_pb2.Cell:
        """The record of a cell, with its outline if that is stored.

        Raises:
            BundleCorruptError: There is none.
        """
        value = self._transaction.get(cell_key(level, ordinal), db=self._environment.cells)
        if value is None:
            raise BundleCorruptError(
                f"{self._environment.file}: the record of cell {ordinal} of level {level} is missing"
            )
        return cell_pb2.Cell.FromString(bytes(value))

    def find(self, token: str, level: int | None) -> list[tuple[int, int]]:
        """(level, ordinal) of the cells with a token, coarsest first; on one level, or on all."""
        prefix = token_prefix(token)
        if len(prefix) > MAX_TOKEN_BYTES + 1:
            return []
        found = []
        cursor = self._transaction.cursor(db=self._environment.tokens)
        more = cursor.set_range(prefix + bytes([level or 0]))
        while more and (key := bytes(cursor.key())).startswith(prefix) and len(key) == len(prefix) + 1:
            found.append((key[-1], unpack_ordinal(cursor.value())))
            more = cursor.next()
        return found if level is None else [entry for entry in found[:1] if entry[0] == level]

    def entry_counts(self) -> dict[str, int]:
        """Entries of the databases that have one for each cell, by the name of the database."""
        databases = {"cells": self._environment.cells, "tokens": self._environment.tokens}
        return {name: self._transaction.stat(database)["entries"] for name, database in databases.items()}
