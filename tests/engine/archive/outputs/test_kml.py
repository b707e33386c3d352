from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from support.rows import DONE, FAILED, WITHHELD

from geosurge.archive.outputs import Format, write_outputs
from geosurge.archive.rows import Row, Status


def test_kml_has_a_placemark_for_each_row_that_is_done(tmp_path: Path) -> None:
    odd = Row(f"folder/{FAILED.path}", Status.DONE, latitude_deg=-90.0, longitude_deg=180.0)
    (path,) = write_outputs([DONE, WITHHELD, odd], tmp_path, [Format.KML])
    names = {"k": "http://www.opengis.net/kml/2.2"}
    first, second = ElementTree.parse(path).getroot().findall("k:Document/k:Placemark", names)
    assert first.findtext("k:name", namespaces=names) == DONE.path.removeprefix("archive/")
    assert first.findtext("k:Point/k:coordinates", namespaces=names) == "-4.8356589,45.7640435"
    data = {
        item.get("name"): item.findtext("k:value", namespaces=names) for item in first.iter(f"{{{names['k']}}}Data")
    }
    assert data["path"] == DONE.path
    assert data["radius_km"] == "12.5"
    assert second.findtext("k:Point/k:coordinates", namespaces=names) == "180.0000000,-90.0000000"
    # A control character and a noncharacter, which XML forbids, show their bytes.
    assert second.findtext("k:name", namespaces=names) == "line\r\nbreak\rand\ttab\\x01\\xef\\xbf\\xbe.jpg"
