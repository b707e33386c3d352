from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.backbones import CLIP, CONVNEXT, DINO, RESNET, SWIN, Settings
from transformers import CLIPConfig, CLIPModel

from geosurge.encoder.vision import CLIP_MEAN, CLIP_STD, VisionConfig, VisionTower
from geosurge.errors import EncoderError

SMALL_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 99,
}


def tower(settings: Settings, *, image_size: int = 32, frozen: bool = True) -> VisionTower:
    torch.manual_seed(0)
    return VisionTower(VisionConfig(settings, image_size, frozen=frozen))


def random_pixels(count: int, side: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed)).byte()


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels.float() / 255.0 - mean) / std


@pytest.mark.parametrize(
    ("settings", "grid", "width", "token_count"),
    [
        (CLIP, (4, 4), 16, 17),
        (DINO, (4, 4), 16, 20),
        (RESNET, (4, 4), 16, 16),
        (CONVNEXT, (4, 4), 16, 16),
        ({**SWIN, "depths": [1, 1], "num_heads": [1, 1], "out_features": ["stage1"]}, (4, 4), 16, 16),
    ],
    ids=["clip", "dino", "resnet", "convnext", "swin"],
)
def test_every_kind_of_backbone_gives_tokens_and_their_grid(
    settings: Settings, grid: tuple[int, int], width: int, token_count: int
) -> None:
    built = tower(settings)
    seen = built(random_pixels(2))
    assert built.grid == seen.grid == grid
    assert (built.width, built.token_count) == (width, token_count)
    assert seen.tokens.shape == (2, token_count, width)


def test_clip_tokens_are_the_last_hidden_state() -> None:
    built, pixels = tower(CLIP), random_pixels(3)
    expected = built.backbone(normalised(pixels)).last_hidden_state
    torch.testing.assert_close(built(pixels).tokens, expected, atol=1e-5, rtol=0)


def test_a_convolutional_map_is_read_row_by_row() -> None:
    built = tower(RESNET, image_size=48)
    pixels = random_pixels(2, 48)
    feature_map = built.backbone(normalised(pixels)).last_hidden_state
    rows, columns = built.grid
    tokens = built(pixels).tokens
    for row in range(rows):
        for column in range(columns):
            token = tokens[:, row * columns + column]
            torch.testing.assert_close(token, feature_map[:, :, row, column], atol=1e-5, rtol=0)


def test_pixels_of_another_size_are_resized_to_the_towers() -> None:
    assert tower(CLIP)(random_pixels(1, 50)).tokens.shape == (1, 17, 16)


def test_a_frozen_tower_has_no_gradients_and_never_trains() -> None:
    built = tower(RESNET)
    assert not built.training
    assert not built.train().backbone.training
    assert not any(parameter.requires_grad for parameter in built.parameters())
    before = {name: values.clone() for name, values in built.state_dict().items()}
    assert not built(random_pixels(4)).tokens.requires_grad
    assert all(torch.equal(values, before[name]) for name, values in built.state_dict().items())


def test_a_trained_tower_has_gradients_in_every_layer() -> None:
    built = tower(RESNET, frozen=False).train()
    assert built.backbone.training
    built(random_pixels(4)).tokens.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in built.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert not built.eval().backbone.training


def test_a_probe_leaves_no_trace_in_batch_statistics() -> None:
    built = tower(RESNET, frozen=False)
    assert not built.training
    assert all(count == 0 for name, count in built.state_dict().items() if name.endswith("num_batches_tracked"))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({**CLIP, "image_size": 64}, "cannot see a square of 32 pixels"),
        ({"model_type": "bert", **SMALL_TEXT}, "not take images"),
        ({"model_type": "clip", "text_config": SMALL_TEXT, "vision_config": CLIP}, "not take images"),
        ({"model_type": "nonsense"}, "not known"),
    ],
)
def test_a_backbone_that_is_no_vision_tower_is_refused(settings: Settings, reason: str) -> None:
    with pytest.raises(EncoderError, match=reason):
        tower(settings)


def test_a_pretrained_tower_gives_the_same_tokens_and_rebuilds_from_its_configuration(tmp_path: Path) -> None:
    original = tower(CLIP)
    original.backbone.save_pretrained(tmp_path)
    loaded = VisionTower.from_pretrained(str(tmp_path))
    pixels = random_pixels(2)
    assert loaded.config.image_size == 32
    assert torch.equal(loaded(pixels).tokens, original(pixels).tokens)
    rebuilt = VisionTower(loaded.config)
    rebuilt.load_state_dict(loaded.state_dict())
    assert torch.equal(rebuilt(pixels).tokens, original(pixels).tokens)


@pytest.mark.parametrize("folder", ["weights", "my-clip-copy"])
def test_the_kind_of_a_pretrained_model_does_not_depend_on_its_folders_name(tmp_path: Path, folder: str) -> None:
    original = tower(RESNET)
    original.backbone.save_pretrained(tmp_path / folder)
    loaded = VisionTower.from_pretrained(str(tmp_path / folder), image_size=40, frozen=False)
    assert loaded.config.backbone["model_type"] == "resnet"
    assert loaded.config.image_size == 40
    assert not loaded.config.frozen


def test_of_a_whole_clip_model_the_vision_half_is_taken(tmp_path: Path) -> None:
    vision = {key: value for key, value in CLIP.items() if key != "model_type"}
    torch.manual_seed(5)
    whole = CLIPModel(CLIPConfig(text_config=SMALL_TEXT, vision_config=vision, projection_dim=8)).eval()
    whole.save_pretrained(tmp_path)
    loaded = VisionTower.from_pretrained(str(tmp_path))
    pixels = random_pixels(2)
    expected = whole.vision_model(normalised(pixels)).last_hidden_state
    torch.testing.assert_close(loaded(pixels).tokens, expected, atol=1e-5, rtol=0)


def test_a_pretrained_tower_of_another_image_size_is_refused(tmp_path: Path) -> None:
    tower(CLIP).backbone.save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="cannot see a square of 64 pixels"):
        VisionTower.from_pretrained(str(tmp_path), image_size=64)


def test_a_pretrained_towers_own_colour_statistics_are_used(tmp_path: Path) -> None:
    tower(RESNET).backbone.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}'
    )
    loaded = VisionTower.from_pretrained(str(tmp_path), image_size=32)
    assert (loaded.config.mean, loaded.config.std) == ((0.5,) * 3, (0.25,) * 3)
    expected = loaded.backbone((random_pixels(2).float() / 255.0 - 0.5) / 0.25).last_hidden_state
    torch.testing.assert_close(loaded(random_pixels(2)).tokens, expected.flatten(2).transpose(1, 2), atol=1e-5, rtol=0)


def test_weights_of_another_kind_of_model_are_refused(tmp_path: Path) -> None:
    tower(RESNET).backbone.save_pretrained(tmp_path)
    VisionTower(VisionConfig(CLIP, 32)).backbone.config.save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="would be random"):
        VisionTower.from_pretrained(str(tmp_path))
