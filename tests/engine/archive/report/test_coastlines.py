from __future__ import annotations

import gzip

import numpy as np
import pytest
from matplotlib.path import Path as Outline
from numpy.typing import NDArray

from geosurge.archive.report.coastlines import read_coastlines
from geosurge.basemap import basemap_folder


@pytest.fixture(scope="module")
def rings() -> list[NDArray[np.float64]]:
    return read_coastlines()


def on_land(rings: list[NDArray[np.float64]], points: NDArray[np.float64]) -> NDArray[np.bool_]:
    inside = np.zeros(len(points), int)
    for ring in rings:
        inside += Outline(ring).contains_points(points)
    return np.asarray(inside % 2 == 1)


def test_rings_are_closed_and_on_the_globe(rings: list[NDArray[np.float64]]) -> None:
    for ring in rings:
        assert np.array_equal(ring[0], ring[-1])
        assert (np.abs(ring) <= [90.0, 180.0]).all()


def test_continents_are_land_and_oceans_and_lakes_are_not(rings: list[NDArray[np.float64]]) -> None:
    land = np.array([(48.9, 2.4), (66.5, -172.0), (-44.0, 170.5), (-85.0, 100.0), (-85.0, -100.0), (-25.0, 135.0)])
    water = np.array([(0.0, -30.0), (-1.0, 33.0), (42.0, 51.0), (-40.0, -179.9), (89.0, 0.0), (44.0, -87.0)])
    assert on_land(rings, land).all()
    assert not on_land(rings, water).any()


def test_the_outline_agrees_with_a_mask_of_the_land(rings: list[NDArray[np.float64]]) -> None:
    folder = basemap_folder()
    mask = np.frombuffer(gzip.decompress((folder / "lsmask_5min_i.bin").read_bytes()), np.uint8).reshape(2160, 4320)
    random = np.random.default_rng(7)
    points = np.stack([random.uniform(-89.0, 89.0, 2000), random.uniform(-180.0, 180.0, 2000)], axis=-1)
    rows, columns = ((points + np.array([90.0, 180.0])) * 12.0).astype(int).T
    # They differ in small lakes and along shores only.
    assert (on_land(rings, points) == (mask[rows, columns] == 1)).mean() > 0.97
