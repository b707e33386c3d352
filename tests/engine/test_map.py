from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from support.bundles import make_bundle, make_levels

from geosurge import geodesy
from geosurge import map as maps
from geosurge.description import Coordinate
from geosurge.errors import BundleError, ImageEmptyError, UsageError
from geosurge.geodesy import EARTH_RADIUS_KM, great_circle_km
from geosurge.location import CredibleRegion, Location
from geosurge.map import (
    Land,
    Mark,
    azimuthal_equidistant,
    circle,
    draw_map,
    equal_earth,
    great_circle,
    read_land,
    read_marks,
)
from geosurge.wire import error_to_json, location_to_response, response_to_json

LATITUDES = st.floats(-90.0, 90.0)
LONGITUDES = st.floats(-180.0, 180.0)
COORDINATES = st.builds(Coordinate, LATITUDES, LONGITUDES)
RED = (214, 39, 40)


def located(latitude_deg: float, longitude_deg: float, radius_km: float = 200.0) -> Location:
    region = CredibleRegion((), 0.0, 0.9)
    return Location(latitude_deg, longitude_deg, radius_km, 0.9, 0.5, (), (), region, "tiny")


def distances_km(points: NDArray[np.float64], place: Coordinate) -> NDArray[np.float64]:
    return np.asarray(great_circle_km(points[:, 0], points[:, 1], place.latitude_deg, place.longitude_deg))


def picture(path: Path) -> NDArray[np.int64]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"), np.int64)


def pixels_like(pixels: NDArray[np.int64], colour: tuple[int, int, int], tolerance: int = 20) -> NDArray[np.bool_]:
    return np.asarray(np.abs(pixels - colour).max(axis=-1) <= tolerance)


@given(st.floats(-89.5, 89.5), LONGITUDES)
def test_the_map_of_the_world_is_true_in_area(latitude_deg: float, longitude_deg: float) -> None:
    step = 1e-4
    latitudes = latitude_deg + np.array([-step, step, 0.0, 0.0])
    longitudes = longitude_deg + np.array([0.0, 0.0, -step, step])
    x, y = equal_earth(latitudes, longitudes)
    area = (x[3] - x[2]) * (y[1] - y[0])
    side = math.radians(2 * step)
    assert area == pytest.approx(math.cos(math.radians(latitude_deg)) * side**2, rel=1e-5)


def test_the_map_of_the_world_has_the_published_shape() -> None:
    x, y = equal_earth(np.array([0.0, 90.0, 90.0]), np.array([180.0, 0.0, 180.0]))
    assert (x[0], y[0]) == (pytest.approx(2.70663, abs=1e-5), 0.0)
    assert (x[1], y[1]) == (0.0, pytest.approx(1.31736, abs=1e-5))
    assert x[2] == pytest.approx(0.59 * x[0], abs=0.01)


@given(COORDINATES, COORDINATES)
def test_close_ups_are_true_in_distance_from_their_centre(centre: Coordinate, place: Coordinate) -> None:
    x, y = azimuthal_equidistant(centre)(np.array(place.latitude_deg), np.array(place.longitude_deg))
    expected = great_circle_km(centre.latitude_deg, centre.longitude_deg, place.latitude_deg, place.longitude_deg)
    if expected < 20_000.0:
        assert math.hypot(float(x), float(y)) == pytest.approx(float(expected), rel=1e-6, abs=1e-3)


def test_in_close_ups_north_is_up_and_east_is_right() -> None:
    project = azimuthal_equidistant(Coordinate(-40.0, 179.5))
    x, y = project(np.array([-39.0, -40.0]), np.array([179.5, -179.5]))
    assert x[0] == pytest.approx(0.0, abs=1e-6)
    assert y[0] > 0.0
    assert x[1] > 80.0
    assert abs(y[1]) < 1.0


@given(COORDINATES, COORDINATES)
def test_a_great_circle_is_as_long_as_the_distance(start: Coordinate, end: Coordinate) -> None:
    expected = float(great_circle_km(start.latitude_deg, start.longitude_deg, end.latitude_deg, end.longitude_deg))
    if expected > 19_900.0:
        return
    line = great_circle(start, end)
    steps = great_circle_km(line[:-1, 0], line[:-1, 1], line[1:, 0], line[1:, 1])
    assert float(np.sum(steps)) == pytest.approx(expected, rel=1e-6, abs=1e-3)
    assert distances_km(line[:1], start)[0] == pytest.approx(0.0, abs=1e-3)
    assert distances_km(line[-1:], end)[0] == pytest.approx(0.0, abs=1e-3)


@given(COORDINATES, st.floats(1.0, 0.99 * math.pi * EARTH_RADIUS_KM))
def test_a_circle_has_one_distance_and_goes_all_around(centre: Coordinate, radius_km: float) -> None:
    points = circle(centre, radius_km)
    assert distances_km(points, centre) == pytest.approx(radius_km, rel=1e-6, abs=1e-3)
    middle = geodesy.latlng_to_unit_vector(points[:-1, 0], points[:-1, 1]).mean(axis=0)
    up = geodesy.latlng_to_unit_vector(centre.latitude_deg, centre.longitude_deg)
    assert middle == pytest.approx(math.cos(radius_km / EARTH_RADIUS_KM) * up, abs=1e-9)


def test_the_land_is_the_leaves_with_their_samples_by_area(tmp_path: Path) -> None:
    land = read_land(make_bundle(tmp_path / "tiny", level_counts=(4, 9, 20)))
    rows, cells = make_levels((4, 9, 20))
    assert np.array_equal(np.stack(land.outlines), geodesy.cell_id_to_outline(cells[-1]))
    assert land.densities == pytest.approx(rows[-1].sample_counts / rows[-1].area_km2)


def test_an_index_with_very_many_leaves_is_drawn_with_a_coarser_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(tmp_path / "tiny", level_counts=(4, 9, 20))
    monkeypatch.setattr(maps, "MAX_LAND_CELLS", 10)
    land = read_land(bundle)
    rows, cells = make_levels((4, 9, 20))
    assert np.array_equal(np.stack(land.outlines), geodesy.cell_id_to_outline(cells[1]))
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
    cells = geodesy.latlng_to_cell_id(np.array([45.0, -20.0]), np.array([12.0, 179.0]), 3)
    land = Land(tuple(geodesy.cell_id_to_outline(cells)), np.array([1.0, 100.0]))
    bare = picture(draw_map(marks, tmp_path / "new" / "bare.png"))
    full = picture(draw_map(marks, tmp_path / "new" / "full.png", land=land))
    assert pixels_like(bare, RED).sum() > 100
    assert bare.shape == full.shape
    assert (bare != full).any(axis=-1).mean() > 0.02
    # Two answers get close-ups, so many do not.
    many = picture(draw_map(marks * 7, tmp_path / "many.png"))
    assert many.shape[0] < bare.shape[0]


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
