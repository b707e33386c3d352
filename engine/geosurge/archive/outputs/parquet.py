"""Rows as Parquet, the form that holds everything and is read again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from geosurge.archive.outputs.files import replacing
from geosurge.archive.outputs.schema import SCHEMA, batch_to_rows, rows_to_batch
from geosurge.archive.rows import Row
from geosurge.errors import UsageError

ROWS_A_BATCH: Final = 1024
"""Rows that are Python objects at one time, when writing and when reading."""

BATCHES_A_GROUP: Final = 4
"""Batches in a row group, which Parquet holds in memory until it is complete."""


@contextmanager
def parquet_writer(path: Path) -> Iterator[Callable[[Row], None]]:
    """Writes rows of `SCHEMA`, compressed with zstd; the same rows give the same bytes.

    Args:
        path: The file to write.

    Yields:
        What writes one row.

    Raises:
        OutputNotWritableError: The file cannot be written; there is none of it then.
    """
    rows: list[Row] = []
    batches: list[pa.RecordBatch] = []

    def convert() -> None:
        batches.append(rows_to_batch(rows))
        rows.clear()

    with replacing(path) as file, pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:

        def write(row: Row) -> None:
            rows.append(row)
            if len(rows) == ROWS_A_BATCH:
                convert()
                if len(batches) == BATCHES_A_GROUP:
                    writer.write_table(pa.Table.from_batches(batches))
                    batches.clear()

        yield write
        convert()
        writer.write_table(pa.Table.from_batches(batches))


def read_rows(path: Path) -> Iterator[Row]:
    """Reads the rows that a run wrote as Parquet.

    Args:
        path: The file.

    Yields:
        The rows, in their order.

    Raises:
        UsageError: There is no such file, or it holds something else.
    """
    try:
        with pq.ParquetFile(path) as file:
            if not file.schema_arrow.equals(SCHEMA):
                raise UsageError(
                    f"{path} does not have the columns of this version's results; name a results.parquet "
                    "that this version of geosurge geotag wrote"
                )
            # A reader of several groups keeps what it has read of each.
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(ROWS_A_BATCH, row_groups=[group]):
                    yield from batch_to_rows(batch)
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"cannot read {path}: {error}; name a results.parquet that geosurge geotag wrote") from error
