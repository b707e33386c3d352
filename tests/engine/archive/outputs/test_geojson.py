from __future__ import annotations

import json
from pathlib import Path

from support.rows import DONE, FAILED, SKIPPED

from geosurge.archive.outputs import Format, write_outputs


def test_geojson_has_a_point_for_each_row_that_is_done(tmp_path: Path) -> None:
    (path,) = write_outputs([SKIPPED, DONE, FAILED, DONE], tmp_path, [Format.GEOJSON])
    collection = json.loads(path.read_text(encoding="utf-8"))
    assert collection["type"] == "FeatureCollection"
    first, second = collection["features"]
    assert first == second
    assert first["type"] == "Feature"
    assert first["geometry"] == {"type": "Point", "coordinates": [-4.8356589, 45.7640435]}
    assert first["properties"]["path"] == DONE.path
    assert first["properties"]["radius_km"] == 12.5
    assert first["properties"]["city"] == "Lyon"
    assert first["properties"]["leaf"] == "47f5"
