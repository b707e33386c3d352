from __future__ import annotations

import numpy as np
import pytest
from scipy.special import logsumexp

from geosurge.errors import ConfigurationError
from geosurge_training.building.indexing import composite_embeddings
from geosurge_training.prototypes.shrinkage import CellSums, fit_prototypes, shrunken_means, sum_cells

PARENTS = [np.array([-1, -1]), np.array([0, 0, 1]), np.array([0, 0, 1, 2])]
CELLS = np.array([[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3], [1, 2, 3], [1, -1, -1]])


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def embeddings(count: int, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(count, 5))).astype(np.float32)


def sums_of(vectors: np.ndarray) -> list[CellSums]:
    return sum_cells([(vectors, CELLS)], PARENTS, vectors.shape[1])


def textbook(vectors: np.ndarray, strength: float) -> list[np.ndarray]:
    """Cell by cell in float64, from the formula."""
    vectors = vectors.astype(np.float64)
    above = [unit(vectors[CELLS[:, 0] >= 0].sum(axis=0))]
    members_above = [np.ones(len(vectors), dtype=bool)]
    means = []
    for level, parents in enumerate(PARENTS):
        members = [CELLS[:, level] == cell for cell in range(len(parents))]
        rows = []
        for cell, parent in enumerate(np.maximum(parents, 0)):
            own = unit(vectors[members[cell]].sum(axis=0) + strength * above[parent])
            is_parent = level > 0 and members[cell].sum() == members_above[parent].sum()
            rows.append(above[parent] if is_parent else own)
        means.append(np.array(rows))
        above, members_above = rows, members
    return means


@pytest.mark.parametrize("strength", [0.0, 0.3, 4.0])
def test_means_are_those_of_the_formula(strength: float) -> None:
    vectors = embeddings(len(CELLS))
    for mean, expected in zip(shrunken_means(sums_of(vectors), strength), textbook(vectors, strength), strict=True):
        np.testing.assert_allclose(mean, expected, atol=1e-6)


def test_sums_do_not_depend_on_the_batches() -> None:
    vectors = embeddings(len(CELLS))
    cut = sum_cells([(vectors[:3], CELLS[:3]), (vectors[3:], CELLS[3:])], PARENTS, 5)
    for whole, parts in zip(sums_of(vectors), cut, strict=True):
        np.testing.assert_array_equal(whole.counts, parts.counts)
        np.testing.assert_allclose(whole.sums, parts.sums, atol=1e-12)


def test_a_cell_of_one_picture_moves_to_its_parent_as_the_strength_grows() -> None:
    vectors = embeddings(len(CELLS))
    lone, parent = 1, 0
    towards = []
    for strength in (0.0, 0.5, 1.0, 5.0, 1e4):
        means = shrunken_means(sums_of(vectors), strength)
        towards.append(float(means[2][lone] @ means[1][parent]))
    np.testing.assert_allclose(shrunken_means(sums_of(vectors), 0.0)[2][lone], vectors[2], atol=1e-6)
    assert towards == sorted(towards)
    assert towards[-1] == pytest.approx(1.0, abs=1e-3)


def test_a_cell_that_was_not_divided_is_its_parent_but_one_that_lost_pictures_is_not() -> None:
    vectors = embeddings(len(CELLS))
    means = shrunken_means(sums_of(vectors), 2.0)
    # Leaf 3 has the two pictures of its parent, cell 2; that has two of the three of cell 1.
    np.testing.assert_array_equal(means[2][3], means[1][2])
    assert not np.allclose(means[1][2], means[0][1], atol=1e-3)


def drawn(seed: int, *, leaf_noise: float, pictures: int = 3) -> tuple[list[CellSums], np.ndarray, np.ndarray]:
    """A world of 4 x 6 leaves of a few pictures each, and held-out pictures of it with their leaves."""
    rng = np.random.default_rng(seed)
    parents = [np.full(4, -1), np.repeat(np.arange(4), 6)]
    coarse = unit(rng.normal(size=(4, 16)))
    fine = unit(coarse[parents[1]] + leaf_noise * rng.normal(size=(24, 16)))
    leaves = np.repeat(np.arange(24), pictures)
    asked = rng.integers(0, 24, 600)
    seen, held_out = (
        unit(fine[rows] + 0.3 * rng.normal(size=(len(rows), 16))).astype(np.float32) for rows in (leaves, asked)
    )
    ordinals = np.stack([parents[1][leaves], leaves], axis=1)
    return sum_cells([(seen, ordinals)], parents, 16), held_out, asked


def loss_of(
    levels: list[CellSums],
    means: list[np.ndarray],
    temperatures: tuple[float, ...],
    queries: np.ndarray,
    leaves: np.ndarray,
) -> float:
    composites = composite_embeddings(means, temperatures, [level.parents for level in levels])[-1]
    scores = queries.astype(np.float64) @ composites.T
    return float(np.mean(logsumexp(scores, axis=1) - scores[np.arange(len(leaves)), leaves]))


def test_the_fit_is_the_least_loss_of_the_leaves() -> None:
    levels, queries, leaves = drawn(1, leaf_noise=0.2)
    fitted = fit_prototypes(levels, queries, leaves)
    least = loss_of(levels, fitted.embeddings, fitted.temperatures, queries, leaves)
    assert fitted.negative_log_likelihood == pytest.approx(least, abs=1e-4)
    for factor in (0.8, 1.25):
        leaning = shrunken_means(levels, fitted.strength * factor)
        assert loss_of(levels, leaning, fitted.temperatures, queries, leaves) > least - 1e-4
        sharper = (fitted.temperatures[0], fitted.temperatures[1] * factor)
        assert loss_of(levels, fitted.embeddings, sharper, queries, leaves) > least
    assert fitted.temperatures[0] >= fitted.temperatures[1]


def test_leaning_makes_unseen_pictures_of_sparse_cells_likelier() -> None:
    for seed in (2, 3):
        levels, queries, leaves = drawn(seed, leaf_noise=0.1, pictures=1)
        fitted = [fit_prototypes(levels, queries[:300], leaves[:300], shrink=shrink) for shrink in (True, False)]
        leaning, plain = (
            loss_of(levels, one.embeddings, one.temperatures, queries[300:], leaves[300:]) for one in fitted
        )
        assert fitted[1].strength == 0.0
        assert leaning < plain - 0.04


def test_cells_that_are_nothing_like_their_parents_hardly_lean() -> None:
    near, far = (fit_prototypes(*drawn(4, leaf_noise=noise)).strength for noise in (0.1, 3.0))
    assert far < 0.5 < 2.0 < near


def test_pictures_in_no_leaf_do_not_count_and_too_few_are_an_error() -> None:
    levels, queries, leaves = drawn(5, leaf_noise=0.2)
    lost = np.where(np.arange(600) < 100, -1, leaves)
    every, kept = fit_prototypes(levels, queries, lost), fit_prototypes(levels, queries[100:], leaves[100:])
    assert every.temperatures == pytest.approx(kept.temperatures, rel=1e-3)
    with pytest.raises(ConfigurationError, match=r"2 of 600 held-out pictures .* more pictures"):
        fit_prototypes(levels, queries, np.where(np.arange(600) < 2, leaves, -1))
