from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
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
    dyadic_vectors,
    exact_oracle,
    hierarchical_data,
    random_tree,
)

from geosurge.errors import EmbeddingInvalidError, OptionOutOfRangeError, UsageError
from geosurge.search import HierarchicalIndex
from geosurge_training.building.indexing import write_level_indexes


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
