from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.metadata import xmp_packet

from geosurge.archive.metadata import xmp
from geosurge.archive.metadata.xmp import (
    XmpError,
    format_coordinate,
    parse_xmp,
    properties,
    read_coordinate,
    read_ratio,
)

LAUGHS = "".join(f'<!ENTITY {chr(98 + n)} "{("&" + chr(97 + n) + ";") * 10}">' for n in range(9))


@given(st.floats(-180, 180))
def test_a_written_coordinate_reads_as_it_was(degrees: float) -> None:
    read = read_coordinate(format_coordinate(degrees, "EW"), "EW")
    assert read is not None
    assert abs(read - degrees) < 1e-9


@pytest.mark.parametrize(
    ("degrees", "text"),
    [
        (90.0, "90,0.00000000N"),
        (-90.0, "90,0.00000000S"),
        (0.0, "0,0.00000000N"),
        (-0.0, "0,0.00000000N"),
        (-1e-7, "0,0.00000600S"),
        (59.99999999999, "60,0.00000000N"),
        (12.5125, "12,30.75000000N"),
    ],
)
def test_coordinates_have_the_form_of_the_specification(degrees: float, text: str) -> None:
    assert format_coordinate(degrees, "NS") == text


@pytest.mark.parametrize(
    ("text", "degrees"),
    [
        ("26,34,951S", -(26 + 34 / 60 + 951 / 3600)),
        ("48,51.5N", 48 + 51.5 / 60),
        ("48,51,30n", 48 + 51.5 / 60),
        (" 48.8583 N ", 48.8583),
        ("-33.45", -33.45),
        ("+33.45", 33.45),
        ("-33.45S", -33.45),
        ("95,0.0N", 95.0),
    ],
)
def test_coordinates_of_other_programs_are_read(text: str, degrees: float) -> None:
    assert read_coordinate(text, "NS") == pytest.approx(degrees, abs=1e-12)


@pytest.mark.parametrize(
    "text",
    ["", "N", "nan", "NaN", "inf", "48,51.5", "-48,51.5", "-48,51.5N", "48,51.5E", "0/0", "48;51N", "1" * 21, "4٣,5N"],
)
def test_what_is_no_coordinate_is_none(text: str) -> None:
    assert read_coordinate(text, "NS") is None


def test_a_number_of_many_digits_is_finite() -> None:
    value = read_coordinate("9" * 20 + "." + "9" * 40 + "N", "NS")
    assert value is not None
    assert math.isfinite(value)


@pytest.mark.parametrize(
    ("text", "number"), [("12346/1", 12346.0), ("1.5", 1.5), ("1/0", None), ("x", None), ("", None)]
)
def test_ratios(text: str, number: float | None) -> None:
    assert read_ratio(text) == number


@pytest.mark.parametrize(
    "packet",
    [
        xmp_packet("<exif:GPSLatitude>1,2.0N</exif:GPSLatitude>"),
        xmp_packet("", 'exif:GPSLatitude="1,2.0N"'),
        xmp_packet("<exif:GPSLatitude rdf:parseType='Resource'><rdf:value>1,2.0N</rdf:value></exif:GPSLatitude>"),
        xmp_packet(
            "<exif:GPSLatitude><rdf:Description><rdf:value>1,2.0N</rdf:value></rdf:Description></exif:GPSLatitude>"
        ),
        xmp_packet("<!-- first --><?and this?><exif:GPSLatitude>\n 1,2.0N\n</exif:GPSLatitude>"),
        xmp_packet(
            '</rdf:Description><rdf:Description exif:GPSLatitude="1,2.0N" xmlns:exif="http://ns.adobe.com/exif/1.0/">'
        ),
    ],
)
def test_properties_are_read_in_every_form(packet: str) -> None:
    assert properties(parse_xmp(packet.encode()))[xmp.LATITUDE] == "1,2.0N"


def test_properties_inside_others_are_not_the_pictures_own() -> None:
    inside = "<exif:Shown rdf:parseType='Resource'><exif:GPSLatitude>1,2.0N</exif:GPSLatitude></exif:Shown>"
    assert xmp.LATITUDE not in properties(parse_xmp(xmp_packet(inside).encode()))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "iso-8859-1"])
def test_packets_are_read_in_every_encoding(encoding: str) -> None:
    name = encoding.removesuffix("-sig")
    text = xmp_packet("", 'exif:GPSMapDatum="für"', before=f'<?xml version="1.0" encoding="{name}"?>')
    assert properties(parse_xmp(text.encode(encoding)))[xmp.DATUM] == "für"


@pytest.mark.parametrize("mark", [b"\0\0\0", b"\r\n \0", b"\xef\xbb\xbf"])
def test_zeros_spaces_and_marks_around_a_packet_are_passed_over(mark: bytes) -> None:
    after = b"" if mark.startswith(b"\xef") else mark
    before = mark if mark.startswith(b"\xef") else b"\n"
    assert xmp.descriptions(parse_xmp(before + xmp_packet("").encode() + after))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 100,
        b"\xff\xd8\xff\xe0",
        b"no xml",
        b"<a>",
        b"<a/>",
        b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>",
        b"<d>" * 100_000,
        b'<?xml version="1.0" encoding="nonsense"?><a/>',
        xmp_packet("\x01").encode(),
        xmp_packet("<exif:GPSLatitude>").encode(),
    ],
)
def test_what_is_no_xmp_is_refused(data: bytes) -> None:
    with pytest.raises(XmpError):
        parse_xmp(data)


@pytest.mark.parametrize(
    "declaration",
    [
        "<!DOCTYPE a>",
        '<!DOCTYPE a SYSTEM "http://192.0.2.1/a.dtd">',
        '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/hostname">]>',
        f'<!DOCTYPE a [<!ENTITY a "ha">{LAUGHS}]>',
    ],
)
@pytest.mark.parametrize("use", ["", "&e;", "&j;"])
def test_document_types_and_entities_are_refused(declaration: str, use: str) -> None:
    packet = xmp_packet(f"<exif:GPSLatitude>{use}</exif:GPSLatitude>", before=declaration)
    with pytest.raises(XmpError):
        parse_xmp(packet.encode())
