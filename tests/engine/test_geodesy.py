from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import s2sphere
from hypothesis import given
from hypothesis import strategies as st

from geosurge import geodesy
from geosurge.errors import CoordinateOutOfRangeError
from geosurge.geodesy import (
    EARTH_RADIUS_KM,
    CellIdArray,
    Float64Array,
    cell_id_range,
    cell_id_to_area_km2,
    cell_id_to_center,
    cell_id_to_children,
    cell_id_to_outline,
    cell_id_to_parent,
    cell_id_to_s2_level,
    cell_id_to_token,
    great_circle_km,
    latlng_to_cell_id,
    latlng_to_unit_vector,
    spherical_mean,
    token_to_cell_id,
    unit_vector_to_latlng,
    validate_coordinates,
)

EARTH_AREA_KM2 = 4.0 * math.pi * EARTH_RADIUS_KM**2
CORNER_LATITUDE = math.degrees(math.atan(1.0 / math.sqrt(2.0)))
FACE_TOKENS = ["1", "3", "5", "7", "9", "b"]

latitudes = st.floats(-90.0, 90.0)
longitudes = st.floats(-180.0, 180.0)
s2_levels = st.integers(0, 30)


@st.composite
def cells(draw: st.DrawFn, finest: int = 30) -> s2sphere.CellId:
    point = s2sphere.LatLng.from_degrees(draw(latitudes), draw(longitudes))
    return s2sphere.CellId.from_lat_lng(point).parent(draw(st.integers(0, finest)))


def random_points(count: int, seed: int = 0) -> tuple[Float64Array, Float64Array]:
    rng = np.random.default_rng(seed)
    return np.degrees(np.arcsin(rng.uniform(-1.0, 1.0, count))), rng.uniform(-180.0, 180.0, count)


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


def oracle_point(latitude_deg: float, longitude_deg: float) -> s2sphere.Point:
    return s2sphere.LatLng.from_degrees(latitude_deg, longitude_deg).to_point()


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
    exact = geodesy._face_st
    rng = np.random.default_rng(2)

    def four_units_off(function: Callable[[Float64Array], Float64Array]) -> Callable[[Float64Array], Float64Array]:
        return lambda angle: function(angle) * (1.0 + rng.integers(-4, 5, angle.shape) * np.finfo(np.float64).eps)

    def inexact(
        lat: Float64Array,
        lng: Float64Array,
        sin: Callable[[Float64Array], Float64Array],
        cos: Callable[[Float64Array], Float64Array],
    ) -> tuple[geodesy.Int64Array, Float64Array, Float64Array]:
        if sin is np.sin:
            sin, cos = four_units_off(sin), four_units_off(cos)
        return exact(lat, lng, sin, cos)

    face, s, t = inexact(latitude, longitude, np.sin, np.cos)
    assert (
        geodesy._face_ij_to_leaf(face, *np.minimum([s, t], 2.0**30 - 1).astype(np.int64))
        != oracle_leaf_ids(latitude, longitude)
    ).any()
    monkeypatch.setattr(geodesy, "_face_st", inexact)
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


@pytest.mark.parametrize("s2_level", [-1, 31])
def test_s2_level_out_of_range_is_refused(s2_level: int) -> None:
    with pytest.raises(ValueError, match=f"S2 level {s2_level} does not exist"):
        latlng_to_cell_id(0.0, 0.0, s2_level)


@pytest.mark.parametrize(
    ("latitude", "longitude"),
    [(math.nan, 0.0), (0.0, math.nan), (math.inf, 0.0), (90.0001, 0.0), (-91.0, 0.0), (0.0, 180.5), (0.0, 359.0)],
)
def test_bad_coordinates_are_refused_with_their_row(latitude: float, longitude: float) -> None:
    rows = np.array([[0.0, 0.0], [latitude, longitude], [math.nan, math.nan]])
    for function in (validate_coordinates, latlng_to_cell_id, spherical_mean):
        with pytest.raises(CoordinateOutOfRangeError, match=r"^row 1: "):
            function(rows[:, 0], rows[:, 1])


def test_coordinates_on_the_limits_are_accepted() -> None:
    validate_coordinates([90.0, -90.0, 0.0, 0.0], [0.0, 0.0, 180.0, -180.0])
    validate_coordinates([], [])


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
    face, i, j, _ = geodesy._face_ij_size(ids)
    # du/ds and dv/dt at the middle of the leaf, times the solid angle of a unit of the (u, v) plane there.
    middle_u, middle_v = (geodesy._st_to_uv((2 * lower + 1) / 2.0**31) for lower in (i, j))
    slope_u, slope_v = (
        (8.0 / 3.0) * np.where(lower >= 2**29, lower + 0.5, 2**30 - lower - 0.5) / 2.0**30 for lower in (i, j)
    )
    flat = slope_u * slope_v / 2.0**60 / (1.0 + middle_u**2 + middle_v**2) ** 1.5 * EARTH_RADIUS_KM**2
    assert set(face.tolist()) == set(range(6))
    np.testing.assert_allclose(cell_id_to_area_km2(ids), flat, rtol=1e-13)


@pytest.mark.parametrize(
    ("first", "second", "kilometres"),
    [
        ((0.0, 0.0), (0.0, 1.0), EARTH_RADIUS_KM * math.pi / 180.0),
        ((90.0, 0.0), (-90.0, 77.0), EARTH_RADIUS_KM * math.pi),
        ((0.0, 179.5), (0.0, -179.5), EARTH_RADIUS_KM * math.pi / 180.0),
        ((0.0, 0.0), (0.0, 180.0), EARTH_RADIUS_KM * math.pi),
        ((33.0, -70.0), (-33.0, 110.0), EARTH_RADIUS_KM * math.pi),
        ((45.0, 0.0), (45.0, 180.0), EARTH_RADIUS_KM * math.pi / 2.0),
        # Paris to New York, and London to Sydney.
        ((48.8566, 2.3522), (40.7128, -74.006), 5837.0),
        ((51.5074, -0.1278), (-33.8688, 151.2093), 16994.0),
    ],
)
def test_known_distances(first: tuple[float, float], second: tuple[float, float], kilometres: float) -> None:
    tolerance = 1.0 if kilometres == round(kilometres) else 1e-9
    assert float(great_circle_km(*first, *second)) == pytest.approx(kilometres, abs=tolerance)


@given(latitudes, longitudes, latitudes, longitudes)
def test_distances_equal_s2sphere(lat: float, lng: float, other_lat: float, other_lng: float) -> None:
    angle = oracle_point(lat, lng).angle(oracle_point(other_lat, other_lng))
    assert float(great_circle_km(lat, lng, other_lat, other_lng)) == pytest.approx(angle * EARTH_RADIUS_KM, abs=1e-8)


@given(latitudes, longitudes, latitudes, longitudes, latitudes, longitudes)
def test_distance_is_a_metric(a: float, b: float, c: float, d: float, e: float, f: float) -> None:
    there, back = great_circle_km(a, b, c, d), great_circle_km(c, d, a, b)
    assert there == pytest.approx(back, abs=1e-12)
    assert great_circle_km(a, b, a, b) == 0.0
    assert there <= great_circle_km(a, b, e, f) + great_circle_km(e, f, c, d) + 1e-9


@given(latitudes, longitudes, latitudes, longitudes)
def test_distances_to_a_point_and_its_antipode_sum_to_half_the_circumference(
    lat: float, lng: float, other_lat: float, other_lng: float
) -> None:
    antipode = (-lat, lng - 180.0 if lng > 0 else lng + 180.0)
    total = great_circle_km(lat, lng, other_lat, other_lng) + great_circle_km(*antipode, other_lat, other_lng)
    assert total == pytest.approx(math.pi * EARTH_RADIUS_KM, rel=1e-14)


@pytest.mark.parametrize("step_deg", [1e-3, 1e-6, 1e-9, 1e-12])
def test_distances_keep_their_digits_near_a_point_and_near_its_antipode(step_deg: float) -> None:
    step_km = math.radians(step_deg) * EARTH_RADIUS_KM
    assert float(great_circle_km(0.0, 0.0, step_deg, 0.0)) == pytest.approx(step_km, rel=1e-14, abs=0)
    from_antipode = math.pi * EARTH_RADIUS_KM - float(great_circle_km(0.0, 0.0, step_deg, 180.0))
    assert from_antipode == pytest.approx(step_km, abs=1e-11)


def test_both_names_of_an_antimeridian_point_are_the_same_point() -> None:
    assert float(great_circle_km(12.3, 180.0, 12.3, -180.0)) == 0.0


def test_distances_broadcast() -> None:
    latitude, longitude = random_points(6)
    table = great_circle_km(latitude[:, None], longitude[:, None], latitude, longitude)
    assert table.shape == (6, 6)
    assert table[2, 5] == great_circle_km(latitude[2], longitude[2], latitude[5], longitude[5])


@given(latitudes, longitudes)
def test_unit_vectors_round_trip(latitude: float, longitude: float) -> None:
    vector = latlng_to_unit_vector(latitude, longitude)
    point = oracle_point(latitude, longitude)
    np.testing.assert_allclose(vector, [point[axis] for axis in range(3)], rtol=0, atol=3e-16)
    assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-15)
    assert great_circle_km(*unit_vector_to_latlng(3.0 * vector), latitude, longitude) == pytest.approx(0.0, abs=1e-8)


def test_unit_vectors_point_where_the_docstring_says() -> None:
    vectors = latlng_to_unit_vector([0.0, 0.0, 90.0], [0.0, 90.0, 0.0])
    np.testing.assert_allclose(vectors, np.eye(3), atol=1e-16)


def test_the_mean_crosses_the_antimeridian_and_the_pole() -> None:
    assert abs(spherical_mean([10.0, 10.0], [179.0, -179.0])[1]) == pytest.approx(180.0)
    latitude, _ = spherical_mean([80.0, 80.0, 80.0, 80.0], [0.0, 90.0, 180.0, -90.0])
    assert latitude == pytest.approx(90.0)


@given(st.lists(st.tuples(st.floats(-40.0, 40.0), st.floats(100.0, 160.0)), min_size=1, max_size=8))
def test_the_mean_minimises_the_sum_of_squared_chords(points: list[tuple[float, float]]) -> None:
    rows = np.array(points)
    mean = latlng_to_unit_vector(*spherical_mean(rows[:, 0], rows[:, 1]))
    vectors = latlng_to_unit_vector(rows[:, 0], rows[:, 1])
    others = latlng_to_unit_vector(*random_points(50))
    assert np.square(vectors - mean).sum() <= np.square(vectors - others[:, None]).sum(axis=(1, 2)).min() + 1e-12


def test_weights_count_as_repeated_points() -> None:
    latitude, longitude = [10.0, 20.0, -5.0], [30.0, 50.0, 70.0]
    weighted = spherical_mean(latitude, longitude, [2, 0, 3])
    repeated = spherical_mean([10.0, 10.0, -5.0, -5.0, -5.0], [30.0, 30.0, 70.0, 70.0, 70.0])
    assert weighted == pytest.approx(repeated)


@pytest.mark.parametrize(
    ("latitude", "longitude", "weights", "message"),
    [
        ([], [], None, "no points"),
        ([90.0, -90.0], [0.0, 0.0], None, "balance"),
        ([0.0, 0.0, 0.0], [0.0, 120.0, -120.0], None, "balance"),
        ([0.0, 1.0], [0.0, 1.0], [0.0, 0.0], "positive"),
        ([0.0, 1.0], [0.0, 1.0], [2.0, -1.0], "negative"),
        ([0.0, 1.0], [0.0, 1.0], [1.0, math.nan], "finite"),
        ([0.0, 1.0], [0.0, 1.0], [1.0], "1 weights for 2 points"),
    ],
)
def test_undefined_means_are_refused(
    latitude: list[float], longitude: list[float], weights: list[float] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        spherical_mean(latitude, longitude, weights)
