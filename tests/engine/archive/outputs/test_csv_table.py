from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
from support.rows import DONE, FAILED, ROWS

from geosurge.archive.outputs import SCHEMA, Format, write_outputs


def test_csv_has_every_column_flattened(tmp_path: Path) -> None:
    (path,) = write_outputs(ROWS, tmp_path, [Format.CSV])
    with path.open(encoding="utf-8", newline="") as file:
        done, skipped, withheld, failed = csv.DictReader(file)
    assert [row["status"] for row in (done, skipped, withheld, failed)] == ["done", "skipped", "withheld", "failed"]
    assert done["path"] == DONE.path
    assert failed["path"] == FAILED.path
    assert (float(done["latitude_deg"]), float(done["longitude_deg"])) == (45.7640435, -4.8356589)
    assert [cell["token"] for cell in json.loads(done["cells"])] == ["47", "47f5"]
    assert json.loads(done["alternatives"])[1]["token"] == 'city/"Villeurbanne"'
    assert (done["place_city"], done["place_distance_km"], done["timings_search_ms"]) == ("Lyon", "3.25", "4.0")
    assert (skipped["position_latitude_deg"], skipped["position_source"]) == ("-89.5", "sidecar")
    assert (withheld["latitude_deg"], withheld["place_city"], withheld["cells"]) == ("", "", "[]")
    flat = {name for field in SCHEMA for name in _flat_names(field)}
    assert set(done) == flat


def _flat_names(field: pa.Field) -> list[str]:
    parts = list(field.type) if pa.types.is_struct(field.type) else []
    return [f"{field.name}_{part.name}" for part in parts] or [field.name]


def test_other_readers_of_csv_see_the_same_rows(tmp_path: Path) -> None:
    (path,) = write_outputs(ROWS, tmp_path, [Format.CSV])
    table = pa_csv.read_csv(path, parse_options=pa_csv.ParseOptions(newlines_in_values=True))
    assert table["path"].to_pylist() == [row.path for row in ROWS]
    assert table["radius_km"].to_pylist() == [12.5, None, 900.0, None]
