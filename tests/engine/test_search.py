from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import faiss
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from geosurge import search
from geosurge.errors import (
    BundleCorruptError,
    BundleInconsistentError,
    BundlePartialError,
    EmbeddingInvalidError,
    GeoSurgeError,
    OptionOutOfRangeError,
    UsageError,
)
from geosurge.search import HierarchicalIndex, LeafHits
from geosurge_training.indexing import composite_embeddings, write_level_indexes

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


def beam_oracle(vectors: Vectors, parents: Tree, embedding: NDArray[np.float32], width: int, k: int) -> list[int]:
    beam = np.arange(len(vectors[0]))
    for level, rows in enumerate(vectors):
        candidates = beam if level == 0 else np.flatnonzero(np.isin(parents[level], beam))
        scores = rows[candidates].astype(np.float64) @ embedding.astype(np.float64)
        beam = candidates[best_of(scores, candidates, k if level == len(vectors) - 1 else width)]
    return beam.tolist()


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


REUSED_DIRECTORY = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@REUSED_DIRECTORY
@given(
    growth=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    queries=st.integers(0, 5),
    k=st.integers(1, 60),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_beam_at_full_width_is_the_exact_search(
    directory: Path, growth: list[int], queries: int, k: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    counts = np.cumsum([1, *growth]).tolist()
    vectors, parents = dyadic_vectors(counts, rng), random_tree(counts, rng)
    embeddings = rng.integers(-2, 3, (queries, DIMENSION)).astype(np.float32)
    expected = exact_oracle(vectors[-1], embeddings, k)
    with HierarchicalIndex.open(write_level_indexes(directory, vectors, parents)) as index:
        assert (index.level_count, index.cell_counts) == (len(counts), tuple(counts))
        index.check()
        for hits in (index.search(embeddings, width=counts[-1], k=k), index.exact(embeddings, k=k)):
            assert hits.ordinals.dtype == np.int64
            assert hits.scores.dtype == np.float32
            assert hits.ordinals.shape == (queries, min(k, counts[-1]))
            np.testing.assert_array_equal(hits.ordinals, expected.ordinals)
            np.testing.assert_array_equal(hits.scores, expected.scores)


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
        patch.setattr(search, "_LEAF_BLOCK", block)
        patch.setattr(search, "_QUERY_BLOCK", 2)
        hits = index.exact(embeddings, k=k, leaf_ranges=ranges)
    assert hits.ordinals.shape == (3, min(k, len(allowed)))
    np.testing.assert_array_equal(hits.ordinals, expected.ordinals)
    np.testing.assert_array_equal(hits.scores, expected.scores)


@pytest.mark.parametrize(("storage", "tolerance"), [("fp32", 1e-4), ("fp16", 1e-4), ("sq8", 1e-4)])
def test_beam_and_exact_agree_on_the_vectors_as_stored(directory: Path, storage: str, tolerance: float) -> None:
    rng = np.random.default_rng(11)
    composites, parents, embeddings, _ = hierarchical_data((20, 50, 120, 300), 64, 1.0, rng)
    with HierarchicalIndex.open(write_level_indexes(directory, composites, parents, storage)) as index:
        beam = index.search(embeddings, width=300, k=10)
        exact = index.exact(embeddings, k=10)
    np.testing.assert_allclose(beam.scores, exact.scores, rtol=0, atol=tolerance)
    # Where two leaves score alike to rounding, either order is right.
    apart = np.diff(exact.scores, axis=1, prepend=np.inf, append=-np.inf) < -tolerance
    clear = apart[:, :-1] & apart[:, 1:]
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(beam.ordinals[clear], exact.ordinals[clear])


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


def recall(found: LeafHits, expected: LeafHits) -> float:
    pairs = zip(found.ordinals.tolist(), expected.ordinals.tolist(), strict=True)
    return sum(len(set(a) & set(b)) for a, b in pairs) / expected.ordinals.size


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


def test_an_empty_batch(small: HierarchicalIndex) -> None:
    empty = np.empty((0, DIMENSION), np.float32)
    for hits in (small.search(empty, width=2, k=3), small.exact(empty, k=3)):
        assert hits.ordinals.shape == hits.scores.shape == (0, 3)
    assert small.exact(np.ones((2, DIMENSION), np.float32), k=3, leaf_ranges=[]).ordinals.shape == (2, 0)


def test_a_forked_child_searches_large_batches_too(directory: Path) -> None:
    rng = np.random.default_rng(2)
    composites, parents, _, _ = hierarchical_data((8, 20, 60), 1, 1.0, rng)
    write_level_indexes(directory, composites, parents)
    script = """
        import os, signal, sys
        from pathlib import Path
        import numpy as np
        from geosurge.search import HierarchicalIndex
        embeddings = np.random.default_rng(0).standard_normal((64, int(sys.argv[2]))).astype(np.float32)
        with HierarchicalIndex.open(sorted(Path(sys.argv[1]).glob("level-*.faiss"))) as index:
            expected = index.search(embeddings, width=4, k=5).ordinals
            child = os.fork()
            if not child:
                signal.alarm(20)
                same = np.array_equal(index.search(embeddings, width=4, k=5).ordinals, expected)
                os._exit(0 if same else 3)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(directory), str(composites[0].shape[1])]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout.strip()) == (0, "0"), done.stderr


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

    top_columns = search._top_columns
    monkeypatch.setattr(search, "_LEAF_BLOCK", 10)
    monkeypatch.setattr(search, "_top_columns", count_columns)
    with HierarchicalIndex.open(write_level_indexes(directory, vectors, [np.full(200, -1)])) as index:
        hits = index.exact(embeddings, k=200)
    np.testing.assert_array_equal(hits.ordinals, exact_oracle(vectors[0], embeddings, 200, np.arange(200)).ordinals)
    assert sorted_columns == [200]


def test_a_batch_is_its_queries_one_by_one(directory: Path) -> None:
    rng = np.random.default_rng(13)
    composites, parents, embeddings, _ = hierarchical_data((20, 50, 120, 300), 300, 1.0, rng)
    with HierarchicalIndex.open(write_level_indexes(directory, composites, parents)) as index:
        together = index.search(embeddings, width=8, k=5)
        for row, embedding in enumerate(embeddings):
            alone = index.search(embedding[None], width=8, k=5)
            np.testing.assert_array_equal(alone.ordinals[0], together.ordinals[row])
            # Level 1 sums in another order in a batch; the leaves' own sums do not change.
            np.testing.assert_array_equal(alone.scores[0], together.scores[row])


def test_read_only_embeddings_are_accepted_and_left_alone(small: HierarchicalIndex) -> None:
    embeddings = np.ones((2, DIMENSION), np.float32)
    embeddings.flags.writeable = False
    np.testing.assert_array_equal(
        small.search(embeddings, width=6, k=3).ordinals, small.exact(embeddings, k=3).ordinals
    )
    assert (embeddings == 1).all()


def test_searches_from_several_threads_do_not_share_their_widths(directory: Path) -> None:
    rng = np.random.default_rng(14)
    composites, parents, embeddings, _ = hierarchical_data((30, 80, 200, 500), 40, 1.0, rng)
    with HierarchicalIndex.open(write_level_indexes(directory, composites, parents)) as index:
        jobs = [(width, k, size) for width in (1, 3, 8, 30) for k in (1, 5) for size in (1, 40)]
        expected = [index.search(embeddings[:size], width=width, k=k) for width, k, size in jobs]
        wrong: list[tuple[int, int, int]] = []
        barrier = threading.Barrier(len(jobs))

        def repeat(job: int) -> None:
            width, k, size = jobs[job]
            barrier.wait()
            for _ in range(50):
                hits = index.search(embeddings[:size], width=width, k=k)
                if not np.array_equal(hits.ordinals, expected[job].ordinals):
                    wrong.append(jobs[job])

        threads = [threading.Thread(target=repeat, args=(job,)) for job in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_closing_lets_searches_under_way_finish(directory: Path) -> None:
    rng = np.random.default_rng(16)
    composites, parents, embeddings, _ = hierarchical_data((30, 80, 200, 500), 64, 1.0, rng)
    paths = write_level_indexes(directory, composites, parents)
    with HierarchicalIndex.open(paths) as index:
        expected = index.search(embeddings, width=8, k=5).ordinals
    for _ in range(5):
        index = HierarchicalIndex.open(paths)
        started = threading.Barrier(5)
        outcomes: list[str] = []

        def search_until_closed(index: HierarchicalIndex, started: threading.Barrier, outcomes: list[str]) -> None:
            started.wait()
            try:
                while np.array_equal(index.search(embeddings, width=8, k=5).ordinals, expected):
                    pass
                outcomes.append("wrong answer")
            except ValueError as error:
                outcomes.append(str(error))

        threads = [threading.Thread(target=search_until_closed, args=(index, started, outcomes)) for _ in range(4)]
        for thread in threads:
            thread.start()
        started.wait()
        index.close()
        for thread in threads:
            thread.join()
        assert outcomes == ["the index is closed; open it again"] * 4


@pytest.mark.parametrize(
    ("embeddings", "error", "message"),
    [
        (np.ones((2, DIMENSION)), ValueError, "float64"),
        (np.ones(DIMENSION, np.float32), ValueError, r"shape \(8,\)"),
        (np.ones((DIMENSION, 2), np.float32).T, ValueError, "not contiguous"),
        (np.ones((2, 5), np.float32), EmbeddingInvalidError, "5 components where this index has 8"),
    ],
)
def test_embeddings_of_another_form_are_refused(
    small: HierarchicalIndex, embeddings: NDArray[np.float32], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        small.search(embeddings, width=1, k=1)
    with pytest.raises(error, match=message):
        small.exact(embeddings, k=1)


def test_counts_below_one_and_ranges_beyond_the_leaves_are_refused(small: HierarchicalIndex) -> None:
    embeddings = np.ones((1, DIMENSION), np.float32)
    with pytest.raises(OptionOutOfRangeError, match="beam width is 0"):
        small.search(embeddings, width=0, k=1)
    with pytest.raises(OptionOutOfRangeError, match="k is -1"):
        small.search(embeddings, width=1, k=-1)
    with pytest.raises(OptionOutOfRangeError, match="k is 0"):
        small.exact(embeddings, k=0)
    for bad in ((0, 13), (-1, 2), (5, 4)):
        with pytest.raises(ValueError, match=r"not within \[0, 12\)"):
            small.exact(embeddings, k=1, leaf_ranges=[(0, 2), bad])


def test_a_closed_index_says_so(small: HierarchicalIndex) -> None:
    small.close()
    small.close()
    embeddings = np.ones((1, DIMENSION), np.float32)
    for call in (
        lambda: small.search(embeddings, width=1, k=1),
        lambda: small.exact(embeddings, k=1),
        small.check,
    ):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_devices_that_do_not_exist_are_refused(directory: Path) -> None:
    paths = write_level_indexes(directory, [np.ones((1, DIMENSION), np.float32)], [np.array([-1])])
    for device in ("tpu", "cuda:", "cuda:x", "cuda:-1", ""):
        with pytest.raises(UsageError, match="unknown"):
            HierarchicalIndex.open(paths, device)
    with pytest.raises(UsageError, match=r"GPU build|FAISS sees \d+ GPUs"):
        HierarchicalIndex.open(paths, f"cuda:{faiss.get_num_gpus()}")


@pytest.mark.gpu
@pytest.mark.skipif(faiss.get_num_gpus() == 0, reason="FAISS sees no GPU")
@pytest.mark.parametrize("storage", ["fp32", "fp16", "sq8"])
@pytest.mark.parametrize("counts", [(300,), (20, 50, 120, 300)])
def test_a_gpu_answers_as_the_cpu_does(directory: Path, storage: str, counts: tuple[int, ...]) -> None:
    composites, parents, embeddings, _ = hierarchical_data(counts, 64, 1.0, np.random.default_rng(15))
    paths = write_level_indexes(directory, composites, parents, storage)
    with HierarchicalIndex.open(paths) as cpu, HierarchicalIndex.open(paths, "cuda") as gpu:
        assert gpu.device == "cuda:0"
        for size in (0, 1, 64):
            batch = embeddings[:size]
            for here, there in (
                (cpu.search(batch, width=16, k=5), gpu.search(batch, width=16, k=5)),
                (cpu.exact(batch, k=5), gpu.exact(batch, k=5)),
                (
                    cpu.exact(batch, k=5, leaf_ranges=[(3, 9), (20, 40)]),
                    gpu.exact(batch, k=5, leaf_ranges=[(3, 9), (20, 40)]),
                ),
            ):
                np.testing.assert_allclose(there.scores, here.scores, rtol=0, atol=1e-2)
                assert here.ordinals.shape == there.ordinals.shape
                if size:
                    assert (here.ordinals == there.ordinals).mean() > 0.98
        with pytest.raises(OptionOutOfRangeError, match="at least 1"):
            gpu.search(embeddings, width=0, k=1)


def small_tree() -> tuple[Vectors, Tree]:
    rng = np.random.default_rng(21)
    counts = (2, 3, 4)
    return dyadic_vectors(counts, rng), [np.full(2, -1), np.array([0, 0, 1]), np.array([0, 1, 2, 2])]


@pytest.mark.parametrize("storage", ["fp32", "sq8"])
@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_file_cut_anywhere_is_corrupt(directory: Path, storage: str, level: int) -> None:
    paths = write_level_indexes(directory, *small_tree(), storage)
    whole = paths[level - 1].read_bytes()
    HierarchicalIndex.open(paths).close()
    for length in range(len(whole)):
        paths[level - 1].write_bytes(whole[:length])
        with pytest.raises(BundleCorruptError, match=f"level-{level}.faiss"):
            HierarchicalIndex.open(paths)


def test_a_longer_file_text_and_a_missing_file_are_refused(directory: Path) -> None:
    paths = write_level_indexes(directory, *small_tree())
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole + b"\0")
    with pytest.raises(
        BundleCorruptError, match=f"level-2.faiss: has {len(whole) + 1} bytes .* announces {len(whole)}"
    ):
        HierarchicalIndex.open(paths)
    paths[1].write_text("this is not an index")
    with pytest.raises(BundleCorruptError, match=r"level-2.faiss: truncated or not a FAISS index \(.+\)"):
        HierarchicalIndex.open(paths)
    paths[1].unlink()
    with pytest.raises(BundlePartialError, match=r"level-2\.faiss"):
        HierarchicalIndex.open(paths)
    with pytest.raises(BundleInconsistentError, match="no index files"):
        HierarchicalIndex.open([])


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


FOUR = np.ones((4, DIMENSION), np.float32)
FAMILIES = np.array([0, 1, 2, 2])
QUANTIZED_LEVEL = faiss.IndexScalarQuantizer(DIMENSION, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
L2_LEVEL = faiss.IndexFlatL2(DIMENSION)
L2_LEVEL.add(FOUR[:2])


@pytest.mark.parametrize(
    ("level", "index", "message"),
    [
        (3, inverted_file(FOUR, FAMILIES, 5), "level-3.faiss: has 5 lists where .*level-2.faiss has 3 cells"),
        (3, inverted_file(FOUR[:, :4].copy(), FAMILIES, 3), "level-3.faiss: has 4 dimensions where .* has 8"),
        (3, inverted_file(FOUR, FAMILIES, 3, metric=faiss.METRIC_L2), "level-3.faiss: has FAISS metric 1"),
        (3, inverted_file(FOUR, FAMILIES, 3, by_residual=True), "level-3.faiss: stores residuals"),
        (3, inverted_file(FOUR[:0], FAMILIES[:0], 3), "level-3.faiss: holds no cells"),
        (3, faiss.IndexFlatIP(DIMENSION), "level-3.faiss: is a IndexFlatIP; level 3 must be IndexIVFFlat or"),
        (1, QUANTIZED_LEVEL, "level-1.faiss: is a IndexScalarQuantizer; level 1 must be IndexFlat"),
        (1, L2_LEVEL, "level-1.faiss: has FAISS metric 1"),
        (1, faiss.IndexFlatIP(DIMENSION), "level-1.faiss: holds no cells"),
    ],
)
def test_files_that_contradict_each_other_are_refused(
    directory: Path, level: int, index: faiss.Index, message: str
) -> None:
    paths = write_level_indexes(directory, *small_tree())
    faiss.write_index(index, str(paths[level - 1]))
    with pytest.raises(BundleInconsistentError, match=message):
        HierarchicalIndex.open(paths)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 1, 2, 9], r"level-3.faiss: list 2 holds the ids \[2, 9\] where the ordinals 2 to 3 belong"),
        ([1, 0, 2, 3], r"level-3.faiss: list 0 holds the ids \[1\]"),
        ([0, 1, 3, 2], r"level-3.faiss: list 2 holds the ids \[3, 2\]"),
        ([0, 1, 2, 2], "level-3.faiss: list 2"),
    ],
)
def test_check_finds_ids_that_are_not_the_ordinals(directory: Path, ids: list[int], message: str) -> None:
    paths = write_level_indexes(directory, *small_tree())
    faiss.write_index(inverted_file(FOUR, FAMILIES, 3, ids=np.array(ids)), str(paths[2]))
    with HierarchicalIndex.open(paths) as index, pytest.raises(BundleInconsistentError, match=message):
        index.check()


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


@pytest.fixture
def bounded_allocations() -> Iterator[None]:
    """A flipped length must not make FAISS allocate what it announces."""
    before = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
    faiss.set_deserialization_vector_byte_limit(1 << 20)
    faiss.set_deserialization_loop_limit(1 << 20)
    yield
    faiss.set_deserialization_vector_byte_limit(before[0])
    faiss.set_deserialization_loop_limit(before[1])


@pytest.mark.usefixtures("bounded_allocations")
def test_a_flipped_header_byte_is_refused_or_harmless(directory: Path) -> None:
    paths = write_level_indexes(directory, *small_tree())
    embeddings = np.ones((3, DIMENSION), np.float32)
    whole = paths[2].read_bytes()
    header_size = len(whole) - 4 * (4 * DIMENSION + 8)
    refusals = []
    for position in range(header_size):
        paths[2].write_bytes(whole[:position] + bytes([whole[position] ^ 0x81]) + whole[position + 1 :])
        try:
            with HierarchicalIndex.open(paths) as index:
                index.search(embeddings, width=4, k=4)
        except GeoSurgeError as error:
            refusals.append(str(error))
    assert len(refusals) > header_size / 2
    assert all("level-3.faiss" in message for message in refusals)
