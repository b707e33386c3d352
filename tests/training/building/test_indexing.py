from __future__ import annotations

import itertools
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from geosurge_training.building.indexing import composite_embeddings, write_level_indexes

TREE_OF_SEVEN = (4, 9, 15, 24, 40, 55, 70)


def random_tree(counts: tuple[int, ...], seed: int) -> list[NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    parents = [np.full(counts[0], -1, np.int64)]
    for above, here in itertools.pairwise(counts):
        parents.append(np.sort(np.r_[np.arange(above), rng.integers(0, above, here - above)]).astype(np.int64))
    return parents


def unit_rows(n: int, d: int, seed: int) -> NDArray[np.float32]:
    rows = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def textbook_product(
    image: NDArray[np.float64],
    geographic: list[NDArray[np.float32]],
    temperatures: list[float],
    parents: list[NDArray[np.int64]],
) -> list[NDArray[np.float64]]:
    """The product of softmax probabilities along every path, cell by cell, as the paper writes it."""
    running: list[NDArray[np.float64]] = []
    for level, vectors in enumerate(geographic):
        exponentials = [np.exp(float(image @ g.astype(np.float64)) / temperatures[level]) for g in vectors]
        probabilities = np.array(exponentials) / sum(exponentials)
        if level > 0:
            for cell, parent in enumerate(parents[level]):
                probabilities[cell] *= running[-1][parent]
        running.append(probabilities)
    return running


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000))
def test_composites_are_the_log_of_the_textbook_product_up_to_a_constant_of_the_image(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parents = random_tree(TREE_OF_SEVEN, seed)
    geographic = [unit_rows(n, 16, seed + level) for level, n in enumerate(TREE_OF_SEVEN)]
    temperatures = [float(t) for t in rng.uniform(0.05, 0.5, len(TREE_OF_SEVEN))]
    image = unit_rows(1, 16, seed + 99)[0].astype(np.float64)

    composites = composite_embeddings(geographic, temperatures, parents)
    products = textbook_product(image, geographic, temperatures, parents)

    for composite, product in zip(composites, products, strict=True):
        scores = composite.astype(np.float64) @ image
        constant = scores - np.log(product)
        assert np.ptp(constant) < 1e-4
        margin = np.diff(np.sort(np.log(product)))
        if margin.min() > 1e-4:
            np.testing.assert_array_equal(np.argsort(scores), np.argsort(product))


def test_composites_round_once_after_summing_in_float64() -> None:
    ones = [np.ones((1, 1), np.float32)] * 3
    parents = [np.array([-1]), np.array([0]), np.array([0])]
    # In float32, 2**24 + 1 + 1 stays at 2**24.
    composites = composite_embeddings(ones, [2.0**-24, 1.0, 1.0], parents)
    assert composites[-1][0, 0] == 2.0**24 + 2


@pytest.mark.parametrize("storage", ["fp32", "fp16", "sq8"])
def test_files_are_plain_faiss_indexes_whose_lists_are_families(tmp_path: Path, storage: str) -> None:
    parents = random_tree(TREE_OF_SEVEN, 3)
    vectors = [unit_rows(n, 16, n) for n in TREE_OF_SEVEN]
    paths = write_level_indexes(tmp_path, vectors, parents, storage)

    assert [path.name for path in paths] == [f"level-{level}.faiss" for level in range(1, 8)]
    first = faiss.read_index(str(paths[0]))
    assert type(first) is faiss.IndexFlatIP
    np.testing.assert_array_equal(first.reconstruct_n(0, first.ntotal), vectors[0])
    for level in range(1, 7):
        index = faiss.read_index(str(paths[level]))
        assert (index.ntotal, index.nlist, index.quantizer.ntotal) == (
            TREE_OF_SEVEN[level],
            TREE_OF_SEVEN[level - 1],
            0,
        )
        for parent in range(index.nlist):
            size = index.invlists.list_size(parent)
            ids = faiss.rev_swig_ptr(index.invlists.get_ids(parent), size)
            np.testing.assert_array_equal(ids, np.flatnonzero(parents[level] == parent))
        # Unit rows: fp16 keeps 11 bits of numbers below 1, sq8 splits a range of at most 2 in 255.
        tolerance = {"fp32": 0.0, "fp16": 2.0**-12, "sq8": 1 / 255}[storage]
        np.testing.assert_allclose(index.reconstruct_n(0, index.ntotal), vectors[level], rtol=0, atol=tolerance)


@pytest.mark.parametrize("storage", ["fp32", "fp16", "sq8"])
def test_the_same_input_gives_the_same_bytes_whatever_the_threads(tmp_path: Path, storage: str) -> None:
    parents = random_tree(TREE_OF_SEVEN, 3)
    vectors = [unit_rows(n, 16, n) for n in TREE_OF_SEVEN]
    threads = faiss.omp_get_max_threads()
    written = []
    try:
        for count in (1, 3):
            faiss.omp_set_num_threads(count)
            directory = tmp_path / str(count)
            directory.mkdir()
            written.append([path.read_bytes() for path in write_level_indexes(directory, vectors, parents, storage)])
    finally:
        faiss.omp_set_num_threads(threads)
    assert written[0] == written[1]


def test_a_cell_without_children_is_an_empty_list(tmp_path: Path) -> None:
    vectors = [unit_rows(3, 4, 0), unit_rows(2, 4, 1)]
    paths = write_level_indexes(tmp_path, vectors, [np.full(3, -1), np.array([0, 2])])
    index = faiss.read_index(str(paths[1]))
    assert [index.invlists.list_size(parent) for parent in range(3)] == [1, 0, 1]


ROWS = unit_rows(2, 4, 0)


@pytest.mark.parametrize(
    ("vectors", "parents", "message"),
    [
        ([], [], "give one or more"),
        ([ROWS], [], "1 levels of vectors and 0 of parents"),
        ([ROWS, ROWS[:, :3]], [np.array([-1, -1]), np.array([0, 1])], r"level 2 has vectors of shape \(2, 3\)"),
        ([ROWS[:0]], [np.array([])], "at least one cell"),
        ([ROWS * np.array([[1], [np.nan]])], [np.array([-1, -1])], "level 1 .* first in row 1"),
        ([ROWS, ROWS], [np.array([-1, -1]), np.array([1, 0])], "parent 0 in row 1 after parent 1"),
        ([ROWS, ROWS], [np.array([-1, -1]), np.array([0, 2])], "parents 0 to 2; level 1 has the ordinals 0 to 1"),
        ([ROWS, ROWS], [np.array([-1, -1]), np.array([-1, 0])], "parents -1 to 0"),
        ([ROWS, ROWS], [np.array([-1, -1]), np.array([0])], r"parents of shape \(1,\)"),
        ([ROWS, ROWS], [np.array([-1, -1]), np.array([0.0, 1.0])], "type float64"),
    ],
)
def test_a_tree_that_is_none_is_refused(
    tmp_path: Path, vectors: list[NDArray[np.float32]], parents: list[NDArray[np.int64]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        composite_embeddings(vectors, [0.1] * len(vectors), parents)
    with pytest.raises(ValueError, match=message):
        write_level_indexes(tmp_path, vectors, parents)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("temperatures", "message"), [([0.0], "level 1 is 0.0"), ([float("nan")], "is nan"), ([1, 1], "2 temp")]
)
def test_a_temperature_that_is_none_is_refused(temperatures: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        composite_embeddings([ROWS], temperatures, [np.array([-1, -1])])


def test_what_fp16_cannot_hold_is_refused_and_sq8_holds_it(tmp_path: Path) -> None:
    vectors = [ROWS, ROWS * np.float32(1e5)]
    parents = [np.array([-1, -1]), np.array([0, 1])]
    with pytest.raises(ValueError, match=r"level 2 has composites over 65504"):
        write_level_indexes(tmp_path, vectors, parents, "fp16")
    assert len(write_level_indexes(tmp_path, vectors, parents, "sq8")) == 2
    with pytest.raises(ValueError, match="'int4' is unknown"):
        write_level_indexes(tmp_path, vectors, parents, "int4")  # type: ignore[arg-type]
