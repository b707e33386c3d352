from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from geosurge_training.data.blue_marble import BlueMarble


@pytest.fixture(autouse=True, scope="module")
def single_thread() -> Iterator[None]:
    """On models this small, threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def world() -> BlueMarble:
    """The Blue Marble as `support.recipes.write_recipe` asks for it; its maps take seconds to read."""
    return BlueMarble(32, seed=3, partition_samples=4000)
