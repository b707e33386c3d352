from __future__ import annotations

import io

from rich.console import Console, RenderableType

from geosurge.errors import ImageTruncatedError
from geosurge.location import CredibleRegion, Location, PathCell, Place
from geosurge.tables import coordinate_text, location_table

LOCATION = Location(
    latitude_deg=-36.84853,
    longitude_deg=174.76349,
    radius_km=1234.4,
    confidence_level=0.9,
    probability=0.4567,
    path=(PathCell(1, "6d", 0.9), PathCell(2, "6d1", 0.5)),
    alternatives=(),
    credible_region=CredibleRegion(("6d1",), 1.0, 0.9),
    index_version="tiny",
    place=Place("Auckland [north]", "Auckland", "New Zealand", "NZ", 12.3),
)


def printed(content: RenderableType) -> list[list[str]]:
    written = io.StringIO()
    Console(file=written, width=200).print(content)
    rows = [line for line in written.getvalue().splitlines() if line.startswith("│")]
    return [[column.strip() for column in row.strip("│").split("│")] for row in rows]


def test_an_answer_is_a_row_with_its_place_in_words() -> None:
    assert printed(location_table([("a [b].jpg", LOCATION)])) == [
        ["a [b].jpg", "Auckland [north], New Zealand (12 km)", "-36.8485", "174.7635", "1,234", "0.457", "6d 6d1"]
    ]


def test_a_failure_is_a_row_in_its_place_with_its_reason() -> None:
    rows = printed(location_table([("a", LOCATION), ("b", ImageTruncatedError("ends [early]")), ("c", LOCATION)]))
    assert [row[0] for row in rows] == ["a", "b", "c"]
    assert rows[1][1] == "IMAGE_TRUNCATED ends [early]"
    assert rows[0][1:] == rows[2][1:]


def test_coordinates_are_written_with_their_hemispheres() -> None:
    assert coordinate_text(-36.84853, 174.76349) == "36.85 S 174.76 E"
    assert coordinate_text(27.9, -81.6) == "27.90 N 81.60 W"
    assert coordinate_text(0.0, 0.0) == "0.00 N 0.00 E"
