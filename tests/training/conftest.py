from __future__ import annotations

import pytest

from geosurge_training.blue_marble import BlueMarble


@pytest.fixture(scope="session")
def world() -> BlueMarble:
    """The Blue Marble as `support.recipes.write_recipe` asks for it; its maps take seconds to read."""
    return BlueMarble(32, seed=3, partition_samples=4000)
