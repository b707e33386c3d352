from __future__ import annotations

import h3
import numpy as np
import pytest

from geosurge.errors import CoordinateOutOfRangeError
from geosurge.hexagons import (
    h3_id_range,
    h3_id_to_area_km2,
    h3_id_to_children,
    h3_id_to_outline,
    h3_id_to_parent,
    h3_id_to_resolution,
    h3_id_to_token,
    latlng_to_h3_id,
    token_to_h3_id,
)


@pytest.fixture(scope="module")
def points() -> tuple[np.ndarray, np.ndarray]:
    """Coordinates all over the Earth, and the awkward ones: poles, antimeridian, pentagons."""
    rng = np.random.default_rng(8)
    latitude = np.degrees(np.arcsin(rng.uniform(-1, 1, 400)))
    longitude = rng.uniform(-180, 180, 400)
    pentagons = np.array([h3.cell_to_latlng(cell) for cell in h3.get_pentagons(3)])
    special = np.array([(90.0, 0.0), (90.0, 120.0), (-90.0, -77.0), (12.0, 180.0), (12.0, -180.0), (0.0, 0.0)])
    latitudes = np.concatenate([latitude, pentagons[:, 0], pentagons[:, 0] + 0.3, special[:, 0]])
    return latitudes, np.concatenate([longitude, pentagons[:, 1], pentagons[:, 1], special[:, 1]])


@pytest.mark.parametrize("resolution", [0, 1, 4, 9, 14, 15])
def test_cells_of_coordinates_are_the_ancestors_of_h3s_finest(
    points: tuple[np.ndarray, np.ndarray], resolution: int
) -> None:
    ids = latlng_to_h3_id(*points, resolution)
    expected = [
        h3.cell_to_parent(h3.latlng_to_cell(latitude, longitude, 15), resolution)
        for latitude, longitude in zip(*points, strict=True)
    ]
    assert h3_id_to_token(ids) == expected
    assert h3_id_to_resolution(ids).tolist() == [resolution] * len(expected)
    assert token_to_h3_id(expected).tolist() == ids.tolist()


def test_the_ways_to_write_a_coordinate_at_a_pole_or_the_antimeridian_agree() -> None:
    assert len(set(latlng_to_h3_id([90.0] * 3, [-180.0, 0.0, 77.0], 12).tolist())) == 1
    assert len(set(latlng_to_h3_id([12.0] * 2, [-180.0, 180.0], 12).tolist())) == 1


def test_families_are_h3s(points: tuple[np.ndarray, np.ndarray]) -> None:
    for resolution in (0, 3, 8):
        ids = np.unique(latlng_to_h3_id(*points, resolution))
        children = h3_id_to_children(ids)
        assert (np.diff(children.astype(np.int64), axis=1) > 0).all()
        for token, row in zip(h3_id_to_token(ids), children, strict=True):
            own = set(h3.cell_to_children(token))
            # The second child of a pentagon is no cell; every other number is.
            names = [f"{int(token_id) | 1 << 59 | (resolution + 1) << 52:x}" for token_id in row]
            assert own == {name for name in names if h3.is_valid_cell(name)}
            assert len(own) == (6 if h3.is_pentagon(token) else 7)
        assert (h3_id_to_parent(children, resolution) == ids[:, None]).all()


def test_everything_inside_a_cell_is_one_range_of_ids_that_no_other_cell_has(
    points: tuple[np.ndarray, np.ndarray],
) -> None:
    finest = latlng_to_h3_id(*points)
    cells = np.unique(latlng_to_h3_id(*points, 2))
    first, last = h3_id_range(cells)
    assert (first[1:] > last[:-1]).all()
    inside = (finest[:, None] >= first) & (finest[:, None] <= last)
    assert (inside.sum(axis=1) == 1).all()
    assert (h3_id_to_parent(finest, 2) == cells[inside.argmax(axis=1)]).all()
    assert h3_id_range(finest)[0].tolist() == finest.tolist()


def test_areas_and_outlines_are_h3s(points: tuple[np.ndarray, np.ndarray]) -> None:
    ids = np.unique(latlng_to_h3_id(*points, 3))
    tokens = h3_id_to_token(ids)
    # H3 measures on a sphere of 6371.0072 km.
    np.testing.assert_allclose(h3_id_to_area_km2(ids), [h3.cell_area(token) for token in tokens], rtol=1e-6)
    for token, outline in zip(tokens, h3_id_to_outline(ids), strict=True):
        assert outline.tolist() == [list(corner) for corner in h3.cell_to_boundary(token)]
    assert sum(h3_id_to_area_km2(token_to_h3_id(h3.get_res0_cells()))) == pytest.approx(4 * np.pi * 6371.0088**2)


@pytest.mark.parametrize(
    "token", ["", "8001fffffffffff0", "0x8001fffffffff", "8f1fb46622d8565x", "89c25", "ffffffffffff"]
)
def test_what_is_no_h3_cell_is_refused(token: str) -> None:
    with pytest.raises(ValueError, match="is not an H3 cell"):
        token_to_h3_id([token])


def test_what_has_no_parent_or_child_is_refused() -> None:
    (cell,) = latlng_to_h3_id([1.0], [2.0])
    with pytest.raises(ValueError, match="has no children"):
        h3_id_to_children([cell])
    with pytest.raises(ValueError, match="resolution is 16"):
        h3_id_to_parent([cell], 16)
    with pytest.raises(CoordinateOutOfRangeError):
        latlng_to_h3_id([91.0], [0.0])
