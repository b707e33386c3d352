from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation

from geosurge.density import SMALLEST_DISTANCE, Components, Kernel, densest_points, reference_weights
from geosurge.geodesy import EARTH_RADIUS_KM, great_circle_km, latlng_to_unit_vector, unit_vector_to_latlng

KERNELS = (Kernel(), Kernel(4.0, 0.25, 2.0), Kernel(6.0, 1.0, 1.0), Kernel(10.0, 0.5, 10.0))
SPREAD_KM = 50.0


def random_components(count: int, seed: int, *, references: int = 12, leaves: int = 9) -> Components:
    """Queries around (0, 0) whose references and leaves lie some hundreds of kilometres around them."""
    rng = np.random.default_rng(seed)
    places = latlng_to_unit_vector(*rng.normal(0.0, 2.0, (2, count, references)))
    means = latlng_to_unit_vector(*rng.normal(0.0, 2.0, (2, count, leaves)))
    similarities = np.sort(rng.uniform(0.7, 1.0, (count, references)).astype(np.float32))[:, ::-1]
    probabilities = np.sort(rng.dirichlet(np.ones(leaves), count))[:, ::-1]
    return Components(similarities, places, probabilities, means, rng.uniform(0.5, 2.0, count) * SPREAD_KM)


def textbook_density(components: Components, kernel: Kernel, row: int, point: NDArray[np.float64]) -> float:
    """The module's f, term by term and with great-circle distances."""
    weights = []
    for similarity in components.similarities[row].tolist():
        distance = math.sqrt(max(2.0 - 2.0 * similarity, 0.0))
        weights.append(max(distance, SMALLEST_DISTANCE) ** -kernel.power if similarity > -math.inf else 0.0)
    share = kernel.share if math.fsum(weights) > 0.0 else 0.0
    terms = [share * w / math.fsum(weights) for w in weights if share > 0.0] + [
        (1.0 - share) * p for p in components.probabilities[row].tolist()
    ]
    vectors = [*components.references[row][: len(terms) - components.leaves.shape[1]], *components.leaves[row]]
    sigma = kernel.spreads * components.spread_km[row]
    there = unit_vector_to_latlng(point / np.linalg.norm(point))
    total = 0.0
    for term, vector in zip(terms, vectors, strict=True):
        angle = float(great_circle_km(*there, *unit_vector_to_latlng(vector))) / EARTH_RADIUS_KM
        total += term * math.exp(-2.0 * math.sin(angle / 2.0) ** 2 * (EARTH_RADIUS_KM / sigma) ** 2)
    return total


def distance_km(points: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(great_circle_km(*unit_vector_to_latlng(points), *unit_vector_to_latlng(others)))


@pytest.mark.parametrize("power", [1.0, 4.0, 10.0])
def test_references_weigh_the_published_power_of_their_distance(power: float) -> None:
    embeddings = np.random.default_rng(1).normal(size=(7, 5))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    query, references = embeddings[0], embeddings[1:]
    weights = reference_weights((references @ query)[np.newaxis], power)[0]
    published = np.array([1.0 / math.dist(query, reference) ** power for reference in references])
    assert weights == pytest.approx(published / published.sum())


def test_a_reference_that_equals_the_query_has_a_finite_weight_and_a_missing_one_none() -> None:
    weights = reference_weights(np.array([[1.0, 1.0, 0.9, -np.inf], [-np.inf] * 4]), 400.0)
    assert weights.tolist() == [[0.5, 0.5, 0.0, 0.0], [0.0] * 4]


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_answer_is_the_mode_above_the_highest_component(kernel: Kernel) -> None:
    components = random_components(20, seed=2)
    points = densest_points(components, kernel)
    assert np.linalg.norm(points, axis=1) == pytest.approx(1.0)
    for row, point in enumerate(points):
        height = textbook_density(components, kernel, row, point)
        starts = [*components.references[row], components.leaves[row, 0]]
        assert height >= max(textbook_density(components, kernel, row, start) for start in starts) * (1 - 1e-9)
        climbed = minimize(
            lambda x, row=row: -textbook_density(components, kernel, row, x),
            point,
            method="Nelder-Mead",
            options={"xatol": 1e-9, "fatol": 1e-12, "initial_simplex": point + 1e-4 * np.eye(4, 3)},
        )
        # Along a ridge the steps are short, and their number is limited.
        assert -climbed.fun == pytest.approx(height, rel=2e-3)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from(KERNELS), st.booleans())
def test_the_sphere_has_no_seam(seed: int, kernel: Kernel, snap: bool) -> None:
    kernel = replace(kernel, snap=snap)
    components = random_components(3, seed=5)
    points = densest_points(components, kernel)
    for centre in ((0.0, 180.0), (90.0, 0.0), (-90.0, 0.0), None):
        turn = Rotation.random(rng=seed).as_matrix()
        if centre is not None:
            turn = Rotation.align_vectors(latlng_to_unit_vector(*centre)[np.newaxis], [[1.0, 0.0, 0.0]])[0].as_matrix()
        turned = replace(components, references=components.references @ turn.T, leaves=components.leaves @ turn.T)
        assert distance_km(densest_points(turned, kernel), points @ turn.T) == pytest.approx(0.0, abs=1e-3)


def test_without_references_the_leaves_alone_are_the_density() -> None:
    components = random_components(4, seed=7)
    missing = replace(components, similarities=np.full_like(components.similarities, -np.inf))
    elsewhere = replace(missing, references=-missing.references)
    alone = replace(missing, similarities=missing.similarities[:, :0], references=missing.references[:, :0])
    expected = densest_points(alone, Kernel())
    for snap in (False, True):
        assert densest_points(elsewhere, Kernel(share=1.0, snap=snap)) == pytest.approx(expected)


def test_wide_kernels_answer_with_the_mean_and_narrow_ones_with_a_component() -> None:
    components = random_components(5, seed=8)
    weights = reference_weights(components.similarities, 6.0)
    mean = np.einsum("nk,nkx->nx", weights, components.references)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    assert distance_km(densest_points(components, Kernel(6.0, 1.0, 1000.0)), mean) == pytest.approx(0.0, abs=1.0)
    narrow = densest_points(components, Kernel(6.0, 1.0, 0.01))
    heaviest = components.references[np.arange(5), weights.argmax(axis=1)]
    assert distance_km(narrow, heaviest) == pytest.approx(0.0, abs=1e-3)


def test_snapping_answers_with_the_heaviest_reference_within_reach() -> None:
    components = random_components(30, seed=9)
    kernel = Kernel(6.0, 0.5, 1.0)
    modes, snapped = densest_points(components, kernel), densest_points(components, replace(kernel, snap=True))
    for row, mode in enumerate(modes):
        near = distance_km(components.references[row], mode) <= components.spread_km[row]
        # The similarities descend, so that the first is the heaviest.
        expected = components.references[row][near][0] if near.any() else mode
        assert distance_km(snapped[row], expected) == pytest.approx(0.0, abs=1e-3)


def test_a_query_does_not_depend_on_its_batch() -> None:
    components = random_components(16, seed=10)
    together = densest_points(components, Kernel(4.0, 0.5, 2.0))
    for row in range(16):
        rows = slice(row, row + 1)
        one = Components(
            components.similarities[rows],
            components.references[rows],
            components.probabilities[rows],
            components.leaves[rows],
            components.spread_km[rows],
        )
        assert densest_points(one, Kernel(4.0, 0.5, 2.0)) == pytest.approx(together[rows], abs=1e-12)


def test_an_empty_batch_has_no_points() -> None:
    assert densest_points(random_components(0, seed=1), Kernel()).shape == (0, 3)
