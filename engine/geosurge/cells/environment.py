"""The LMDB environments of a process: at most one for each file, whoever reads it."""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lmdb
from google.protobuf.message import DecodeError
from lmdb import _Database
from lmdb.verify import VerifyError
from lmdb.verify import verify as verify_lmdb

from geosurge.cells.layout import DATA_FILE, DATABASES
from geosurge.errors import BundleCorruptError


def verify_cell_file(path: Path) -> list[str]:
    """Walks the pages of a tree's file without handing them to LMDB.

    LMDB trusts its file and may crash the process on a damaged one: call this before opening a tree on a file that
    nothing vouches for.

    Returns:
        Problems found; empty for a sound file.
    """
    try:
        return list(verify_lmdb(str(path / DATA_FILE), subdir=False))  # type: ignore[no-untyped-call]
    except (VerifyError, OSError) as error:
        return [str(error)]


@dataclass(eq=False)
class Environment:
    """An LMDB environment shared by the trees that are open on it."""

    file: Path
    key: tuple[int, int]
    lmdb: lmdb.Environment
    cells: _Database
    tokens: _Database
    columns: _Database
    users: int = 1


# LMDB forbids a process to open one file twice, yet a server and a check of its bundle both read it.
_environments: dict[tuple[int, int], Environment] = {}
_environments_lock = threading.Lock()


def acquire(data: Path) -> Environment:
    """The environment of a tree's file, opened unless the process has it open already; `release` gives it back.

    Raises:
        BundleCorruptError: The file is damaged or no tree.
    """
    status = data.stat()
    key = (status.st_dev, status.st_ino)
    with _environments_lock:
        shared = _environments.get(key)
        if shared is not None:
            shared.users += 1
            return shared
        with corruption_of(data):
            opened = lmdb.open(
                str(data.parent),
                map_size=max(status.st_size, 1),
                max_dbs=3,
                readonly=True,
                lock=False,
                create=False,
                readahead=False,
            )
            try:
                pages = opened.info()["last_pgno"] + 1
                if pages * opened.stat()["psize"] > status.st_size:
                    # Reading a mapped page beyond the end of the file would end the process.
                    raise BundleCorruptError(f"{data} is truncated: {status.st_size} bytes for {pages} pages")
                cells, tokens, columns = (opened.open_db(name, create=False) for name in DATABASES)
            except BaseException:
                opened.close()
                raise
        shared = Environment(data, key, opened, cells, tokens, columns)
        _environments[key] = shared
        return shared


def release(environment: Environment) -> None:
    """Closes an environment if this was its last user."""
    with _environments_lock:
        environment.users -= 1
        if environment.users == 0:
            del _environments[environment.key]
            environment.lmdb.close()


@contextlib.contextmanager
def corruption_of(file: Path) -> Iterator[None]:
    """Says which file is damaged when LMDB or protobuf cannot read it."""
    try:
        yield
    except (lmdb.Error, DecodeError, UnicodeDecodeError, struct.error) as error:
        raise BundleCorruptError(f"{file} is damaged or not a cell tree: {error}; publish the bundle again") from error
