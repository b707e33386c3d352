from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
from support.rows import ROWS

import geosurge.archive.outputs as package
from geosurge.archive.outputs import SCHEMA, Format, columns_table, write_outputs


def test_the_schema_in_the_file_says_what_every_column_means(tmp_path: Path) -> None:
    (path,) = write_outputs(ROWS, tmp_path, [Format.PARQUET])
    schema = pq.read_schema(path)
    assert schema.equals(SCHEMA)
    assert schema.metadata == {b"geosurge.rows": b"1"}
    assert [field.metadata[b"description"] for field in schema] == [field.metadata[b"description"] for field in SCHEMA]
    assert [field.name for field in schema if not field.nullable] == ["path", "status"]


def test_the_published_page_has_every_column() -> None:
    assert columns_table() in (Path(package.__file__).parent / "README.md").read_text(encoding="utf-8")
