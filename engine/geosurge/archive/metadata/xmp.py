"""XMP packets: parse them safely, and read what they say about the place.

A packet comes from anywhere, so the parser loads nothing, expands no entity and refuses documents that declare any.
Names and forms: XMP Specification Part 1 (ISO 16684-1), 7; Part 2, 3.3 (EXIF schema, GPSCoordinate).
"""

from __future__ import annotations

import re
from typing import Any, Final, TypeAlias

from lxml import etree

EXIF_NAMESPACE: Final = "http://ns.adobe.com/exif/1.0/"
RDF_NAMESPACE: Final = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
META_NAMESPACE: Final = "adobe:ns:meta/"
GUESS_NAMESPACE: Final = "urn:geosurge:guess:1.0/"
"""Of the properties that mark a position as a guess."""

LATITUDE: Final = f"{{{EXIF_NAMESPACE}}}GPSLatitude"
LONGITUDE: Final = f"{{{EXIF_NAMESPACE}}}GPSLongitude"
ERROR: Final = f"{{{EXIF_NAMESPACE}}}GPSHPositioningError"
METHOD: Final = f"{{{EXIF_NAMESPACE}}}GPSProcessingMethod"
DATUM: Final = f"{{{EXIF_NAMESPACE}}}GPSMapDatum"
VERSION: Final = f"{{{EXIF_NAMESPACE}}}GPSVersionID"
RUN: Final = f"{{{GUESS_NAMESPACE}}}RunId"

RDF: Final = f"{{{RDF_NAMESPACE}}}RDF"
DESCRIPTION: Final = f"{{{RDF_NAMESPACE}}}Description"
ABOUT: Final = f"{{{RDF_NAMESPACE}}}about"
_VALUE: Final = f"{{{RDF_NAMESPACE}}}value"

Element: TypeAlias = Any
"""An element of lxml, which comes without types."""

_NUMBER: Final = r"(\d{1,20}(?:\.\d{1,40})?)"
_COORDINATE: Final = re.compile(rf"\s*([+-]?){_NUMBER}(?:,{_NUMBER})?(?:,{_NUMBER})?\s*([NSEWnsew]?)\s*", re.ASCII)
_MINUTE_DIGITS: Final = 8
"""Decimals of a minute: 2e-10 degrees."""


class XmpError(ValueError):
    """The bytes are no XMP packet."""


def parse_xmp(data: bytes) -> Element:
    """Parses a packet.

    Args:
        data: XML in any encoding that it declares.

    Returns:
        The root element; there is an ``rdf:RDF`` in it.

    Raises:
        XmpError: It is not XML, declares a document type (which XMP has none of), or holds no ``rdf:RDF``.
    """
    parser = etree.XMLParser(resolve_entities=False, load_dtd=False, no_network=True, huge_tree=False)
    try:
        root = etree.fromstring(_trimmed(data), parser)
    except (etree.XMLSyntaxError, ValueError) as error:
        raise XmpError(f"it is not XML: {error}") from error
    if root.getroottree().docinfo.internalDTD is not None:
        raise XmpError("it declares a document type, which XMP has none of")
    if find_rdf(root) is None:
        raise XmpError("it is XML, but no XMP: there is no rdf:RDF in it")
    return root


def find_rdf(root: Element) -> Element:
    """The ``rdf:RDF`` of a document; `None` if there is none."""
    return next(root.iter(RDF), None)


def descriptions(root: Element) -> list[Element]:
    """The ``rdf:Description`` elements of a packet; together they are about one picture."""
    rdf = find_rdf(root)
    return [] if rdf is None else rdf.findall(DESCRIPTION)


def properties(root: Element) -> dict[str, str]:
    """The simple properties of a packet, in either form (attribute, element): name in Clark's notation to text.

    Of a property that is there twice the first counts; what is inside another property is not the picture's own.
    """
    found: dict[str, str] = {}
    for description in descriptions(root):
        for name, text in description.attrib.items():
            found.setdefault(name, text)
        for element in description.iterchildren(tag=etree.Element):
            inner = element.find(f"{DESCRIPTION}/{_VALUE}")
            inner = element.find(_VALUE) if inner is None else inner
            text = (element if inner is None else inner).text
            found.setdefault(element.tag, (text or "").strip())
    return found


def read_coordinate(text: str, letters: str) -> float | None:
    """Degrees of a coordinate: ``DDD,MM,SSk``, ``DDD,MM.mmk``, or a decimal number with or without a letter.

    Args:
        text: The value.
        letters: ``"NS"`` or ``"EW"``.

    Returns:
        The degrees, whatever their range; `None` if it is no coordinate, or its sign contradicts its letter. Degrees
        and minutes without a letter have no known hemisphere; a bare number has its sign.
    """
    match = _COORDINATE.fullmatch(text)
    if match is None:
        return None
    sign, degrees, minutes, seconds, letter = match.groups()
    letter = letter.upper()
    if letter and letter not in letters:
        return None
    value = float(degrees) + float(minutes or 0) / 60 + float(seconds or 0) / 3600
    if not letter:
        return None if minutes else -value if sign == "-" else value
    if sign == "-" and letter == letters[0]:
        return None
    return -value if letter == letters[1] else value


def format_coordinate(degrees: float, letters: str) -> str:
    """A coordinate in degrees and minutes, as ``DDD,MM.mmmmmmmmk``."""
    units = round(abs(degrees) * 60 * 10**_MINUTE_DIGITS)
    minutes, fraction = divmod(units, 10**_MINUTE_DIGITS)
    whole, minutes = divmod(minutes, 60)
    return f"{whole},{minutes}.{fraction:0{_MINUTE_DIGITS}}{letters[1] if degrees < 0 else letters[0]}"


def read_ratio(text: str) -> float | None:
    """A number that is written as ``a/b`` or as a decimal."""
    numerator, slash, denominator = text.partition("/")
    try:
        return float(numerator) / float(denominator) if slash else float(numerator)
    except (ValueError, ZeroDivisionError):
        return None


def _trimmed(data: bytes) -> bytes:
    """The document without the zeros and spaces around it that some writers leave; UTF-16 and UTF-32 as they are."""
    if b"\0" in data[:4]:
        return data
    return data.removeprefix(b"\xef\xbb\xbf").strip(b"\0 \t\r\n")
