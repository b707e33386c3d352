from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import s2sphere
from hypothesis import given
from hypothesis import strategies as st
from support.points import latitudes, longitudes, random_points

from geosurge import s2
from geosurge.errors import CoordinateOutOfRangeError
from geosurge.geodesy import (
    EARTH_RADIUS_KM,
    Float64Array,
    Int64Array,
    latlng_to_unit_vector,
)
from geosurge.s2 import (
    CellIdArray,
    cell_id_range,
    cell_id_to_area_km2,
    cell_id_to_center,
    cell_id_to_children,
    cell_id_to_outline,
    cell_id_to_parent,
    cell_id_to_s2_level,
    cell_id_to_token,
    latlng_to_cell_id,
    token_to_cell_id,
)

EARTH_AREA_KM2 = 4.0 * math.pi * EARTH_RADIUS_KM**2
CORNER_LATITUDE = math.degrees(math.atan(1.0 / math.sqrt(2.0)))
FACE_TOKENS = ["1", "3", "5", "7", "9", "b"]

s2_levels = st.integers(0, 30)


@st.composite
def cells(draw: st.DrawFn, finest: int = 30) -> s2sphere.CellId:
    point = s2sphere.LatLng.from_degrees(draw(latitudes), draw(longitudes))
    return s2sphere.CellId.from_lat_lng(point).parent(draw(st.integers(0, finest)))


def border_points() -> tuple[Float64Array, Float64Array]:
    """Poles, the antimeridian, and the edges, corners and middle lines of the cube."""
    angles = np.concatenate([np.arange(-180.0, 181.0, 15.0), np.random.default_rng(1).uniform(-180.0, 180.0, 500)])
    edge = np.degrees(np.arctan(np.cos(np.radians((angles + 45.0) % 90.0 - 45.0))))
    rows = [np.array([[90.0, 0.0], [-90.0, 0.0], [90.0, 180.0], [-90.0, -123.4], [0.0, 0.0]])]
    rows += [np.stack([np.full_like(angles, latitude), angles], axis=1) for latitude in (0.0, 45.0, -45.0)]
    rows += [np.stack([angles / 2.0, np.full_like(angles, lng)], axis=1) for lng in np.arange(-180.0, 181.0, 45.0)]
    rows += [np.stack([sign * edge, angles], axis=1) for sign in (1.0, -1.0)]
    rows += [np.array([[s * CORNER_LATITUDE, lng] for s in (1, -1) for lng in (45.0, 135.0, -45.0, -135.0)])]
    points = np.concatenate(rows)
    return points[:, 0], points[:, 1]


def oracle_leaf_ids(latitude_deg: Float64Array, longitude_deg: Float64Array) -> CellIdArray:
    points = zip(latitude_deg.tolist(), longitude_deg.tolist(), strict=True)
    ids = [s2sphere.CellId.from_lat_lng(s2sphere.LatLng.from_degrees(lat, lng)).id() for lat, lng in points]
    return np.array(ids, dtype=np.uint64)


def mixed_cells(count: int = 300) -> CellIdArray:
    """Cells of all S2 levels, poles and cube corners among them."""
    latitude, longitude = (np.concatenate(pair) for pair in zip(random_points(count), border_points(), strict=True))
    leaves = latlng_to_cell_id(latitude, longitude)
    return np.concatenate([cell_id_to_parent(leaves[level::31], level) for level in range(31)])


def test_cell_ids_equal_s2sphere_on_random_points() -> None:
    latitude, longitude = random_points(100_000)
    np.testing.assert_array_equal(latlng_to_cell_id(latitude, longitude), oracle_leaf_ids(latitude, longitude))


def test_cell_ids_equal_s2sphere_on_borders() -> None:
    latitude, longitude = border_points()
    np.testing.assert_array_equal(latlng_to_cell_id(latitude, longitude), oracle_leaf_ids(latitude, longitude))


@given(latitudes, longitudes, s2_levels)
def test_cell_ids_equal_s2sphere_at_every_s2_level(latitude: float, longitude: float, s2_level: int) -> None:
    expected = s2sphere.CellId.from_lat_lng(s2sphere.LatLng.from_degrees(latitude, longitude)).parent(s2_level)
    assert int(latlng_to_cell_id(latitude, longitude, s2_level)) == expected.id()


def test_cell_ids_do_not_depend_on_the_last_bits_of_numpy_sine_and_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    latitude, longitude = border_points()
    exact = s2._face_st
    rng = np.random.default_rng(2)

    def four_units_off(function: Callable[[Float64Array], Float64Array]) -> Callable[[Float64Array], Float64Array]:
        return lambda angle: function(angle) * (1.0 + rng.integers(-4, 5, angle.shape) * np.finfo(np.float64).eps)

    def inexact(
        lat: Float64Array,
        lng: Float64Array,
        sin: Callable[[Float64Array], Float64Array],
        cos: Callable[[Float64Array], Float64Array],
    ) -> tuple[Int64Array, Float64Array, Float64Array]:
        if sin is np.sin:
            sin, cos = four_units_off(sin), four_units_off(cos)
        return exact(lat, lng, sin, cos)

    face, s, t = inexact(latitude, longitude, np.sin, np.cos)
    assert (
        s2._face_ij_to_leaf(face, *np.minimum([s, t], 2.0**30 - 1).astype(np.int64))
        != oracle_leaf_ids(latitude, longitude)
    ).any()
    monkeypatch.setattr(s2, "_face_st", inexact)
    np.testing.assert_array_equal(latlng_to_cell_id(latitude, longitude), oracle_leaf_ids(latitude, longitude))


def test_one_cell_may_be_a_scalar() -> None:
    ids = token_to_cell_id(["89c25", "54"])
    for function in (cell_id_to_s2_level, cell_id_to_children, cell_id_to_outline, cell_id_to_area_km2):
        np.testing.assert_array_equal(function(ids[1]), function(ids)[1])
    assert cell_id_to_token(ids[1]) == ["54"]


def test_cell_ids_broadcast_and_keep_the_shape() -> None:
    grid = latlng_to_cell_id(np.array([[10.0], [20.0]]), np.array([1.0, 2.0, 3.0]), 12)
    assert grid.shape == (2, 3)
    assert grid[1, 2] == latlng_to_cell_id(20.0, 3.0, 12)
    assert latlng_to_cell_id([], []).shape == (0,)


def test_points_off_the_globe_are_refused_with_their_row() -> None:
    with pytest.raises(CoordinateOutOfRangeError, match=r"^row 1: "):
        latlng_to_cell_id([0.0, 90.5], [0.0, 0.0])


@pytest.mark.parametrize("s2_level", [-1, 31])
def test_s2_level_out_of_range_is_refused(s2_level: int) -> None:
    with pytest.raises(ValueError, match=f"S2 level {s2_level} does not exist"):
        latlng_to_cell_id(0.0, 0.0, s2_level)


@given(cells())
def test_s2_level_range_and_token_equal_s2sphere(cell: s2sphere.CellId) -> None:
    ids = np.array([cell.id()], dtype=np.uint64)
    first, last = cell_id_range(ids)
    assert int(cell_id_to_s2_level(ids)[0]) == cell.level()
    assert (int(first[0]), int(last[0])) == (cell.range_min().id(), cell.range_max().id())
    assert cell_id_to_token(ids) == [cell.to_token()]
    assert int(token_to_cell_id([cell.to_token().upper()])[0]) == cell.id()


@given(cells(), st.data())
def test_parents_equal_s2sphere(cell: s2sphere.CellId, data: st.DataObject) -> None:
    s2_level = data.draw(st.integers(0, cell.level()))
    assert int(cell_id_to_parent(np.uint64(cell.id()), s2_level)) == cell.parent(s2_level).id()


@given(cells(finest=29))
def test_children_equal_s2sphere_and_tile_their_parent(cell: s2sphere.CellId) -> None:
    children = cell_id_to_children(np.array([cell.id()], dtype=np.uint64))
    assert children.shape == (1, 4)
    assert children[0].tolist() == [child.id() for child in cell.children()]
    assert (cell_id_to_parent(children, cell.level()) == np.uint64(cell.id())).all()
    first, last = cell_id_range(children[0])
    assert (first[1:] == last[:-1] + np.uint64(2)).all()
    assert (int(first[0]), int(last[3])) == (cell.range_min().id(), cell.range_max().id())


def test_parent_finer_than_the_cell_is_refused() -> None:
    with pytest.raises(ValueError, match="cell 89c25 is of S2 level 8 and has no ancestor at S2 level 9"):
        cell_id_to_parent(token_to_cell_id(["89c25"]), 9)


def test_children_of_an_s2_leaf_are_refused() -> None:
    with pytest.raises(ValueError, match="S2 level 30 and has no children"):
        cell_id_to_children(latlng_to_cell_id([0.0], [0.0]))


@pytest.mark.parametrize("token", ["", "x", "0", "e", "c1", "2", "0x1", "1_1", " 1", "+1", "11111111111111111"])
def test_bad_tokens_are_refused_by_name(token: str) -> None:
    with pytest.raises(ValueError, match="token 1, '") as failure:
        token_to_cell_id(["89c25", token])
    assert repr(token) in str(failure.value)


def test_a_single_string_is_no_list_of_tokens() -> None:
    with pytest.raises(TypeError, match="put it in a list"):
        token_to_cell_id("89c25")


@pytest.mark.parametrize("bad_id", [0, 1 << 63 | 1 << 62 | 1, 2, 0x8000000000000000])
def test_invalid_ids_are_refused(bad_id: int) -> None:
    ids = np.array([1 << 60, bad_id], dtype=np.uint64)
    for function in (cell_id_to_s2_level, cell_id_range, cell_id_to_token, cell_id_to_center, cell_id_to_area_km2):
        with pytest.raises(ValueError, match=r"row 1: 0x[0-9a-f]{16} is not an S2 cell id"):
            function(ids)


def test_centers_equal_s2sphere() -> None:
    ids = mixed_cells()
    latitude, longitude = cell_id_to_center(ids)
    for row, cell_id in enumerate(ids.tolist()):
        center = s2sphere.CellId(cell_id).to_lat_lng()
        assert latitude[row] == pytest.approx(center.lat().degrees, abs=1e-13)
        assert longitude[row] == pytest.approx(center.lng().degrees, abs=1e-13)


@given(cells())
def test_the_center_lies_in_its_cell(cell: s2sphere.CellId) -> None:
    latitude, longitude = cell_id_to_center(np.uint64(cell.id()))
    assert int(latlng_to_cell_id(latitude, longitude, cell.level())) == cell.id()


def test_outlines_equal_s2sphere() -> None:
    ids = mixed_cells()
    corners = latlng_to_unit_vector(*np.moveaxis(cell_id_to_outline(ids), -1, 0))
    assert corners.shape == (len(ids), 4, 3)
    for row, cell_id in enumerate(ids.tolist()):
        cell = s2sphere.Cell(s2sphere.CellId(cell_id))
        for k in range(4):
            vertex = cell.get_vertex(k)
            np.testing.assert_allclose(corners[row, k], [vertex[axis] for axis in range(3)], rtol=0, atol=1e-15)


def test_outlines_run_counter_clockwise() -> None:
    ids = mixed_cells()
    ids = ids[cell_id_to_s2_level(ids) <= 20]
    corners = latlng_to_unit_vector(*np.moveaxis(cell_id_to_outline(ids), -1, 0))
    center = latlng_to_unit_vector(*cell_id_to_center(ids))
    for k in range(4):
        turn = np.cross(corners[:, k] - center, corners[:, (k + 1) % 4] - center)
        assert (np.einsum("nd,nd->n", turn, center) > 0).all()


def test_outlines_do_not_jump_across_the_antimeridian() -> None:
    latitude = np.linspace(-89.9, 89.9, 200)
    for longitude, side in ((-179.999, -1.0), (179.999, 1.0)):
        for s2_level in (1, 2, 5, 9):
            outline = cell_id_to_outline(latlng_to_cell_id(latitude, longitude, s2_level))
            assert (np.abs(outline[..., 1]) == 180.0).any()
            assert (outline[..., 1] * side >= 0.0).all()


def test_the_faces_cover_the_earth() -> None:
    areas = cell_id_to_area_km2(token_to_cell_id(FACE_TOKENS))
    np.testing.assert_allclose(areas, EARTH_AREA_KM2 / 6.0, rtol=1e-15)
    assert areas.sum() == pytest.approx(EARTH_AREA_KM2, rel=1e-15)


@given(cells(finest=29))
def test_areas_of_children_sum_to_their_parent(cell: s2sphere.CellId) -> None:
    ids = np.array([cell.id()], dtype=np.uint64)
    assert cell_id_to_area_km2(cell_id_to_children(ids)).sum() == pytest.approx(cell_id_to_area_km2(ids)[0], rel=4e-15)


def test_areas_equal_s2sphere() -> None:
    ids = mixed_cells()
    ids = ids[cell_id_to_s2_level(ids) <= 12]
    areas = cell_id_to_area_km2(ids)
    for row, cell_id in enumerate(ids.tolist()):
        expected = s2sphere.Cell(s2sphere.CellId(cell_id)).exact_area() * EARTH_RADIUS_KM**2
        assert areas[row] == pytest.approx(expected, rel=1e-6)


def test_areas_of_s2_leaves_are_those_of_flat_parallelograms() -> None:
    ids = latlng_to_cell_id(*random_points(200))
    face, i, j, _ = s2._face_ij_size(ids)
    # du/ds and dv/dt at the middle of the leaf, times the solid angle of a unit of the (u, v) plane there.
    middle_u, middle_v = (s2._st_to_uv((2 * lower + 1) / 2.0**31) for lower in (i, j))
    slope_u, slope_v = (
        (8.0 / 3.0) * np.where(lower >= 2**29, lower + 0.5, 2**30 - lower - 0.5) / 2.0**30 for lower in (i, j)
    )
    flat = slope_u * slope_v / 2.0**60 / (1.0 + middle_u**2 + middle_v**2) ** 1.5 * EARTH_RADIUS_KM**2
    assert set(face.tolist()) == set(range(6))
    np.testing.assert_allclose(cell_id_to_area_km2(ids), flat, rtol=1e-13)
