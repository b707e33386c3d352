from __future__ import annotations

import numpy as np
import pytest

from geosurge_training.data.spots import cut_between_spots, order_by_spot, spots_of


def test_a_spot_is_a_hundredth_of_a_degree_and_the_antimeridian_divides_none() -> None:
    latitude_deg = np.array([47.0, 47.004, 47.006, -47.0, 47.0, 47.0])
    longitude_deg = np.array([8.0, 8.004, 8.0, 8.0, 180.0, -179.998])
    one, near, north, south, west, east = spots_of(latitude_deg, longitude_deg).tolist()
    assert one == near
    assert west == east
    assert len({one, north, south, west}) == 4


def test_the_order_is_random_and_keeps_spots_together() -> None:
    latitude_deg, longitude_deg = np.repeat(np.arange(40.0), 5), np.zeros(200)
    order = order_by_spot(latitude_deg, longitude_deg, np.random.default_rng(1))
    assert sorted(order.tolist()) == list(range(200))
    spots = latitude_deg[order].reshape(40, 5)
    assert (spots == spots[:, :1]).all()
    assert abs(np.corrcoef(spots[:, 0], np.arange(40))[0, 1]) < 0.5
    assert not np.array_equal(order % 5, np.tile(np.arange(5), 40))
    assert np.array_equal(order, order_by_spot(latitude_deg, longitude_deg, np.random.default_rng(1)))
    assert len(order_by_spot(np.empty(0), np.empty(0), np.random.default_rng(1))) == 0


@pytest.mark.parametrize(
    ("sizes", "near", "cut"),
    [([1] * 30, 20, 20), ([18, 5, 7], 20, 18), ([15, 7, 8], 20, 22), ([30], 20, 20), ([2, 28], 20, 20)],
)
def test_a_cut_divides_no_spot_unless_one_holds_nearly_everything(sizes: list[int], near: int, cut: int) -> None:
    latitude_deg = np.repeat(np.arange(float(len(sizes))), sizes)
    assert cut_between_spots(latitude_deg, np.zeros(30), near) == cut
