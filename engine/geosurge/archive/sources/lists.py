"""Lists of paths: text, CSV and Parquet, read entry by entry.

| name ends in | an entry is |
|---|---|
| `.txt` | a line; where the file has NUL bytes, as ``find -print0`` writes them, what lies between them |
| `.csv` | the column `path` of a row, in quotes where it holds a comma or a line break |
| `.parquet` | the column `path` of a row: text, or bytes for what is not UTF-8 |
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from typing import Any, Final

from geosurge.archive.sources.paths import extension, not_readable, open_regular, shown
from geosurge.errors import InputNotReadableError

LIST_EXTENSIONS: Final = frozenset({b"txt", b"csv", b"parquet"})

PATH_COLUMN: Final = "path"

_CHUNK_BYTES: Final = 1 << 16
_BATCH_ROWS: Final = 4096
_UTF8_BOM: Final = b"\xef\xbb\xbf"
_UTF16_BOMS: Final = (b"\xff\xfe", b"\xfe\xff")


def read_list(path: bytes) -> Iterator[bytes]:
    """Reads the entries of a list.

    Args:
        path: The list; its kind is told by its name.

    Yields:
        The entries as they are written, which may be relative paths; blank lines are left out.

    Raises:
        InputNotReadableError: The list cannot be read, is damaged or has no column `path`; or an entry is empty. What
            comes before has been yielded.
    """
    try:
        with open_regular(path) as file:
            kind = extension(path)
            entries = {b"csv": _csv_entries, b"parquet": _parquet_entries}.get(kind, _text_entries)
            yield from entries(path, file)
    except OSError as error:
        raise not_readable(path, error) from error


def check_list(path: bytes) -> None:
    """Reads the first entry of a list, so that one that is no list is known before work begins.

    Raises:
        InputNotReadableError: As `read_list`.
    """
    next(read_list(path), None)


def _text_entries(path: bytes, file: io.BufferedReader) -> Iterator[bytes]:
    chunk = file.read(_CHUNK_BYTES)
    if chunk.startswith(_UTF16_BOMS):
        raise InputNotReadableError(f"{shown(path)} is UTF-16; save it as UTF-8")
    chunk = chunk.removeprefix(_UTF8_BOM)
    separator = b"\0" if b"\0" in chunk else b"\n"
    rest = b""
    while chunk:
        *entries, rest = (rest + chunk).split(separator)
        yield from _without_line_ends(entries, separator)
        if len(rest) > _CHUNK_BYTES:
            raise InputNotReadableError(
                f"{shown(path)} has a line that is longer than any path; is it a list of paths?"
            )
        chunk = file.read(_CHUNK_BYTES)
    yield from _without_line_ends([rest], separator)


def _without_line_ends(entries: list[bytes], separator: bytes) -> Iterator[bytes]:
    for entry in entries:
        if bare := entry.removesuffix(b"\r") if separator == b"\n" else entry:
            yield bare


def _csv_entries(path: bytes, file: io.BufferedReader) -> Iterator[bytes]:
    # Bytes that are not UTF-8 survive the text that the CSV reader wants.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.DictReader(_bounded_lines(path, text), strict=True)
    try:
        _check_columns(path, reader.fieldnames or ())
        for row in reader:
            if not (entry := row[PATH_COLUMN]):
                raise InputNotReadableError(f"{shown(path)}, line {reader.line_num}, has no path; give it one")
            yield entry.encode("utf-8", "surrogateescape")
    except csv.Error as error:
        raise InputNotReadableError(
            f"{shown(path)}, after line {reader.line_num}: {error}; correct what is in quotes"
        ) from error


def _bounded_lines(path: bytes, text: io.TextIOWrapper) -> Iterator[str]:
    while line := text.readline(_CHUNK_BYTES):
        if len(line) == _CHUNK_BYTES:
            raise InputNotReadableError(f"{shown(path)} has a line of {_CHUNK_BYTES} characters; is it a CSV file?")
        yield line


def _parquet_entries(path: bytes, file: io.BufferedReader) -> Iterator[bytes]:
    # Importing it takes longer than most lists; the processes that decode pictures never need it.
    import pyarrow as pa  # noqa: PLC0415
    from pyarrow import parquet  # noqa: PLC0415

    try:
        with parquet.ParquetFile(file, buffer_size=_CHUNK_BYTES, pre_buffer=False) as table:
            _check_columns(path, table.schema_arrow.names)
            for batch in table.iter_batches(_BATCH_ROWS, columns=[PATH_COLUMN]):
                yield from (_parquet_entry(path, value) for value in batch.column(0).to_pylist())
    except pa.ArrowException as error:
        raise InputNotReadableError(f"{shown(path)} is no Parquet file, or a damaged one: {error}") from error


def _parquet_entry(path: bytes, value: Any) -> bytes:  # noqa: ANN401
    if not value or not isinstance(value, str | bytes):
        raise InputNotReadableError(
            f"{shown(path)} holds {value!r} in the column {PATH_COLUMN}; each row needs a path, as text or bytes"
        )
    return os.fsencode(value)


def _check_columns(path: bytes, columns: Any) -> None:  # noqa: ANN401
    if PATH_COLUMN not in columns:
        found = shown(", ".join(columns).encode("utf-8", "surrogateescape"))
        raise InputNotReadableError(
            f"{shown(path)} has no column named {PATH_COLUMN}, but {found or 'none at all'}; give the column of the "
            "paths that name, and separate columns by commas"
        )
