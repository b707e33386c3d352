"""Rows as KML, for Google Earth and its kin."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Final

from geosurge.archive.outputs.files import replacing
from geosurge.archive.outputs.map_properties import COORDINATE_DECIMALS, map_properties
from geosurge.archive.rows import Row, Status

_HEAD: Final = """<?xml version="1.0" encoding="UTF-8"?>
<kml xmlns="http://www.opengis.net/kml/2.2">
<Document>
<name>Estimated places of pictures</name>
<Style id="estimate"><IconStyle><scale>0.6</scale></IconStyle><LabelStyle><scale>0</scale></LabelStyle></Style>
"""
_TAIL: Final = "</Document>\n</kml>\n"

_NOT_XML: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@contextmanager
def kml_writer(path: Path) -> Iterator[Callable[[Row], None]]:
    """Writes the rows that are done as placemarks, one a line.

    Source: OGC 12-007r2, KML 2.3, of which only what KML 2.2 has, too, is used.

    Args:
        path: The file to write.

    Yields:
        What writes one row, or passes over one that is not done.

    Raises:
        OutputNotWritableError: The file cannot be written; there is none of it then.
    """
    with replacing(path) as file:
        file.write(_HEAD.encode())

        def write(row: Row) -> None:
            if row.status is not Status.DONE or row.latitude_deg is None or row.longitude_deg is None:
                return
            data = "".join(
                f'<Data name="{name}"><value>{_text(str(value))}</value></Data>'
                for name, value in map_properties(row).items()
                if value is not None
            )
            longitude = f"{row.longitude_deg:.{COORDINATE_DECIMALS}f}"
            latitude = f"{row.latitude_deg:.{COORDINATE_DECIMALS}f}"
            placemark = (
                f"<Placemark><name>{_text(PurePosixPath(row.path).name)}</name><styleUrl>#estimate</styleUrl>"
                f"<ExtendedData>{data}</ExtendedData>"
                f"<Point><coordinates>{longitude},{latitude}</coordinates></Point></Placemark>\n"
            )
            file.write(placemark.encode())

        yield write
        file.write(_TAIL.encode())


def _text(value: str) -> str:
    r"""Text of an element. Characters that XML cannot hold become ``\xNN``, like bytes of a path that are not UTF-8."""
    allowed = _NOT_XML.sub(lambda found: "".join(f"\\x{byte:02x}" for byte in found[0].encode()), value)
    # A bare carriage return would be read back as a line feed.
    return html.escape(allowed).replace("\r", "&#13;")
