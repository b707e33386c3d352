from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.hierarchies import DIMENSION, REUSED_DIRECTORY, dyadic_vectors, exact_oracle

from geosurge.search import HierarchicalIndex, exact
from geosurge_training.building.indexing import write_level_indexes


@REUSED_DIRECTORY
@given(
    leaf_count=st.integers(1, 40),
    bounds=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=5),
    k=st.integers(1, 45),
    block=st.integers(1, 50),
    seed=st.integers(0, 2**32 - 1),
)
def test_exact_on_leaf_ranges_scores_those_leaves_only(
    directory: Path, leaf_count: int, bounds: list[tuple[int, int]], k: int, block: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    vectors = dyadic_vectors((leaf_count,), rng)
    embeddings = rng.integers(-2, 3, (3, DIMENSION)).astype(np.float32)
    ranges = [(min(leaf_count, *pair), min(leaf_count, max(pair))) for pair in bounds]
    allowed = np.flatnonzero([any(a <= leaf < b for a, b in ranges) for leaf in range(leaf_count)])
    expected = exact_oracle(vectors[0], embeddings, k, allowed)
    paths = write_level_indexes(directory, vectors, [np.full(leaf_count, -1)])
    with HierarchicalIndex.open(paths) as index, pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "_LEAF_BLOCK", block)
        patch.setattr(exact, "_QUERY_BLOCK", 2)
        hits = index.exact(embeddings, k=k, leaf_ranges=ranges)
    assert hits.ordinals.shape == (3, min(k, len(allowed)))
    np.testing.assert_array_equal(hits.ordinals, expected.ordinals)
    np.testing.assert_array_equal(hits.scores, expected.scores)


def test_released_leaves_are_decoded_again(small: HierarchicalIndex) -> None:
    embeddings = np.ones((2, DIMENSION), np.float32)
    before = small.exact(embeddings, k=3)
    small.release_leaves()
    after = small.exact(embeddings, k=3)
    np.testing.assert_array_equal(after.ordinals, before.ordinals)
    np.testing.assert_array_equal(after.scores, before.scores)


def test_all_leaves_of_many_blocks_are_sorted_once(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    vectors = dyadic_vectors((200,), rng)
    embeddings = rng.integers(-2, 3, (3, DIMENSION)).astype(np.float32)
    sorted_columns = []

    def count_columns(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        sorted_columns.append(scores.shape[1])
        return top_columns(scores, k)

    top_columns = exact._top_columns
    monkeypatch.setattr(exact, "_LEAF_BLOCK", 10)
    monkeypatch.setattr(exact, "_top_columns", count_columns)
    with HierarchicalIndex.open(write_level_indexes(directory, vectors, [np.full(200, -1)])) as index:
        hits = index.exact(embeddings, k=200)
    np.testing.assert_array_equal(hits.ordinals, exact_oracle(vectors[0], embeddings, 200, np.arange(200)).ordinals)
    assert sorted_columns == [200]
