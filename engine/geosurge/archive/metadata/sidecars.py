"""XMP sidecars: add a guess to one, or make one; take the guess out again.

A sidecar may hold years of somebody's work (ratings, edits, keywords), so what is there stays: the guess gets an
``rdf:Description`` of its own, and only properties of the names that it writes, whose values were no position, go.
The text between the elements, comments and processing instructions stay as well, and UTF-16 does; any other encoding,
which XMP has no use for, becomes UTF-8.
"""

from __future__ import annotations

from typing import Final

from lxml import etree

from geosurge.archive.metadata import xmp
from geosurge.archive.metadata.guess import GPS_VERSION, MAP_DATUM, Guess
from geosurge.archive.metadata.xmp import Element, XmpError
from geosurge.errors import FileChangedError, SidecarInvalidError

_EMPTY: Final = (
    f'<?xml version="1.0" encoding="UTF-8"?>\n<x:xmpmeta xmlns:x="{xmp.META_NAMESPACE}" x:xmptk="GeoSURGE engine">\n'
    f' <rdf:RDF xmlns:rdf="{xmp.RDF_NAMESPACE}">\n </rdf:RDF>\n</x:xmpmeta>\n'
).encode()

_PREFIXES: Final = {"rdf": xmp.RDF_NAMESPACE, "exif": xmp.EXIF_NAMESPACE, "geosurge": xmp.GUESS_NAMESPACE}
_GUESS_PREFIX: Final = f"{{{xmp.GUESS_NAMESPACE}}}"
_UTF16_MARKS: Final = (b"\xff\xfe", b"\xfe\xff")
_UTF8_MARK: Final = b"\xef\xbb\xbf"


def add_guess(data: bytes | None, guess: Guess) -> bytes:
    """The sidecar with a guess in it.

    Args:
        data: The sidecar, in which no valid position is; `None` makes one.
        guess: What is written.

    Raises:
        SidecarInvalidError: It is not XMP.
    """
    data = _EMPTY if data is None else data
    try:
        root = xmp.parse_xmp(data)
    except XmpError as error:
        raise SidecarInvalidError(f"{error}; repair or remove the sidecar") from error
    values = _values(guess)
    found = xmp.descriptions(root)
    about = next((each.get(xmp.ABOUT, each.get("about", "")) for each in found), "")
    _remove(root, [name for name in xmp.properties(root) if name in values or name.startswith(_GUESS_PREFIX)])
    rdf = xmp.find_rdf(root)
    description = etree.SubElement(rdf, xmp.DESCRIPTION, {xmp.ABOUT: about}, nsmap=_PREFIXES)
    description.text, description.tail = "\n   ", "\n "
    for name, text in values.items():
        element = etree.SubElement(description, name)
        element.text, element.tail = text, "\n   "
    description[-1].tail = "\n  "
    before = description.getprevious()
    if before is None:
        rdf.text = "\n  "
    else:
        before.tail = "\n  "
    return _serialise(root, data)


def remove_guess(data: bytes, guess: Guess) -> bytes:
    """The sidecar without what `add_guess` wrote, whatever else was changed since.

    Returns:
        The sidecar; `data` itself if nothing of the guess is in it.

    Raises:
        FileChangedError: The position is another one by now, or the sidecar can no longer be read.
    """
    try:
        root = xmp.parse_xmp(data)
    except XmpError as error:
        raise FileChangedError(f"the sidecar was damaged since its position was written: {error}") from error
    found = xmp.properties(root)
    is_marked = found.get(xmp.METHOD) == guess.method or found.get(xmp.RUN) == guess.run_id
    latitude = xmp.read_coordinate(found.get(xmp.LATITUDE, ""), "NS")
    longitude = xmp.read_coordinate(found.get(xmp.LONGITUDE, ""), "EW")
    is_there = latitude is not None and longitude is not None and guess.is_at(latitude, longitude)
    if not is_marked and not is_there:
        return data
    if not is_marked or not is_there:
        raise FileChangedError(
            f"the sidecar's position is not the one that run {guess.run_id} wrote any more; it stays as it is"
        )
    _remove(root, [name for name, text in found.items() if _is_ours(name, text, guess)])
    return _serialise(root, data)


def is_empty(data: bytes) -> bool:
    """Whether a sidecar, which can be read, says nothing about its picture."""
    return not xmp.properties(xmp.parse_xmp(data)).keys() - {xmp.ABOUT, "about"}


def _values(guess: Guess) -> dict[str, str]:
    return {
        xmp.VERSION: ".".join(map(str, GPS_VERSION)),
        xmp.LATITUDE: xmp.format_coordinate(guess.latitude_deg, "NS"),
        xmp.LONGITUDE: xmp.format_coordinate(guess.longitude_deg, "EW"),
        xmp.DATUM: MAP_DATUM,
        xmp.ERROR: f"{guess.error_m}/1",
        xmp.METHOD: guess.method,
        f"{_GUESS_PREFIX}IndexVersion": guess.index_version,
        f"{_GUESS_PREFIX}EncoderHash": guess.encoder_hash,
        xmp.RUN: guess.run_id,
        f"{_GUESS_PREFIX}Probability": f"{guess.probability:.6g}",
    }


def _is_ours(name: str, text: str, guess: Guess) -> bool:
    """Whether a property of a sidecar whose position is the guess's is part of the guess."""
    if name in (xmp.LATITUDE, xmp.LONGITUDE) or name.startswith(_GUESS_PREFIX):
        return True
    if name == xmp.ERROR:
        return xmp.read_ratio(text) == guess.error_m
    return name in (xmp.VERSION, xmp.DATUM, xmp.METHOD) and text == _values(guess)[name]


def _remove(root: Element, names: list[str]) -> None:
    """Takes properties out, in both forms, and the descriptions that hold nothing without them."""
    for description in xmp.descriptions(root):
        was = len(description) + len(description.attrib)
        for name in names:
            description.attrib.pop(name, None)
            for element in description.findall(name):
                description.remove(element)
        is_bare = len(description) == 0 and not set(description.attrib) - {xmp.ABOUT, "about"}
        if is_bare and was > len(description.attrib):
            description.getparent().remove(description)


def _serialise(root: Element, like: bytes) -> bytes:
    """The document in UTF-8, or in UTF-16 if another one is, and with what that one had around its root."""
    before = list(root.itersiblings(preceding=True))[::-1]
    nodes = [*before, root, *root.itersiblings()]
    text = "\n".join(etree.tostring(node, encoding="unicode", with_tail=False) for node in nodes) + "\n"
    encoding = "UTF-16" if like.startswith(_UTF16_MARKS) else "UTF-8"
    if b"<?xml " in like[:100].replace(b"\0", b""):
        text = f'<?xml version="1.0" encoding="{encoding}"?>\n{text}'
    mark = _UTF8_MARK if like.startswith(_UTF8_MARK) else b""
    return mark + text.encode(encoding)
