"""Rows as CSV, for spreadsheets and shell scripts: the columns of the Parquet file, flattened."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from geosurge.archive.outputs.files import replacing
from geosurge.archive.outputs.schema import SCHEMA, row_to_record
from geosurge.archive.rows import Row


@contextmanager
def csv_writer(path: Path) -> Iterator[Callable[[Row], None]]:
    """Writes RFC 4180 in UTF-8: ``position.source`` is the column ``position_source``, a list is JSON, null is empty.

    Args:
        path: The file to write.

    Yields:
        What writes one row.

    Raises:
        OutputNotWritableError: The file cannot be written; there is none of it then.
    """
    with replacing(path) as file:
        # Only with CRLF as line ends does Python 3.11 quote a carriage return within a name.
        table = csv.writer(codecs.getwriter("utf-8")(file), lineterminator="\r\n")
        table.writerow(name for field in SCHEMA for name in _names(field))

        def write(row: Row) -> None:
            record = row_to_record(row)
            table.writerow(value for field in SCHEMA for value in _values(field, record[field.name]))

        yield write


def _names(field: pa.Field) -> list[str]:
    if pa.types.is_struct(field.type):
        return [f"{field.name}_{part.name}" for part in field.type]
    return [field.name]


def _values(field: pa.Field, value: Any) -> list[Any]:  # noqa: ANN401
    if pa.types.is_struct(field.type):
        return [None if value is None else value[part.name] for part in field.type]
    if pa.types.is_list(field.type):
        return [json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))]
    return [value]
