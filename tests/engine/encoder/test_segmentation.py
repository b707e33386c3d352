from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.backbones import CLASS_COUNT, CLIP, MASK2FORMER, ONEFORMER, RESNET, SEGFORMER, Settings

from geosurge.encoder.segmentation import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ONEFORMER_TASK_TOKENS,
    SegmentationConfig,
    Segmenter,
)
from geosurge.encoder.vision import VisionConfig, VisionTower
from geosurge.errors import EncoderError

SIDE = 64
KINDS = pytest.mark.parametrize("settings", [SEGFORMER, MASK2FORMER, ONEFORMER], ids=lambda s: str(s["model_type"]))


def segmenter(settings: Settings, seed: int = 0) -> Segmenter:
    torch.manual_seed(seed)
    tokens = ONEFORMER_TASK_TOKENS if settings["model_type"] == "oneformer" else None
    return Segmenter(SegmentationConfig(settings, SIDE, CLASS_COUNT, task_tokens=tokens))


def random_pixels(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(seed)).byte()


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels.float() / 255.0 - mean) / std


def pooled(labels: NDArray[np.int64], grid: tuple[int, int]) -> NDArray[np.float64]:
    """Share of each class in each patch, counted pixel by pixel."""
    rows, columns = grid
    count, height, width = labels.shape
    fractions = np.zeros((count, rows * columns, CLASS_COUNT))
    for image in range(count):
        for row in range(rows):
            for column in range(columns):
                # Patches that do not divide the map overlap, as adaptive pooling defines them.
                top, bottom = row * height // rows, -(-(row + 1) * height // rows)
                left, right = column * width // columns, -(-(column + 1) * width // columns)
                patch = labels[image, top:bottom, left:right]
                counts = np.bincount(patch.ravel(), minlength=CLASS_COUNT)
                fractions[image, row * columns + column] = counts / patch.size
    return fractions


@KINDS
@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_fractions_are_the_pooled_class_map(settings: Settings, grid: tuple[int, int]) -> None:
    built, pixels = segmenter(settings), random_pixels(3)
    labels = built.logits(pixels).argmax(dim=1).numpy()
    fractions = built(pixels, grid)
    assert fractions.dtype == torch.float32
    assert fractions.shape == (3, grid[0] * grid[1], CLASS_COUNT)
    np.testing.assert_allclose(fractions.sum(-1).numpy(), 1.0, atol=1e-6)
    np.testing.assert_allclose(fractions.numpy(), pooled(labels, grid), atol=1e-6)


def test_the_test_images_have_more_than_one_class() -> None:
    assert len(segmenter(SEGFORMER).logits(random_pixels(3)).argmax(dim=1).unique()) > 1


def test_segformer_scores_are_the_models_logits() -> None:
    built, pixels = segmenter(SEGFORMER), random_pixels(2)
    expected = built.backbone(normalised(pixels)).logits
    torch.testing.assert_close(built.logits(pixels), expected)


@pytest.mark.parametrize("settings", [MASK2FORMER, ONEFORMER], ids=["mask2former", "oneformer"])
def test_mask_classifiers_sum_their_masks_by_class_probability(settings: Settings) -> None:
    built, pixels = segmenter(settings), random_pixels(2)
    extra = {}
    if settings["model_type"] == "oneformer":
        extra["task_inputs"] = torch.tensor([ONEFORMER_TASK_TOKENS] * 2)
    outputs = built.backbone(normalised(pixels), **extra)
    class_logits = outputs.class_queries_logits.double().numpy()
    masks = 1.0 / (1.0 + np.exp(-outputs.masks_queries_logits.double().numpy()))
    exponentials = np.exp(class_logits - class_logits.max(axis=-1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=-1, keepdims=True)
    scores = np.zeros((2, CLASS_COUNT, *masks.shape[2:]))
    for query in range(masks.shape[1]):
        for label in range(CLASS_COUNT):
            scores[:, label] += probabilities[:, query, label, None, None] * masks[:, query]
    np.testing.assert_allclose(built.logits(pixels).numpy(), scores, atol=1e-5)


def test_the_task_text_is_77_tokens_between_start_and_end() -> None:
    assert len(ONEFORMER_TASK_TOKENS) == 77
    text = [token for token in ONEFORMER_TASK_TOKENS if token]
    assert (text[0], text[-1]) == (49406, 49407)
    assert ONEFORMER_TASK_TOKENS[: len(text)] == tuple(text)
    assert max(text) < 49408


def test_the_task_text_steers_oneformer() -> None:
    built, pixels = segmenter(ONEFORMER), random_pixels(1)
    before = built.logits(pixels)
    built.get_buffer("task_tokens")[5] = 4321
    assert not torch.equal(built.logits(pixels), before)


@KINDS
def test_a_segmenter_is_frozen_and_never_trains(settings: Settings) -> None:
    built = segmenter(settings)
    assert not built.training
    assert not any(module.training for module in built.train().modules())
    assert not any(parameter.requires_grad for parameter in built.parameters())
    assert not built(random_pixels(1), (2, 2)).requires_grad


@KINDS
def test_a_batch_is_segmented_image_by_image(settings: Settings) -> None:
    built, pixels = segmenter(settings), random_pixels(3)
    together = built.logits(pixels)
    for row in range(3):
        torch.testing.assert_close(together[row : row + 1], built.logits(pixels[row : row + 1]), atol=1e-5, rtol=0)


@KINDS
def test_no_part_of_the_training_loss_is_kept(settings: Settings) -> None:
    state = segmenter(settings).state_dict()
    assert not [name for name in state if "criterion" in name]
    assert {values.dtype for values in state.values()} <= {torch.float32, torch.int64}


@KINDS
def test_a_pretrained_segmenter_gives_the_same_scores_and_rebuilds_from_its_configuration(
    settings: Settings, tmp_path: Path
) -> None:
    original, pixels = segmenter(settings), random_pixels(2)
    folder = tmp_path / "weights"
    original.backbone.save_pretrained(folder)
    loaded = Segmenter.from_pretrained(str(folder), image_size=SIDE)
    assert loaded.config.class_count == CLASS_COUNT
    assert loaded.config.task_tokens == original.config.task_tokens
    assert torch.equal(loaded.logits(pixels), original.logits(pixels))
    rebuilt = Segmenter(loaded.config)
    rebuilt.load_state_dict(loaded.state_dict())
    assert torch.equal(rebuilt.logits(pixels), original.logits(pixels))


def test_a_oneformer_that_was_saved_in_training_does_not_drop_out(tmp_path: Path) -> None:
    # Its pixel decoder drops out by this field of the configuration, whatever mode the module is in.
    segmenter(ONEFORMER).backbone.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "is_training": True}))
    loaded = Segmenter.from_pretrained(str(tmp_path), image_size=SIDE)
    pixels = random_pixels(1)
    assert torch.equal(loaded.logits(pixels), loaded.logits(pixels))
    assert torch.equal(loaded.logits(pixels), segmenter(ONEFORMER).logits(pixels))


def test_another_number_of_classes_than_the_models_is_refused() -> None:
    with pytest.raises(EncoderError, match="has 12 classes, but class_count is 5"):
        Segmenter(SegmentationConfig(SEGFORMER, SIDE, 5))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({**RESNET, "num_labels": CLASS_COUNT}, "'resnet' is not a semantic segmentation model"),
        (CLIP, "'clip_vision_model' is not a semantic segmentation model"),
        ({"model_type": "detr", "num_labels": CLASS_COUNT}, "'detr' is not a semantic segmentation model"),
        ({"model_type": "nonsense"}, "not known"),
        ({**ONEFORMER, "conv_dim": 20}, "cannot be built"),
    ],
)
def test_a_model_that_cannot_segment_is_refused(settings: Settings, reason: str) -> None:
    with pytest.raises(EncoderError, match=reason):
        Segmenter(SegmentationConfig(settings, SIDE, CLASS_COUNT))


def test_a_pretrained_model_that_cannot_segment_is_refused(tmp_path: Path) -> None:
    VisionTower(VisionConfig(RESNET, 32)).backbone.save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="'resnet' is not a semantic segmentation model"):
        Segmenter.from_pretrained(str(tmp_path), image_size=SIDE)
