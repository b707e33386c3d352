from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pyarrow.parquet as pq
from support.rows import ROWS

from geosurge.archive.outputs import SCHEMA, Format, read_rows, write_outputs


def test_a_run_without_pictures_has_empty_files(tmp_path: Path) -> None:
    parquet, table, points, placemarks = write_outputs([], tmp_path / "new" / "folder", list(Format))
    assert list(read_rows(parquet)) == []
    assert pq.read_schema(parquet).equals(SCHEMA)
    assert table.read_bytes().count(b"\n") == 1
    assert json.loads(points.read_text()) == {"type": "FeatureCollection", "features": []}
    assert len(list(ElementTree.parse(placemarks).iter("{http://www.opengis.net/kml/2.2}Placemark"))) == 0


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    first = write_outputs(ROWS, tmp_path / "a", list(Format))
    second = write_outputs(iter(ROWS), tmp_path / "b", list(Format))
    assert [path.name for path in first] == ["results.parquet", "results.csv", "results.geojson", "results.kml"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
