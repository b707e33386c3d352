from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geosurge.geodesy import latlng_to_unit_vector
from geosurge_training.fitting.geocells import GeocellEmbeddings, Labels, Negatives
from geosurge_training.fitting.label_smoothing import LabelSmoothing

COUNTS = (4, 9)
IMAGES = 6
Degrees = list[tuple[float, float]]


def distance_km(one: tuple[float, float], other: tuple[float, float]) -> float:
    """The haversine formula."""
    (p, q), (r, s) = ((math.radians(degrees) for degrees in place) for place in (one, other))
    half = math.sin((r - p) / 2) ** 2 + math.cos(p) * math.cos(r) * math.sin((s - q) / 2) ** 2
    return 2 * 6371.0088 * math.asin(math.sqrt(min(1.0, half)))


def textbook(place: tuple[float, float], cells: Degrees, true: int, tau_km: float) -> list[float]:
    """PIGEON's equation 2, divided by the sum of the weights."""
    weights = [math.exp(-(distance_km(cell, place) - distance_km(cells[true], place)) / tau_km) for cell in cells]
    return [weight / sum(weights) for weight in weights]


def random_places(rng: np.random.Generator, count: int) -> Degrees:
    # Within a few hundred kilometres, across the antimeridian, or cells would share nothing.
    return [
        (float(latitude), float((longitude + 540) % 360 - 180))
        for latitude, longitude in rng.uniform((60, 178), (64, 184), (count, 2))
    ]


def smoothing_over(tau_km: float, levels: list[Degrees]) -> LabelSmoothing:
    locations = [(np.array(level)[:, 0], np.array(level)[:, 1]) for level in levels]
    return LabelSmoothing.of_cells(tau_km, locations, torch.device("cpu"))


def unit(places: Degrees) -> torch.Tensor:
    return torch.from_numpy(latlng_to_unit_vector(*np.array(places).T))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), tau_km=st.sampled_from([1.0, 65.0, 75.0, 1000.0]))
def test_targets_are_the_published_weights_as_a_distribution(seed: int, tau_km: float) -> None:
    rng = np.random.default_rng(seed)
    cells, places = random_places(rng, 8), random_places(rng, IMAGES)
    targets = smoothing_over(tau_km, [cells]).targets(0, unit(places), None)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(IMAGES))
    for row, place in enumerate(places):
        expected = textbook(place, cells, int(rng.integers(8)), tau_km)
        np.testing.assert_allclose(targets[row].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("negatives", ["batch", "all_cells"])
def test_the_loss_is_the_textbook_cross_entropy_with_soft_targets(negatives: Negatives) -> None:
    rng = np.random.default_rng(1)
    torch.manual_seed(1)
    module = GeocellEmbeddings(COUNTS, 5, 0.2)
    levels, places = [random_places(rng, count) for count in COUNTS], random_places(rng, IMAGES)
    ordinals = torch.stack([torch.from_numpy(rng.integers(-1, count, IMAGES)) for count in COUNTS], dim=1)
    visual = torch.nn.functional.normalize(torch.randn(IMAGES, 5), dim=1)
    counts = [int((ordinals[:, level] >= 0).sum()) for level in range(len(COUNTS))]
    losses = module.losses(
        visual,
        Labels(ordinals, unit(places)),
        module.candidates(ordinals, negatives),
        counts,
        smoothing_over(70.0, levels),
    )
    for level, table in enumerate(module.tables):
        g = table.detach().double().numpy()
        g /= np.linalg.norm(g, axis=1, keepdims=True)
        held = [row for row in range(IMAGES) if ordinals[row, level] >= 0]
        cells = sorted({int(ordinals[row, level]) for row in held}) if negatives == "batch" else list(range(len(g)))
        terms = []
        for row in held:
            logits = [float(visual[row].double().numpy() @ g[cell]) / 0.2 for cell in cells]
            total = math.log(sum(math.exp(logit) for logit in logits))
            true = cells.index(int(ordinals[row, level]))
            targets = textbook(places[row], [levels[level][cell] for cell in cells], true, 70.0)
            terms.append(-sum(target * (logit - total) for target, logit in zip(targets, logits, strict=True)))
        assert float(losses[level].detach()) == pytest.approx(np.mean(terms), abs=1e-5)


def test_a_short_reach_is_the_nearest_cell_and_a_long_one_all_of_them() -> None:
    cells: Degrees = [(10.0, 10.0), (10.0, 11.0), (-40.0, 100.0)]
    place = unit([(10.0, 10.2)])
    nearest = smoothing_over(0.1, [cells]).targets(0, place, None)
    torch.testing.assert_close(nearest, torch.tensor([[1.0, 0.0, 0.0]]))
    everywhere = smoothing_over(1e9, [cells]).targets(0, place, None)
    torch.testing.assert_close(everywhere, torch.full((1, 3), 1 / 3), atol=1e-4, rtol=0)


def test_candidates_alone_share_a_target() -> None:
    rng = np.random.default_rng(2)
    cells, places = random_places(rng, 8), unit(random_places(rng, 3))
    smoothing = smoothing_over(70.0, [cells])
    chosen = torch.tensor([1, 4, 6])
    whole = smoothing.targets(0, places, None)[:, chosen]
    torch.testing.assert_close(smoothing.targets(0, places, chosen), whole / whole.sum(dim=1, keepdim=True))
