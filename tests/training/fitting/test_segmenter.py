from __future__ import annotations

import pytest
import torch
from support.backbones import SEGFORMER

from geosurge.encoder.segmentation import SegmentationConfig, Segmenter
from geosurge_training.data.blue_marble import CLASSES, BlueMarble
from geosurge_training.fitting.segmenter import train_segmenter


def make_segmenter() -> Segmenter:
    torch.manual_seed(0)
    settings = {**SEGFORMER, "num_labels": len(CLASSES)}
    return Segmenter(SegmentationConfig(settings, 32, len(CLASSES)))


def train(segmenter: Segmenter, world: BlueMarble, steps: int) -> float:
    return train_segmenter(segmenter, world, steps=steps, batch_size=16, learning_rate=1e-2, seed=4)


@pytest.fixture(scope="module")
def trained(world: BlueMarble) -> tuple[Segmenter, float]:
    segmenter = make_segmenter()
    return segmenter, train(segmenter, world, 40)


def test_training_beats_the_commonest_class(trained: tuple[Segmenter, float], world: BlueMarble) -> None:
    _, accuracy = trained
    _, classes = world.labelled_batch(40, 512)
    commonest = torch.bincount(classes.flatten()).max() / classes.numel()
    assert commonest + 0.05 < accuracy <= 1.0


def test_the_accuracy_is_that_of_unseen_views(trained: tuple[Segmenter, float], world: BlueMarble) -> None:
    segmenter, accuracy = trained
    pixels, classes = world.labelled_batch(40, 512)
    with torch.no_grad():
        logits = torch.nn.functional.interpolate(segmenter.logits(pixels), size=(32, 32), mode="bilinear")
    assert accuracy == pytest.approx(float((logits.argmax(dim=1) == classes).double().mean()), abs=1e-6)


def test_a_trained_segmenter_is_frozen_again(trained: tuple[Segmenter, float]) -> None:
    segmenter, _ = trained
    assert not any(module.training for module in segmenter.modules())
    assert not any(parameter.requires_grad for parameter in segmenter.parameters())


def test_the_same_seed_trains_the_same_segmenter(world: BlueMarble) -> None:
    first, second = make_segmenter(), make_segmenter()
    train(first, world, 3)
    torch.rand(5)
    train(second, world, 3)
    for (name, values), others in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(values, others), name


def test_every_weight_learns(world: BlueMarble) -> None:
    before, after = make_segmenter().state_dict(), make_segmenter()
    train(after, world, 2)
    unchanged = [name for name, values in after.state_dict().items() if torch.equal(values, before[name])]
    assert unchanged == []
