"""One pass over the rows, and a file in every form that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Final

from geosurge.archive.outputs.csv_table import csv_writer
from geosurge.archive.outputs.geojson import geojson_writer
from geosurge.archive.outputs.kml import kml_writer
from geosurge.archive.outputs.parquet import parquet_writer
from geosurge.archive.rows import Format, Row

_WRITERS: Final[Mapping[Format, Callable[[Path], AbstractContextManager[Callable[[Row], None]]]]] = {
    Format.PARQUET: parquet_writer,
    Format.CSV: csv_writer,
    Format.GEOJSON: geojson_writer,
    Format.KML: kml_writer,
}


def write_outputs(rows: Iterable[Row], directory: Path, formats: Collection[Format]) -> list[Path]:
    """Writes a file for each format.

    Memory does not grow with the rows. Every file is there whole or not at all; one that was there before stays until
    it is replaced.

    Args:
        rows: The rows; they are gone through once, and the files keep their order.
        directory: Where the files go; it is made when it is missing.
        formats: What to write.

    Returns:
        The files, in the order of the formats.

    Raises:
        OutputNotWritableError: The disk is full, or the directory or a file cannot be written.
    """
    paths = {form: directory / form.file_name for form in formats}
    with ExitStack() as stack:
        writers = [stack.enter_context(_WRITERS[form](path)) for form, path in paths.items()]
        for row in rows:
            for write in writers:
                write(row)
    return list(paths.values())
