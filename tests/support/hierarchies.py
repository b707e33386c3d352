"""Small hierarchies of vectors, and textbook answers to compare a search with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeAlias

import faiss
import numpy as np
from hypothesis import HealthCheck, settings
from numpy.typing import NDArray

from geosurge.search import LeafHits
from geosurge_training.building.indexing import composite_embeddings

Tree: TypeAlias = list[NDArray[np.int64]]


Vectors: TypeAlias = list[NDArray[np.float32]]


DIMENSION = 8


def random_tree(counts: Sequence[int], rng: np.random.Generator) -> Tree:
    """Parents of each level; every cell of a level but the last has at least one child where the counts allow it."""
    parents = [np.full(counts[0], -1, np.int64)]
    for above, here in itertools.pairwise(counts):
        first = np.arange(min(above, here))
        parents.append(np.sort(np.r_[first, rng.integers(0, above, here - len(first))]).astype(np.int64))
    return parents


def dyadic_vectors(counts: Sequence[int], rng: np.random.Generator) -> Vectors:
    """Few small integers: every float32 sum of products is exact, and ties abound."""
    return [rng.integers(-2, 3, (n, DIMENSION)).astype(np.float32) for n in counts]


def hierarchical_data(
    counts: Sequence[int], queries: int, noise: float, rng: np.random.Generator
) -> tuple[Vectors, Tree, NDArray[np.float32], NDArray[np.int64]]:
    """Composites of unit vectors near their parents', and noisy copies of some leaves with their ordinals."""
    dimension = 64
    parents = random_tree(counts, rng)
    geographic: Vectors = []
    for level, n in enumerate(counts):
        rows = rng.standard_normal((n, dimension)) / np.sqrt(dimension)
        if level > 0:
            rows = geographic[-1][parents[level]] + 0.7 * rows
        geographic.append((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))
    truth = rng.integers(0, counts[-1], queries)
    embeddings = geographic[-1][truth] + noise * rng.standard_normal((queries, dimension)) / np.sqrt(dimension)
    embeddings = (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype(np.float32)
    return composite_embeddings(geographic, [0.07] * len(counts), parents), parents, embeddings, truth


def best_of(scores: NDArray[np.floating], ordinals: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    return np.array(sorted(range(len(ordinals)), key=lambda i: (-scores[i], ordinals[i]))[:k], dtype=np.int64)


def exact_oracle(
    leaves: NDArray[np.float32], embeddings: NDArray[np.float32], k: int, allowed: NDArray[np.int64] | None = None
) -> LeafHits:
    candidates = np.arange(len(leaves)) if allowed is None else allowed
    hits = min(k, len(candidates))
    ordinals = np.empty((len(embeddings), hits), np.int64)
    scores = np.empty((len(embeddings), hits), np.float32)
    for row, embedding in enumerate(embeddings.astype(np.float64)):
        similarities = leaves[candidates].astype(np.float64) @ embedding
        best = best_of(similarities, candidates, k)
        ordinals[row], scores[row] = candidates[best], similarities[best]
    return LeafHits(ordinals, scores)


REUSED_DIRECTORY = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def small_tree() -> tuple[Vectors, Tree]:
    rng = np.random.default_rng(21)
    counts = (2, 3, 4)
    return dyadic_vectors(counts, rng), [np.full(2, -1), np.array([0, 0, 1]), np.array([0, 1, 2, 2])]


def inverted_file(
    vectors: NDArray[np.float32],
    lists: NDArray[np.int64],
    list_count: int,
    *,
    ids: NDArray[np.int64] | None = None,
    metric: int = faiss.METRIC_INNER_PRODUCT,
    by_residual: bool = False,
) -> faiss.Index:
    """An inverted file made of the parts given, sound or not."""
    quantizer = faiss.IndexFlat(vectors.shape[1], metric)
    if by_residual:
        quantizer.add(np.zeros((list_count, vectors.shape[1]), np.float32))
        index = faiss.IndexIVFScalarQuantizer(
            quantizer, vectors.shape[1], list_count, faiss.ScalarQuantizer.QT_fp16, metric, True
        )
    else:
        index = faiss.IndexIVFFlat(quantizer, vectors.shape[1], list_count, metric)
    index.is_trained = True
    ids = np.arange(len(vectors)) if ids is None else ids
    index.add_core(len(vectors), faiss.swig_ptr(vectors), faiss.swig_ptr(ids), faiss.swig_ptr(lists))
    return index


def recall(found: LeafHits, expected: LeafHits) -> float:
    pairs = zip(found.ordinals.tolist(), expected.ordinals.tolist(), strict=True)
    return sum(len(set(a) & set(b)) for a, b in pairs) / expected.ordinals.size
