from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.hierarchies import dyadic_vectors

from geosurge.search import HierarchicalIndex
from geosurge_training.building.indexing import write_level_indexes


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("index")


@pytest.fixture
def small(directory: Path) -> Iterator[HierarchicalIndex]:
    """Levels of 3, 6 and 12 cells, two children each."""
    counts = (3, 6, 12)
    parents = [np.full(3, -1), np.repeat(np.arange(3), 2), np.repeat(np.arange(6), 2)]
    vectors = dyadic_vectors(counts, np.random.default_rng(5))
    with HierarchicalIndex.open(write_level_indexes(directory, vectors, parents)) as index:
        yield index
