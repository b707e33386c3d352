from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation
from support.leaves import random_leaves, sample_distances_km

from geosurge.geodesy import EARTH_RADIUS_KM, great_circle_km, latlng_to_unit_vector, unit_vector_to_latlng
from geosurge.posterior import (
    HALF_CIRCUMFERENCE_KM,
    LOST_MASS,
    MIN_DISC_RADIUS_KM,
    NEGLIGIBLE_MASS,
    WINDOW_SPREADS,
    LeafShapes,
    PointEstimate,
    Posteriors,
    credible_leaves,
    disc_fraction_within,
    disc_radius_km,
    infer,
    leaf_posterior,
    leaf_shapes,
    mass_within,
    path_masses,
    posterior_mean,
    radius_for_mass,
)

ROUNDED_UP = 1 + 5.1e-4


def infer_one(
    ordinals: ArrayLike, scores: ArrayLike, leaves: LeafShapes, point: PointEstimate = "posterior_mean"
) -> Posteriors:
    """The posterior of a batch of one."""
    return infer(np.atleast_2d(ordinals), np.atleast_2d(scores), leaves, point=point)


def random_posterior(count: int, seed: int, around: tuple[float, float] | None = None) -> Posteriors:
    scores = np.sort(np.random.default_rng(seed + 1).normal(0, 1.5, count))[::-1]
    return infer_one(np.arange(count), scores, leaf_shapes(*random_leaves(count, seed, around)))


def textbook_share(radius: float, distance: float, disc: float) -> float:
    """Share of a disc within a circle, by the segments on both sides of the common chord."""
    if radius >= distance + disc:
        return 1.0
    if radius <= distance - disc:
        return 0.0
    if distance <= disc - radius:
        return (radius / disc) ** 2
    r, d, big = np.longdouble(radius), np.longdouble(distance), np.longdouble(disc)
    disc_angle = np.arccos(np.clip(((d - r) * (d + r) + big * big) / (2 * d * big), -1, 1))
    circle_angle = np.arccos(np.clip(((d - big) * (d + big) + r * r) / (2 * d * r), -1, 1))
    segments = [half - np.sin(2 * half) / 2 for half in (disc_angle, circle_angle)]
    return float((segments[0] + (r / big) ** 2 * segments[1]) / np.pi)


@dataclass(frozen=True)
class TextbookAnswer:
    """What a query's answer should be, computed leaf by leaf."""

    probabilities: list[float]
    point: NDArray[np.float64]
    radius_km: float
    region: list[int]


def textbook_answer(
    leaves: tuple[NDArray[np.float64], ...], scores: NDArray[np.float64], temperature: float, mass: float
) -> TextbookAnswer:
    latitude, longitude, spread, area = leaves
    weights = [math.exp((score - scores[0]) / temperature) for score in scores.tolist()]
    probabilities = [weight / math.fsum(weights) for weight in weights]
    vectors = latlng_to_unit_vector(latitude, longitude)
    window = 2 * math.sin(WINDOW_SPREADS * spread[0] / EARTH_RADIUS_KM / 2)
    point, near = vectors[0], list[int]()
    while (now := [i for i, v in enumerate(vectors) if np.linalg.norm(v - point) <= window]) != near:
        near = now
        mean = sum(probabilities[i] * vectors[i] for i in near)
        point = mean / np.linalg.norm(mean)
    distances = [2 * EARTH_RADIUS_KM * math.asin(min(np.linalg.norm(v - point) / 2, 1.0)) for v in vectors]
    discs = [math.sqrt(2) * value for value in spread.tolist()]
    low, high = 0.0, HALF_CIRCUMFERENCE_KM
    for _ in range(60):
        middle = (low + high) / 2
        shares = [textbook_share(middle, d, disc) for d, disc in zip(distances, discs, strict=True)]
        if math.fsum(p * share for p, share in zip(probabilities, shares, strict=True)) >= mass:
            high = middle
        else:
            low = middle
    region: list[int] = []
    for leaf in sorted(range(len(weights)), key=lambda leaf: -probabilities[leaf] / area[leaf]):
        if math.fsum(probabilities[chosen] for chosen in region) < mass:
            region.append(leaf)
    return TextbookAnswer(probabilities, point, high, region)


@given(st.lists(st.floats(-200, 200), min_size=1, max_size=50), st.floats(0.05, 20))
def test_leaf_probabilities_sum_to_one_and_keep_the_order(scores: list[float], temperature: float) -> None:
    probabilities = leaf_posterior(np.array(scores), temperature)
    assert probabilities.sum() == pytest.approx(1.0)
    assert (probabilities >= 0).all()
    order = np.argsort(scores, kind="stable")
    assert (np.diff(probabilities[order]) >= 0).all()


def test_leaf_probabilities_equal_the_textbook_softmax() -> None:
    scores = np.array([1.0, 2.0, -np.inf, 0.5])
    weights = [math.exp(1.0 / 0.7), math.exp(2.0 / 0.7), 0.0, math.exp(0.5 / 0.7)]
    assert leaf_posterior(scores, 0.7) == pytest.approx(np.array(weights) / sum(weights))
    assert leaf_posterior(np.float32([3e4, 3e4 - 1])) == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.e)])


def test_a_temperature_of_almost_nothing_leaves_one_leaf() -> None:
    assert leaf_posterior(np.array([1e5, 1e5 - 1.0]), 1e-306).tolist() == [1.0, 0.0]


def test_leaves_without_spread_are_answered() -> None:
    """A window of nothing would lose the most likely leaf itself to rounding."""
    rng = np.random.default_rng(3)
    for _ in range(50):
        latitude, longitude = rng.uniform(-80, 80, 5), rng.uniform(-170, 170, 5)
        latitude[1], longitude[1] = latitude[0], longitude[0]
        leaves = leaf_shapes(latitude, longitude, np.zeros(5), np.ones(5))
        posterior = infer_one(np.arange(5), [3.0, 2.9, 0.5, 0.0, -1.0], leaves)
        assert float(posterior.distance_km[0, 0]) < 2e-3
        assert posterior.radius_km(0.5) < 0.01


@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_leaves_left_out_by_the_beam_only_raise_the_others(seed: int, reached: int) -> None:
    scores = np.sort(np.random.default_rng(seed).normal(0, 3, 40))[::-1]
    assert (leaf_posterior(scores[:reached]) >= leaf_posterior(scores)[:reached]).all()


@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_a_parents_mass_is_the_sum_of_its_childrens(tree: list[list[int]], seed: int) -> None:
    """``tree`` holds, for each cell of level 1 and each of its children, the number of leaves."""
    leaf_counts = [count for children in tree for count in children]
    leaf_ends = np.cumsum(leaf_counts)
    child_ranges = np.stack([leaf_ends - leaf_counts, leaf_ends], axis=1)
    family_ends = np.cumsum([len(children) for children in tree])
    rng = np.random.default_rng(seed)
    ordinals = np.stack([rng.permutation(leaf_ends[-1]) for _ in range(3)])
    probabilities = leaf_posterior(rng.normal(0, 2, ordinals.shape))
    child_masses = path_masses(probabilities, ordinals, np.tile(child_ranges, (3, 1, 1)))
    for end, children in zip(family_ends, tree, strict=True):
        first = end - len(children)
        parent = path_masses(probabilities, ordinals, [[[child_ranges[first, 0], child_ranges[end - 1, 1]]]] * 3)
        assert parent[:, 0] == pytest.approx(child_masses[:, first:end].sum(axis=1))
    assert (path_masses(probabilities, ordinals, [[[0, leaf_ends[-1]]]] * 3) <= 1.0).all()
    assert child_masses.sum(axis=1) == pytest.approx(1.0)


@settings(max_examples=60)
@given(st.floats(0.01, 400), st.floats(0, 300), st.floats(1, 150))
def test_disc_fraction_agrees_with_counting_points(radius: float, distance: float, disc: float) -> None:
    # Equal-area rings and sectors of the disc.
    rings = disc * np.sqrt((np.arange(300) + 0.5) / 300)[:, None]
    bearings = 2 * np.pi * (np.arange(400) + 0.5) / 400
    inside = np.hypot(distance + rings * np.cos(bearings), rings * np.sin(bearings)) <= radius
    assert float(disc_fraction_within(radius, distance, disc)) == pytest.approx(inside.mean(), abs=0.006)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_disc_fraction_has_its_closed_forms(scale: float) -> None:
    assert float(disc_fraction_within(0.5 * scale, 0.0, scale)) == pytest.approx(0.25)
    assert float(disc_fraction_within(scale, 0.0, scale)) == pytest.approx(1.0)
    assert float(disc_fraction_within(3 * scale, 1.9 * scale, scale)) == 1.0
    assert float(disc_fraction_within(scale, 2.1 * scale, scale)) == 0.0
    # Equal circles through each other's centre: 2/3 - sqrt(3) / (2 pi).
    assert float(disc_fraction_within(scale, scale, scale)) == pytest.approx(2 / 3 - math.sqrt(3) / (2 * math.pi))


def test_a_distant_circle_cuts_a_small_disc_straight() -> None:
    offsets = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    expected = 1 - (np.arccos(offsets) - offsets * np.sqrt(1 - offsets**2)) / np.pi
    for disc in (1e-3, 1.0):
        found = disc_fraction_within(5000.0 + offsets * disc, 5000.0, disc)
        assert found == pytest.approx(expected, abs=2e-4)


@given(st.floats(0, 300), st.floats(1e-3, 150), st.lists(st.floats(0, 500), min_size=2, max_size=20))
def test_disc_fraction_is_monotone_in_the_radius(distance: float, disc: float, radii: list[float]) -> None:
    shares = disc_fraction_within(np.sort(radii), distance, disc)
    assert (np.diff(shares) >= -1e-9).all()
    assert ((shares >= 0) & (shares <= 1)).all()


@pytest.mark.parametrize("around", [None, (10.0, 20.0), (0.0, 180.0), (85.0, 0.0), (-85.0, 90.0)])
@pytest.mark.parametrize("confidence", [0.3, 0.5, 0.9, 0.99])
def test_the_radius_contains_its_mass_of_sampled_truths(confidence: float, around: tuple[float, float] | None) -> None:
    latitude, longitude, spread, area = random_leaves(60, 5, around)
    scores = np.sort(np.random.default_rng(6).normal(0, 1.5, 60))[::-1]
    posterior = infer_one(np.arange(60), scores, leaf_shapes(latitude, longitude, spread, area))
    radius = posterior.radius_km(confidence)
    distances = sample_distances_km(posterior, 0, latlng_to_unit_vector(latitude, longitude), 100_000, 7)
    assert (distances <= radius).mean() == pytest.approx(confidence, abs=0.005)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 80), st.floats(0.001, 0.999))
def test_the_radius_is_the_inverse_of_the_mass_rounded_up(seed: int, count: int, mass: float) -> None:
    posterior = random_posterior(count, seed)
    radius = posterior.radius_km(mass)
    assert posterior.mass_within(radius) >= mass - 1e-9
    assert posterior.mass_within(radius / ROUNDED_UP) < mass


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.floats(0.0, 1.0), min_size=2, max_size=12))
def test_the_radius_never_decreases_with_the_mass(seed: int, masses: list[float]) -> None:
    posterior = random_posterior(30, seed)
    radii = [float(posterior.radius_km(mass)[0]) for mass in sorted(masses)]
    assert radii == sorted(radii)
    assert 0 < radii[0] <= radii[-1] <= HALF_CIRCUMFERENCE_KM


@pytest.mark.parametrize("mass", [0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.5, 20.0, 150.0])
def test_the_radius_of_a_single_leaf_is_that_of_a_disc(mass: float, spread: float) -> None:
    posterior = infer_one([0], [3.0], leaf_shapes([48.0], [2.0], [spread], [100.0]))
    exact = math.sqrt(mass) * math.sqrt(2.0) * spread
    assert exact <= posterior.radius_km(mass) <= exact * ROUNDED_UP


def test_the_root_mean_square_radius_of_a_disc_is_the_spread() -> None:
    # The integral of r² over a uniform disc of radius R is R² / 2.
    assert disc_radius_km(7.0) ** 2 / 2 == pytest.approx(49.0)
    assert disc_radius_km(0.0) == MIN_DISC_RADIUS_KM


def test_leaves_without_spread_are_points() -> None:
    leaves = leaf_shapes([0.0, 0.0, 0.0], [0.0, 10.0, 30.0], [0.0] * 3, [1.0] * 3)
    posterior = infer_one(np.arange(3), np.log([0.5, 0.3, 0.2]), leaves)
    degree = EARTH_RADIUS_KM * math.pi / 180
    assert (posterior.latitude_deg, posterior.longitude_deg) == (0.0, 0.0)
    assert posterior.radius_km(0.4) <= 2 * MIN_DISC_RADIUS_KM
    assert posterior.radius_km(0.7) == pytest.approx(10 * degree, rel=6e-4)
    assert posterior.radius_km(0.9) == pytest.approx(30 * degree, rel=6e-4)


def test_an_antipodal_leaf_is_half_the_circumference_away() -> None:
    leaves = leaf_shapes([20.0, -20.0], [30.0, -150.0], [50.0, 50.0], [1.0, 1.0])
    posterior = infer_one(np.arange(2), np.log([0.6, 0.4]), leaves)
    assert posterior.distance_km[0, 1] == pytest.approx(HALF_CIRCUMFERENCE_KM, rel=1e-6)
    assert posterior.radius_km(0.99) == pytest.approx(HALF_CIRCUMFERENCE_KM, rel=0.005)
    assert posterior.radius_km(1.0) <= HALF_CIRCUMFERENCE_KM
    assert posterior.mass_within(HALF_CIRCUMFERENCE_KM) == 1.0
    assert posterior.mass_within(10_000.0) == pytest.approx(0.6)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_turning_the_earth_turns_the_answer(seed: int, turn: int) -> None:
    latitude, longitude, spread, area = random_leaves(40, seed, (50.0, 10.0))
    scores = np.sort(np.random.default_rng(seed).normal(0, 1.5, 40))[::-1]
    rotation = Rotation.random(random_state=turn)
    turned = unit_vector_to_latlng(rotation.apply(latlng_to_unit_vector(latitude, longitude)))
    before = infer_one(np.arange(40), scores, leaf_shapes(latitude, longitude, spread, area))
    after = infer_one(np.arange(40), scores, leaf_shapes(*turned, spread, area))
    expected = unit_vector_to_latlng(rotation.apply(before.unit_vectors))
    assert great_circle_km(*expected, after.latitude_deg, after.longitude_deg) < 1e-5
    assert after.radius_km(0.9) == pytest.approx(before.radius_km(0.9), rel=6e-4)


@pytest.mark.parametrize(
    ("latitude", "longitude", "expected"),
    [
        ([10.0, 10.0], [179.5, -179.5], (10.0, 180.0)),
        ([89.5, 89.5], [0.0, 180.0], (90.0, 0.0)),
        ([-89.5, -89.5], [90.0, -90.0], (-90.0, 0.0)),
    ],
)
def test_neighbours_across_the_antimeridian_and_the_poles_meet_between(
    latitude: list[float], longitude: list[float], expected: tuple[float, float]
) -> None:
    leaves = leaf_shapes(latitude, longitude, [60.0, 60.0], [1e4, 1e4])
    posterior = infer_one(np.arange(2), np.zeros(2), leaves)
    assert great_circle_km(posterior.latitude_deg, posterior.longitude_deg, *expected) < 0.5
    assert posterior.radius_km(0.9) < 200


def test_a_distant_second_mode_does_not_move_the_point() -> None:
    latitude, longitude = [40.0, 40.5, 39.6, -33.0, -33.4], [-3.0, -3.4, -2.9, 150.0, 150.5]
    leaves = leaf_shapes(latitude, longitude, [30.0] * 5, [1e4] * 5)
    posterior = infer_one(np.arange(5), np.log([0.3, 0.12, 0.1, 0.25, 0.23]), leaves)
    near = posterior_mean(np.array([[0.3, 0.12, 0.1]]), leaves.unit_vectors[np.newaxis, :3], [120.0])
    assert posterior.unit_vectors == pytest.approx(near)
    assert posterior.distance_km[0, 0] < 40


def test_the_leaf_estimate_is_the_mean_of_the_most_likely_leaf() -> None:
    latitude, longitude, spread, area = random_leaves(20, 3, (10.0, 20.0))
    leaves = leaf_shapes(latitude, longitude, spread, area)
    posterior = infer_one(np.arange(20), np.linspace(1, 0, 20), leaves, point="leaf")
    estimate = float(posterior.latitude_deg[0]), float(posterior.longitude_deg[0])
    assert estimate == pytest.approx((latitude[0], longitude[0]))
    assert posterior.distance_km[0] == pytest.approx(
        great_circle_km(latitude, longitude, latitude[0], longitude[0]), abs=1e-6
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(1, 2000))
def test_the_point_is_a_local_minimum_of_the_expected_capped_squared_distance(seed: int, window: float) -> None:
    latitude, longitude, _, _ = random_leaves(40, seed, (60.0, 175.0))
    vectors = latlng_to_unit_vector(latitude, longitude)
    rng = np.random.default_rng(seed)
    probabilities = np.sort(leaf_posterior(rng.normal(0, 1.5, 40)))[::-1]
    cap = (2 * math.sin(window / EARTH_RADIUS_KM / 2)) ** 2

    def objective(point: NDArray[np.float64]) -> float:
        return float(probabilities @ np.minimum(((vectors - point) ** 2).sum(axis=1), cap))

    point = posterior_mean(probabilities[np.newaxis], vectors[np.newaxis], [window])[0]
    assert np.linalg.norm(point) == pytest.approx(1.0)
    assert objective(point) <= objective(vectors[0]) + 1e-15
    for step in rng.normal(0, 1e-7, (20, 3)):
        moved = point + step
        assert objective(point) <= objective(moved / np.linalg.norm(moved)) + 1e-13


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.floats(0.01, 0.99))
def test_no_other_set_of_leaves_holds_as_much_on_less_area(seed: int, count: int, mass: float) -> None:
    rng = np.random.default_rng(seed)
    probabilities = leaf_posterior(rng.normal(0, 1.5, count))
    area = rng.uniform(1, 50, count)
    found = credible_leaves(mass, probabilities[np.newaxis], area[np.newaxis])
    chosen = found.positions[0, : found.counts[0]]
    assert found.masses[0] == pytest.approx(probabilities[chosen].sum())
    assert found.area_km2[0] == pytest.approx(area[chosen].sum())
    held = probabilities[chosen].sum()
    assert held >= mass - 1e-12
    assert probabilities[chosen[:-1]].sum() < mass
    density = probabilities / area
    assert (np.diff(density[chosen]) <= 0).all()
    for size in range(count + 1):
        for others in itertools.combinations(range(count), size):
            if probabilities[list(others)].sum() >= held + 1e-12:
                assert area[list(others)].sum() >= area[chosen].sum() - 1e-9


def test_a_credible_region_of_everything_leaves_out_only_what_is_negligible() -> None:
    probabilities = np.array([[0.6, 0.4 - 1e-9, 1e-9]])
    found = credible_leaves(1.0, probabilities, np.ones((1, 3)))
    assert (found.positions.tolist(), found.counts.tolist()) == ([[0, 1]], [2])


def test_module_functions_and_methods_agree() -> None:
    posterior = random_posterior(30, 4)
    columns = (posterior.probabilities, posterior.distance_km, posterior.disc_radius_km)
    assert posterior.radius_km(0.8) == radius_for_mass(0.8, *columns)
    assert posterior.mass_within(500.0) == mass_within(500.0, *columns)


@settings(max_examples=300)
@given(st.floats(1e-3, 2e4), st.floats(0, 2e4), st.floats(-2, 3).map(lambda power: 10**power))
def test_disc_fraction_equals_the_segments_of_the_textbook(radius: float, distance: float, disc: float) -> None:
    for crossing in (radius, distance + disc, abs(distance - disc) + 1e-9, distance + 0.3 * disc):
        found = float(disc_fraction_within(crossing, distance, disc))
        assert found == pytest.approx(textbook_share(crossing, distance, disc), abs=1e-12 + 2e-15 * crossing / disc)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.3, 4))
def test_a_batch_gets_the_textbooks_answers(seed: int, temperature: float) -> None:
    """Queries with numbers of leaves and spreads of all orders of magnitude, side by side."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 30, 5)
    latitude, longitude, _, area = random_leaves(40, seed, (35.0, 178.0) if seed % 2 else None)
    spread = 10 ** rng.uniform(-1, 3, 40)
    ordinals = np.full((5, counts.max()), -1)
    scores = np.full((5, counts.max()), -np.inf)
    masses = rng.uniform(0.01, 0.99, 5)
    for row, count in enumerate(counts):
        ordinals[row, :count] = rng.permutation(40)[:count]
        scores[row, :count] = -np.sort(-rng.normal(0, 3, count))
    found = infer(ordinals, scores, leaf_shapes(latitude, longitude, spread, area), temperature, shown=30)
    radii, regions = found.radius_km(masses), found.credible_leaves(masses)
    for row, count in enumerate(counts):
        own = ordinals[row, :count]
        columns = latitude[own], longitude[own], spread[own], area[own]
        expected = textbook_answer(columns, scores[row, :count], temperature, masses[row])
        assert found.probabilities[row, :count] == pytest.approx(expected.probabilities, rel=1e-9)
        assert not found.probabilities[row, count:].any()
        assert found.unit_vectors[row] == pytest.approx(expected.point, abs=1e-12)
        assert expected.radius_km * (1 - 1e-8) <= radii[row] <= expected.radius_km * ROUNDED_UP
        assert regions.positions[row, : regions.counts[row]].tolist() == expected.region


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_query_does_not_notice_the_others_of_its_batch(seed: int) -> None:
    rng = np.random.default_rng(seed)
    leaves = leaf_shapes(*random_leaves(200, seed, (50.0, 10.0)))
    ordinals = np.stack([rng.permutation(200) for _ in range(8)])
    scores = -np.sort(-rng.normal(0, rng.uniform(0.1, 12, (8, 1)), (8, 200)))
    masses = rng.uniform(0.01, 0.99, 8)
    together = infer(ordinals, scores, leaves)
    radii, regions = together.radius_km(masses), together.credible_leaves(masses)
    for row in range(8):
        alone = infer_one(ordinals[row], scores[row], leaves)
        kept = alone.probabilities.shape[1]
        assert together.probabilities[row, :kept] == pytest.approx(alone.probabilities[0], rel=1e-11)
        assert together.probabilities[row, kept:].sum() <= LOST_MASS
        assert together.unit_vectors[row] == pytest.approx(alone.unit_vectors[0], abs=1e-11)
        assert radii[row] == pytest.approx(float(alone.radius_km(masses[row])[0]), rel=1e-9)
        region = alone.credible_leaves(masses[row])
        assert regions.positions[row, : regions.counts[row]].tolist() == region.positions[0].tolist()


@pytest.mark.parametrize("width", [0.0, 0.5, 5.0, 40.0])
def test_only_leaves_without_mass_are_dropped(width: float) -> None:
    rng = np.random.default_rng(1)
    scores = -np.sort(-rng.normal(0, width, (3, 3000))).astype(np.float32)
    leaves = leaf_shapes(*random_leaves(3000, 2))
    found = infer(np.tile(np.arange(3000), (3, 1)), scores, leaves)
    kept = found.probabilities.shape[1]
    every = leaf_posterior(scores)
    assert every[:, kept:].sum(axis=1).max(initial=0.0) <= LOST_MASS
    assert found.probabilities == pytest.approx(every[:, :kept], rel=1e-11)
    assert (kept < 3000) == (width > 10)
    assert infer(found.ordinals, scores[:, :kept], leaves, shown=100).ordinals.shape[1] >= min(100, kept)
    steep = infer(np.tile(np.arange(3000), (3, 1)), np.tile(-100.0 * np.arange(3000), (3, 1)), leaves, shown=100)
    assert steep.ordinals.shape == (3, 100)


def test_each_query_may_have_its_own_mass_or_share_one() -> None:
    scores = -np.sort(-np.random.default_rng(8).normal(0, 1.5, (4, 30)))
    posteriors = infer(np.tile(np.arange(30), (4, 1)), scores, leaf_shapes(*random_leaves(30, 9)))
    shared = posteriors.radius_km(0.6)
    assert shared.shape == (4,)
    assert posteriors.radius_km([0.6] * 4).tolist() == shared.tolist()
    own = posteriors.radius_km([0.2, 0.4, 0.6, 1 - NEGLIGIBLE_MASS / 3])
    assert (own[2], own[3]) == (shared[2], posteriors.radius_km(1.0)[3])
    assert own[0] < shared[0]
