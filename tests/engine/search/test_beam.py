from __future__ import annotations

import itertools
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.hierarchies import (
    DIMENSION,
    REUSED_DIRECTORY,
    Tree,
    Vectors,
    best_of,
    exact_oracle,
    hierarchical_data,
    inverted_file,
    recall,
    small_tree,
)

from geosurge.errors import BundleInconsistentError
from geosurge.search import HierarchicalIndex
from geosurge_training.building.indexing import write_level_indexes


def beam_oracle(vectors: Vectors, parents: Tree, embedding: NDArray[np.float32], width: int, k: int) -> list[int]:
    beam = np.arange(len(vectors[0]))
    for level, rows in enumerate(vectors):
        candidates = beam if level == 0 else np.flatnonzero(np.isin(parents[level], beam))
        scores = rows[candidates].astype(np.float64) @ embedding.astype(np.float64)
        beam = candidates[best_of(scores, candidates, k if level == len(vectors) - 1 else width)]
    return beam.tolist()


@REUSED_DIRECTORY
@given(
    counts=st.lists(st.integers(1, 25), min_size=1, max_size=5),
    width=st.integers(1, 12),
    k=st.integers(1, 30),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_narrow_beam_is_the_textbook_beam_on_any_tree(
    directory: Path, counts: list[int], width: int, k: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    vectors = [rng.standard_normal((n, DIMENSION)).astype(np.float32) for n in counts]
    # Cells without children are allowed: a beam may run dry.
    parents = [np.full(counts[0], -1)] + [
        np.sort(rng.integers(0, above, here)) for above, here in itertools.pairwise(counts)
    ]
    embeddings = rng.standard_normal((4, DIMENSION)).astype(np.float32)
    with HierarchicalIndex.open(write_level_indexes(directory, vectors, parents)) as index:
        hits = index.search(embeddings, width=width, k=k)
    assert hits.ordinals.shape[1] <= min(k, counts[-1])
    for embedding, ordinals, scores in zip(embeddings, hits.ordinals, hits.scores, strict=True):
        found = ordinals[ordinals >= 0]
        assert found.tolist() == beam_oracle(vectors, parents, embedding, width, k)
        np.testing.assert_allclose(scores[: len(found)], vectors[-1][found] @ embedding, rtol=1e-5, atol=1e-5)
        assert (ordinals[len(found) :] == -1).all()
        assert (scores[len(found) :] == -np.inf).all()


@pytest.mark.parametrize("storage", ["fp32", "fp16", "sq8"])
def test_recall_on_hard_hierarchical_queries(directory: Path, storage: str) -> None:
    rng = np.random.default_rng(12)
    composites, parents, embeddings, truth = hierarchical_data((40, 100, 250, 600, 1500), 300, 1.4, rng)
    reference = exact_oracle(composites[-1], embeddings, 10)
    with HierarchicalIndex.open(write_level_indexes(directory, composites, parents, storage)) as index:
        beam = index.search(embeddings, width=32, k=10)
        narrow = index.search(embeddings, width=1, k=10)
    # The queries are a test: the exact search itself misses the true leaf of some.
    assert 0.5 < (reference.ordinals[:, 0] == truth).mean() < 0.95
    assert (beam.ordinals[:, 0] == reference.ordinals[:, 0]).mean() > 0.97
    assert recall(beam, reference) > 0.95
    assert recall(narrow, reference) < recall(beam, reference)


def test_a_chain_of_only_children(directory: Path) -> None:
    vectors = [np.full((1, DIMENSION), level, np.float32) for level in range(7)]
    with HierarchicalIndex.open(
        write_level_indexes(directory, vectors, [np.array([-1])] + [np.array([0])] * 6)
    ) as index:
        hits = index.search(np.ones((2, DIMENSION), np.float32), width=32, k=10)
    assert hits.ordinals.tolist() == [[0], [0]]
    assert hits.scores.tolist() == [[48.0], [48.0]]


def test_a_beam_returns_every_child_of_the_cells_it_kept(small: HierarchicalIndex) -> None:
    embedding = np.ones((1, DIMENSION), np.float32)
    hits = small.search(embedding, width=2, k=1024)
    assert hits.ordinals.shape == (1, 4)
    assert len({leaf // 2 for leaf in hits.ordinals[0].tolist()}) == 2
    assert small.search(embedding, width=2, k=3).ordinals.tolist() == [hits.ordinals[0, :3].tolist()]


@pytest.mark.parametrize("level", [2, 3])
def test_a_search_that_meets_an_id_out_of_range_names_the_file(directory: Path, level: int) -> None:
    vectors, parents = small_tree()
    paths = write_level_indexes(directory, vectors, parents)
    ids = np.arange(len(vectors[level - 1]))
    ids[-1] = 77
    wrong = inverted_file(vectors[level - 1], parents[level - 1], len(vectors[level - 2]), ids=ids)
    faiss.write_index(wrong, str(paths[level - 1]))
    with (
        HierarchicalIndex.open(paths) as index,
        pytest.raises(BundleInconsistentError, match=f"level-{level}.faiss: holds the id 77, but level {level} has"),
    ):
        index.search(np.ones((3, DIMENSION), np.float32), width=9, k=9)
