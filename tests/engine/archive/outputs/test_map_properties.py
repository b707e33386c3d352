from __future__ import annotations

import json
import math
from pathlib import Path
from xml.etree import ElementTree

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.rows import any_rows

from geosurge.archive.outputs import Format, write_outputs
from geosurge.archive.rows import Row, Status


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(any_rows, max_size=4))
def test_whatever_a_row_holds_the_maps_can_be_parsed(tmp_path: Path, some: list[Row]) -> None:
    points, placemarks = write_outputs(some, tmp_path, [Format.GEOJSON, Format.KML])
    there = [row for row in some if row.status is Status.DONE and None not in (row.latitude_deg, row.longitude_deg)]
    features = json.loads(points.read_text(encoding="utf-8"))["features"]
    assert [feature["properties"]["path"] for feature in features] == [row.path for row in there]
    for feature, row in zip(features, there, strict=True):
        longitude, latitude = feature["geometry"]["coordinates"]
        assert math.isclose(longitude, row.longitude_deg or 0.0, abs_tol=1e-7)
        assert math.isclose(latitude, row.latitude_deg or 0.0, abs_tol=1e-7)
    found = ElementTree.parse(placemarks).getroot().iter("{http://www.opengis.net/kml/2.2}Placemark")
    assert len(list(found)) == len(there)
