from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from lxml import etree
from support import exiftool
from support.metadata import GUESS

from geosurge.archive.metadata import xmp
from geosurge.archive.metadata.sidecars import add_guess, is_empty, remove_guess
from geosurge.errors import FileChangedError, SidecarInvalidError

RDF = 'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"'

LIGHTROOM = f"""<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="Adobe XMP Core 7.0-c000 1.000000, 0000/00/00-00:00:00 ">
 <rdf:RDF {RDF}>
  <rdf:Description rdf:about=""
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:exif="http://ns.adobe.com/exif/1.0/"
    xmlns:dc="http://purl.org/dc/elements/1.1/"
    xmlns:crs="http://ns.adobe.com/camera-raw-settings/1.0/"
   xmp:Rating="4"
   xmp:Label="Grün &amp; &lt;rot&gt;"
   exif:GPSLatitude="0,0.0N"
   exif:GPSLongitude="0,0.0E"
   exif:GPSAltitude="350/10"
   crs:Exposure2012="+0.35">
   <dc:subject>
    <rdf:Bag>
     <rdf:li>Urlaub</rdf:li>
     <rdf:li>海</rdf:li>
    </rdf:Bag>
   </dc:subject>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
"""

DARKTABLE = f"""<?xml version="1.0" encoding="UTF-8"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="XMP Core 4.4.0-Exiv2">
 <rdf:RDF {RDF}>
  <rdf:Description rdf:about=""
    xmlns:exif="http://ns.adobe.com/exif/1.0/"
    xmlns:darktable="http://darktable.sf.net/"
   exif:DateTimeOriginal="2020:01:02 03:04:05.000"
   darktable:xmp_version="5"
   darktable:raw_params="0">
   <darktable:history>
    <rdf:Seq>
     <rdf:li
      darktable:num="0"
      darktable:operation="exposure"
      darktable:params="gz02eJxjYGBgYAFiCQ=="/>
    </rdf:Seq>
   </darktable:history>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
"""

DIGIKAM = f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<!-- kept -->
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="XMP Core 5.5.0">
 <rdf:RDF {RDF}>
  <rdf:Description rdf:about="uuid:1234" xmlns:digiKam="http://www.digikam.org/ns/1.0/">
   <digiKam:TagsList><rdf:Seq><rdf:li>Orte/Lyon</rdf:li></rdf:Seq></digiKam:TagsList>
  </rdf:Description>
  <rdf:Description rdf:about="uuid:1234" xmlns:exif="http://ns.adobe.com/exif/1.0/">
   <exif:GPSMapDatum>TOKYO</exif:GPSMapDatum>
   <exif:GPSTimeStamp>2020-01-02T03:04:05Z</exif:GPSTimeStamp>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>
"""

ENCODED = {
    "lightroom": LIGHTROOM.encode(),
    "lightroom-mark": LIGHTROOM.encode("utf-8-sig"),
    "darktable": DARKTABLE.encode(),
    "digikam": DIGIKAM.encode(),
    "utf-16": DIGIKAM.encode("utf-16"),
    "utf-16-declared": DARKTABLE.replace("UTF-8", "UTF-16").encode("utf-16"),
    "latin-1": b'<?xml version="1.0" encoding="ISO-8859-1"?>\n' + LIGHTROOM.replace("海", "mer").encode("iso-8859-1"),
    "bare-rdf": f'<rdf:RDF {RDF}><rdf:Description rdf:about="" xmlns:a="urn:a/" a:b="c"/></rdf:RDF>'.encode(),
    "no-description": f"<rdf:RDF {RDF}/>".encode(),
    "padded": DARKTABLE.encode() + b" " * 2000 + b"\0",
    "other-prefixes": (
        f'<rdf:RDF {RDF}><rdf:Description rdf:about="" xmlns:exif="urn:x/" xmlns:geosurge="urn:y/" exif:a="b"'
        ' geosurge:c="d"/></rdf:RDF>'
    ).encode(),
}
sidecars = pytest.mark.parametrize("data", list(ENCODED.values()), ids=list(ENCODED))


def everything(data: bytes, without: tuple[str, ...] = ()) -> set[tuple[str, str]]:
    """Every text and attribute of a document, with the path to it."""
    root = xmp.parse_xmp(data)
    found = set()
    for element in root.iter(etree.Element):
        path = "/".join(str(each.tag) for each in [*element.iterancestors()][::-1])
        found.add((f"{path}/{element.tag}", (element.text or "").strip()))
        found |= {(f"{path}/{element.tag}/@{name}", text) for name, text in element.attrib.items()}
    return {(path, text) for path, text in found if not path.endswith(without)} if without else found


REPLACED = ("GPSLatitude", "GPSLongitude", "GPSMapDatum")


def test_a_new_sidecar_reads_as_it_was_meant(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg.xmp"
    path.write_bytes(add_guess(None, GUESS))
    tags = exiftool.read_tags([path])
    assert exiftool.position(tags[path]) == pytest.approx((GUESS.latitude_deg, GUESS.longitude_deg), abs=1e-9)
    wanted = {
        "XMP:GPSHPositioningError": 12346,
        "XMP:GPSProcessingMethod": "geosurge blue-marble-v2 run run-1",
        "XMP:GPSMapDatum": "WGS-84",
        "XMP:GPSVersionID": "2.3.0.0",
        "XMP:IndexVersion": "blue-marble-v2",
        "XMP:EncoderHash": "ab" * 32,
        "XMP:RunId": "run-1",
        "XMP:Probability": 0.25,
    }
    assert {name: tags[path][name] for name in wanted} == wanted


@sidecars
def test_what_others_wrote_stays(data: bytes) -> None:
    written = add_guess(data, GUESS)

    assert everything(data, REPLACED) <= everything(written)
    found = xmp.properties(xmp.parse_xmp(written))
    latitude = xmp.read_coordinate(found[xmp.LATITUDE], "NS")
    assert latitude == pytest.approx(GUESS.latitude_deg, abs=1e-9)
    assert found[xmp.DATUM] == "WGS-84"
    assert written == add_guess(data, GUESS)


@sidecars
def test_the_encoding_and_the_wrapper_stay(data: bytes) -> None:
    written = add_guess(data, GUESS)
    assert written[:2] == data[:2]
    codec = "utf-16" if data[:2] == b"\xff\xfe" else "utf-8"
    before, after = data.decode(codec, "replace"), written.decode(codec)
    for mark in ("<?xml ", "<?xpacket begin", "<?xpacket end", "<!-- kept -->", "\ufeff"):
        assert before.count(mark) == after.count(mark), mark


@sidecars
def test_a_removed_guess_leaves_what_others_wrote(data: bytes) -> None:
    rest = remove_guess(add_guess(data, GUESS), GUESS)
    assert everything(rest) == everything(data, REPLACED)
    assert remove_guess(rest, GUESS) == rest


def test_every_description_is_about_the_same(tmp_path: Path) -> None:
    written = add_guess(DIGIKAM.encode(), GUESS)
    assert {each.get(xmp.ABOUT) for each in xmp.descriptions(xmp.parse_xmp(written))} == {"uuid:1234"}


def test_exiftool_reads_merged_sidecars(tmp_path: Path) -> None:
    paths = {name: tmp_path / f"{name}.xmp" for name in ENCODED}
    for name, path in paths.items():
        path.write_bytes(ENCODED[name])
    before = exiftool.read_tags(paths.values())
    for path in paths.values():
        path.write_bytes(add_guess(path.read_bytes(), GUESS))
    read = exiftool.read_tags(paths.values())
    for path in paths.values():
        assert exiftool.position(read[path]) == pytest.approx((GUESS.latitude_deg, GUESS.longitude_deg), abs=1e-9)
        assert read[path].get("ExifTool:Warning") == before[path].get("ExifTool:Warning")
    assert read[paths["lightroom"]]["XMP:Rating"] == 4
    assert read[paths["lightroom"]]["XMP:GPSAltitude"] == 35
    assert read[paths["digikam"]]["XMP:TagsList"] == "Orte/Lyon"


@sidecars
def test_a_guess_is_removed_after_another_program_rewrote_the_sidecar(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.xmp"
    path.write_bytes(add_guess(data, GUESS))
    exiftool.change_tags([path], "-XMP-dc:Creator=Somebody", "-XMP-exif:GPSDOP=2")

    rest = remove_guess(path.read_bytes(), GUESS)

    texts = [text for _, text in everything(rest)]
    assert "Somebody" in texts
    assert {name for name in xmp.properties(xmp.parse_xmp(rest)) if "GPS" in name and name.endswith("DOP")}
    assert not [text for text in texts if "geosurge blue" in text or "run-1" in text or text.endswith("S")]


@pytest.mark.parametrize("data", [b"", b"no xml", b"<a/>", b"\xff\xd8\xff", b"<!DOCTYPE a><a/>"])
def test_what_is_no_xmp_is_left_alone(data: bytes) -> None:
    with pytest.raises(SidecarInvalidError, match="repair or remove"):
        add_guess(data, GUESS)
    with pytest.raises(FileChangedError, match="damaged"):
        remove_guess(data, GUESS)


@sidecars
def test_where_no_guess_is_there_is_none_to_remove(data: bytes) -> None:
    assert remove_guess(data, GUESS) is data


@pytest.mark.parametrize("change", [{"latitude_deg": -33.9}, {"longitude_deg": 151.3}])
def test_a_corrected_position_is_not_removed(change: dict[str, float]) -> None:
    with pytest.raises(FileChangedError, match="run-1"):
        remove_guess(add_guess(None, replace(GUESS, **change)), GUESS)


def test_the_same_position_without_the_mark_is_not_removed() -> None:
    with pytest.raises(FileChangedError, match="stays as it is"):
        remove_guess(add_guess(None, replace(GUESS, run_id="run-2")), GUESS)


def test_an_error_that_somebody_changed_stays() -> None:
    changed = add_guess(DARKTABLE.encode(), GUESS).replace(b"12346/1", b"30/1")
    assert xmp.properties(xmp.parse_xmp(remove_guess(changed, GUESS)))[xmp.ERROR] == "30/1"


def test_a_sidecar_of_nothing_but_the_guess_is_empty_without_it() -> None:
    written = add_guess(None, GUESS)
    assert not is_empty(written)
    assert is_empty(remove_guess(written, GUESS))
    assert not is_empty(DARKTABLE.encode())
