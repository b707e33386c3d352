"""Rows as GeoJSON, for web maps and geographic information systems."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from geosurge.archive.outputs.files import replacing
from geosurge.archive.outputs.map_properties import COORDINATE_DECIMALS, map_properties
from geosurge.archive.rows import Row, Status


@contextmanager
def geojson_writer(path: Path) -> Iterator[Callable[[Row], None]]:
    """Writes the rows that are done as a FeatureCollection of points, one feature a line.

    Source: RFC 7946: WGS-84, longitude before latitude.

    Args:
        path: The file to write.

    Yields:
        What writes one row, or passes over one that is not done.

    Raises:
        OutputNotWritableError: The file cannot be written; there is none of it then.
    """
    separator = b"\n"
    with replacing(path) as file:
        file.write(b'{"type":"FeatureCollection","features":[')

        def write(row: Row) -> None:
            nonlocal separator
            if row.status is not Status.DONE or row.latitude_deg is None or row.longitude_deg is None:
                return
            position = [round(row.longitude_deg, COORDINATE_DECIMALS), round(row.latitude_deg, COORDINATE_DECIMALS)]
            feature = {
                "type": "Feature",
                "geometry": {"type": "Point", "coordinates": position},
                "properties": map_properties(row),
            }
            text = json.dumps(feature, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            file.write(separator + text.encode())
            separator = b",\n"

        yield write
        file.write(b"\n]}\n")
