from __future__ import annotations

import numpy as np
import pytest

from geosurge.grids import GRIDS, Grid, containing


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_the_containing_cell_is_the_one_that_is_an_ancestor(grid: Grid) -> None:
    rng = np.random.default_rng(2)
    latitude, longitude = np.degrees(np.arcsin(rng.uniform(-1, 1, 500))), rng.uniform(-180, 180, 500)
    finest = grid.latlng_to_id(latitude, longitude, grid.max_resolution)
    coarse = np.unique(grid.id_to_parent(finest[:100], 2))
    divided, kept = coarse[::2], coarse[1::2]
    cells = np.sort(np.concatenate([kept, np.unique(grid.id_to_parent(finest[:100], 3))]))
    cells = cells[~((grid.id_to_resolution(cells) == 3) & ~np.isin(grid.id_to_parent(cells, 2), divided))]
    rows = containing(grid, cells, finest)
    assert 0 < (rows < 0).sum() < len(rows)
    for point, row in zip(finest, rows.tolist(), strict=True):
        ancestors = {int(grid.id_to_parent(point, resolution)) for resolution in (2, 3)}
        holding = [number for number, cell in enumerate(cells.tolist()) if cell in ancestors]
        assert holding == ([row] if row >= 0 else [])


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_no_cells_contain_nothing(grid: Grid) -> None:
    points = grid.latlng_to_id([1.0, 2.0], [3.0, 4.0], grid.max_resolution)
    assert containing(grid, np.zeros(0, np.uint64), points).tolist() == [-1, -1]
