"""Rows of every status with everything that may be hard to put out, and any rows."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import strategies as st

from geosurge.archive.rows import HAS_POSITION, PROBABILITY_TOO_LOW, Position, Row, Status
from geosurge.location import Alternative, PathCell, Place, Timings

LYON = Place("Lyon", "Auvergne-Rhône-Alpes", "France", "FR", 3.25)
DONE = Row(
    path='archive/été, <b>&amp;"quoted".jpg',
    status=Status.DONE,
    content_hash="ab" * 32,
    latitude_deg=45.7640435,
    longitude_deg=-4.8356589,
    radius_km=12.5,
    confidence_level=0.9,
    probability=0.75,
    cells=(PathCell(1, "47", 0.875), PathCell(2, "47f5", 0.75)),
    place=LYON,
    alternatives=(
        Alternative("47f5", 0.75, 45.76, 4.83, LYON),
        Alternative('city/"Villeurbanne"', 0.125, -0.0, 180.0, None),
    ),
    index_version="blue-marble-v2",
    encoder_hash="cd" * 32,
    timings=Timings(1.0, 2.0, 3.0, 4.0, 5.0),
)
SKIPPED = Row("b.jpg", Status.SKIPPED, HAS_POSITION, "it has one", position=Position(-89.5, 180.0, "sidecar"))
WITHHELD = Row("c.jpg", Status.WITHHELD, PROBABILITY_TOO_LOW, "0.1 is below 0.5", radius_km=900.0, probability=0.1)
FAILED = Row("line\r\nbreak\rand\ttab\x01\ufffe.jpg", Status.FAILED, "IMAGE_EMPTY", "the image has no bytes")
ROWS = [DONE, SKIPPED, WITHHELD, FAILED]

_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_numbers = st.floats(allow_nan=False, allow_infinity=False)
_latitudes, _longitudes = st.floats(-90.0, 90.0), st.floats(-180.0, 180.0)
_places = st.builds(Place, _texts, _texts, _texts, _texts, _numbers)
any_rows = st.builds(
    Row,
    path=_texts,
    status=st.sampled_from(Status),
    reason=_texts,
    detail=_texts,
    content_hash=_texts,
    position=st.none() | st.builds(Position, _latitudes, _longitudes, _texts),
    latitude_deg=st.none() | _latitudes,
    longitude_deg=st.none() | _longitudes,
    radius_km=st.none() | _numbers,
    confidence_level=st.none() | _numbers,
    probability=st.none() | _numbers,
    cells=st.lists(st.builds(PathCell, st.integers(1, 30), _texts, _numbers), max_size=3).map(tuple),
    place=st.none() | _places,
    alternatives=st.lists(
        st.builds(Alternative, _texts, _numbers, _latitudes, _longitudes, st.none() | _places), max_size=2
    ).map(tuple),
    index_version=_texts,
    encoder_hash=_texts,
    timings=st.none() | st.builds(Timings, _numbers, _numbers, _numbers, _numbers, _numbers),
)


def many(count: int) -> Iterator[Row]:
    """Rows that are done, in the order of their paths."""
    return (Row(f"{number:06d}.jpg", Status.DONE, latitude_deg=1.0, longitude_deg=2.0) for number in range(count))
