from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from support.bundles import make_bundle, make_levels

from geosurge import map as maps
from geosurge import s2
from geosurge.description import Coordinate
from geosurge.errors import BundleError, ImageEmptyError, UsageError
from geosurge.location import CredibleRegion, Location
from geosurge.map import (
    Land,
    Mark,
    draw_map,
    read_land,
    read_marks,
)
from geosurge.wire import error_to_json, location_to_response, response_to_json

RED = (214, 39, 40)


def located(latitude_deg: float, longitude_deg: float, radius_km: float = 200.0) -> Location:
    region = CredibleRegion((), 0.0, 0.9)
    return Location(latitude_deg, longitude_deg, radius_km, 0.9, 0.5, (), (), region, "tiny")


def picture(path: Path) -> NDArray[np.int64]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"), np.int64)


def pixels_like(pixels: NDArray[np.int64], colour: tuple[int, int, int], tolerance: int = 20) -> NDArray[np.bool_]:
    return np.asarray(np.abs(pixels - colour).max(axis=-1) <= tolerance)


def test_the_land_is_the_leaves_with_their_samples_by_area(tmp_path: Path) -> None:
    land = read_land(make_bundle(tmp_path / "tiny", level_counts=(4, 9, 20)))
    rows, cells = make_levels((4, 9, 20))
    assert np.array_equal(np.stack(land.outlines), s2.cell_id_to_outline(cells[-1]))
    assert land.densities == pytest.approx(rows[-1].sample_counts / rows[-1].area_km2)


def test_an_index_with_very_many_leaves_is_drawn_with_a_coarser_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(tmp_path / "tiny", level_counts=(4, 9, 20))
    monkeypatch.setattr(maps, "MAX_LAND_CELLS", 10)
    land = read_land(bundle)
    rows, cells = make_levels((4, 9, 20))
    assert np.array_equal(np.stack(land.outlines), s2.cell_id_to_outline(cells[1]))
    for row, density in enumerate(land.densities):
        below = rows[2].parents == row
        assert density == pytest.approx(rows[2].sample_counts[below].sum() / rows[2].area_km2[below].sum())


def test_a_missing_index_has_no_land(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no index bundle or store"):
        read_land(tmp_path / "missing")


def test_marks_are_read_from_what_locate_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = located(1.5, -2.5), located(-30.0, 179.0)
    lines = io.StringIO(
        response_to_json(location_to_response(first, "views/nile.jpg"))
        + "\n"
        + error_to_json(ImageEmptyError("the image has no bytes"), "views/empty.jpg")
        + "\n\n"
        + response_to_json(location_to_response(second, str(tmp_path / "views" / "fiji.jpg")))
        + "\n"
    )
    truths = {Path("views/../views/fiji.jpg"): Coordinate(-18.0, 178.0)}
    assert read_marks(lines, truths) == [Mark("nile", first), Mark("fiji", second, Coordinate(-18.0, 178.0))]


@pytest.mark.parametrize(
    "line", ["not json", "[1, 2]", "3", "{}", '{"request_id": "a"}', '{"request_id": 5}', '{"location": {"lat": 1}}']
)
def test_a_line_that_locate_never_prints_is_named(line: str) -> None:
    good = response_to_json(location_to_response(located(0.0, 0.0), "a"))
    with pytest.raises(UsageError, match="line 2 of the answers"):
        read_marks([good, line])


def test_a_map_shows_answers_and_land_and_makes_its_folder(tmp_path: Path) -> None:
    marks = [Mark("here", located(40.0, 10.0, 900.0), Coordinate(45.0, 12.0)), Mark("there", located(-20.0, 179.0))]
    cells = s2.latlng_to_cell_id(np.array([45.0, -20.0]), np.array([12.0, 179.0]), 3)
    land = Land(tuple(s2.cell_id_to_outline(cells)), np.array([1.0, 100.0]))
    bare = picture(draw_map(marks, tmp_path / "new" / "bare.png"))
    full = picture(draw_map(marks, tmp_path / "new" / "full.png", land=land))
    assert pixels_like(bare, RED).sum() > 100
    assert bare.shape == full.shape
    assert (bare != full).any(axis=-1).mean() > 0.02
    # Two answers get close-ups, so many do not.
    many = picture(draw_map(marks * 7, tmp_path / "many.png"))
    assert many.shape[0] < bare.shape[0]


def test_an_index_without_outlines_gives_a_map_without_land(tmp_path: Path) -> None:
    marks = [Mark("here", located(40.0, 10.0))]
    bare = picture(draw_map(marks, tmp_path / "bare.png"))
    empty = picture(draw_map(marks, tmp_path / "empty.png", land=Land((), np.empty(0))))
    assert (empty == bare).all()


def test_a_cell_across_the_antimeridian_is_drawn_at_both_edges_and_not_between(tmp_path: Path) -> None:
    corners = np.array([[-15.0, 165.0], [-15.0, -165.0], [15.0, -165.0], [15.0, 165.0]])
    pixels = picture(draw_map([], tmp_path / "map.png", land=Land((corners,), np.array([1.0]))))
    land = pixels_like(pixels, (211, 223, 180))[len(pixels) // 2]
    found = np.flatnonzero(land) / len(land)
    assert found.min() < 0.1
    assert found.max() > 0.9
    assert not ((found > 0.15) & (found < 0.85)).any()


def test_a_map_that_cannot_be_written_is_a_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write the map"):
        draw_map([], tmp_path / "file" / "map.png")
