from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.geocells import whole_loss

from geosurge_training.fitting.geocells import GeocellEmbeddings, Negatives

Array = NDArray[np.float64]

COUNTS = (3, 5, 11)
DIMENSION = 6


def geocells(seed: int = 0) -> GeocellEmbeddings:
    torch.manual_seed(seed)
    module = GeocellEmbeddings(COUNTS, DIMENSION, 0.1)
    with torch.no_grad():
        for table in module.tables:
            # Rows of any length: only their direction may count.
            table.mul_(torch.rand(len(table), 1) * 3 + 0.2)
        module.log_temperatures += torch.linspace(-0.5, 0.5, len(COUNTS))
    return module


def random_visual(rng: np.random.Generator, count: int) -> Array:
    visual = rng.standard_normal((count, DIMENSION))
    return visual / np.linalg.norm(visual, axis=1, keepdims=True)


def textbook(module: GeocellEmbeddings, visual: Array, ordinals: NDArray[np.int64], negatives: Negatives) -> Array:
    """-log( exp(v . g+ / tau) / sum_j exp(v . g_j / tau) ), image by image in float64."""
    losses = []
    for level, table in enumerate(module.tables):
        g = table.detach().double().numpy()
        g /= np.linalg.norm(g, axis=1, keepdims=True)
        tau = float(module.log_temperatures.detach().double()[level].exp())
        held = [row for row in range(len(visual)) if ordinals[row, level] >= 0]
        candidates = sorted({int(ordinals[row, level]) for row in held}) if negatives == "batch" else range(len(g))
        terms = []
        for row in held:
            positive = np.exp(visual[row] @ g[ordinals[row, level]] / tau)
            terms.append(-np.log(positive / sum(np.exp(visual[row] @ g[cell] / tau) for cell in candidates)))
        losses.append(np.mean(terms) if terms else 0.0)
    return np.array(losses)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 12), negatives=st.sampled_from(["batch", "all_cells"]))
def test_the_loss_is_textbook_infonce_on_every_level(seed: int, count: int, negatives: Negatives) -> None:
    rng = np.random.default_rng(seed)
    module = geocells(seed)
    visual = random_visual(rng, count)
    # Many images share a cell, some have none, and the last level is sometimes empty.
    ordinals = np.stack([rng.integers(-1, cells, count) for cells in COUNTS], axis=1)
    if seed % 5 == 0:
        ordinals[:, -1] = -1
    losses = whole_loss(module, torch.from_numpy(visual).float(), torch.from_numpy(ordinals), negatives)
    assert losses.shape == (len(COUNTS),)
    np.testing.assert_allclose(losses.detach().numpy(), textbook(module, visual, ordinals, negatives), atol=2e-5)


def test_a_level_without_any_cell_costs_nothing_and_can_be_differentiated() -> None:
    module, visual = geocells(), torch.from_numpy(random_visual(np.random.default_rng(0), 4)).float()
    visual.requires_grad_()
    losses = whole_loss(module, visual, torch.full((4, 3), -1), "all_cells")
    assert losses.tolist() == [0.0, 0.0, 0.0]
    losses.sum().backward()
    assert visual.grad is not None
    assert not visual.grad.any()


def test_images_of_one_cell_do_not_push_each_other_away() -> None:
    module, visual = geocells(), torch.from_numpy(random_visual(np.random.default_rng(1), 5)).float()
    losses = whole_loss(module, visual, torch.full((5, 3), 2), "batch")
    torch.testing.assert_close(losses, torch.zeros(3))


def test_only_cells_of_the_batch_learn_from_it_and_of_all_cells_every_one() -> None:
    ordinals = torch.tensor([[0, 1, 4], [0, 1, 4], [2, 3, 9], [1, -1, -1]])
    visual = torch.from_numpy(random_visual(np.random.default_rng(2), 4)).float()
    learning: dict[Negatives, list[set[int]]] = {}
    modes: list[Negatives] = ["batch", "all_cells"]
    for negatives in modes:
        module = geocells()
        whole_loss(module, visual, ordinals, negatives).sum().backward()
        learning[negatives] = [
            set(torch.nonzero(table.grad.abs().sum(dim=1)).flatten().tolist())
            for table in module.tables
            if table.grad is not None
        ]
    assert learning["batch"] == [{0, 1, 2}, {1, 3}, {4, 9}]
    assert learning["all_cells"] == [set(range(count)) for count in COUNTS]


def test_following_the_gradient_brings_an_image_to_its_cell() -> None:
    module = geocells()
    ordinals = torch.tensor([[1, 2, 7]])
    raw = torch.nn.Parameter(torch.from_numpy(random_visual(np.random.default_rng(3), 1)).float())
    optimiser = torch.optim.SGD([raw], lr=0.05)
    before = whole_loss(module, torch.nn.functional.normalize(raw, dim=-1), ordinals, "all_cells").detach()
    for _ in range(50):
        optimiser.zero_grad()
        whole_loss(module, torch.nn.functional.normalize(raw, dim=-1), ordinals, "all_cells").sum().backward()
        optimiser.step()
    after = whole_loss(module, torch.nn.functional.normalize(raw, dim=-1), ordinals, "all_cells").detach()
    assert after.sum() < before.sum()


def test_embeddings_start_as_unit_rows_and_temperatures_as_asked() -> None:
    module = GeocellEmbeddings(COUNTS, DIMENSION, 0.07)
    torch.testing.assert_close(module.temperatures(), torch.full((3,), 0.07))
    for table, unit, count in zip(module.tables, module.embeddings(), COUNTS, strict=True):
        assert table.shape == (count, DIMENSION)
        torch.testing.assert_close(unit.norm(dim=1), torch.ones(count))
        torch.testing.assert_close(unit, table)


@pytest.mark.parametrize("negatives", ["batch", "all_cells"])
def test_temperatures_stay_positive_while_they_learn(negatives: Negatives) -> None:
    module = geocells()
    visual = torch.from_numpy(random_visual(np.random.default_rng(4), 6)).float()
    ordinals = torch.tensor([[row % 3, row % 5, row] for row in range(6)])
    optimiser = torch.optim.SGD([module.log_temperatures], lr=5.0)
    before = module.temperatures().detach()
    for _ in range(20):
        optimiser.zero_grad()
        whole_loss(module, visual, ordinals, negatives).sum().backward()
        optimiser.step()
    assert (module.temperatures() > 0).all()
    assert not torch.allclose(module.temperatures(), before)
