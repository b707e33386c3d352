"""What an encoder is made of, from its files' descriptions alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.backbones import CLASS_COUNT, CLIP, ONEFORMER, SEGFORMER, Settings
from support.recipes import write_recipe
from transformers import AutoConfig

from geosurge.encoder import ImageEncoder, SegmentationConfig, VisionConfig
from geosurge.encoder.segmentation import ONEFORMER_TASK_TOKENS
from geosurge.errors import ConfigurationError, EncoderError
from geosurge_training.encoders import encoder_config
from geosurge_training.recipe import Recipe, load_recipe

PAPER_VISION = 'pretrained = "openai/clip-vit-large-patch14-336"\nrevision = "0"'
PAPER_SEGMENTER = 'pretrained = "shi-labs/oneformer_ade20k_swin_large"\nrevision = "0"'


def recipe_of(folder: Path, vision: str, segmentation: str, classes: int = CLASS_COUNT) -> Recipe:
    """A recipe with both towers from files."""
    text = write_recipe(folder / "recipe.toml").read_text()
    head, rest = text.split("[encoder.vision]")
    tail = rest.split("[encoder.fusion]")[1]
    towers = (
        f"[encoder.vision]\n{vision}\nimage_size = 32\n\n"
        f"[encoder.segmentation]\n{segmentation}\nimage_size = 64\nclass_count = {classes}\n\n"
    )
    path = folder / "recipe.toml"
    path.write_text(f"{head}{towers}[encoder.fusion]{tail}")
    return load_recipe(path)


def save_config(folder: Path, settings: Settings) -> None:
    fields = dict(settings)
    AutoConfig.for_model(fields.pop("model_type"), **fields).save_pretrained(folder)


def test_configurations_in_directories_are_enough(tmp_path: Path) -> None:
    save_config(tmp_path / "clip", CLIP)
    save_config(tmp_path / "segformer", SEGFORMER)
    config = encoder_config(recipe_of(tmp_path, 'pretrained = "clip"', 'pretrained = "segformer"'))
    encoder = ImageEncoder(config)
    assert encoder.vision.width == CLIP["hidden_size"]
    assert (encoder.vision.grid, encoder.config.segmentation.class_count) == ((4, 4), CLASS_COUNT)


def test_of_a_whole_clip_model_the_vision_half_counts(tmp_path: Path) -> None:
    save_config(tmp_path / "clip", {"model_type": "clip", "vision_config": CLIP})
    save_config(tmp_path / "segformer", SEGFORMER)
    config = encoder_config(recipe_of(tmp_path, 'pretrained = "clip"', 'pretrained = "segformer"'))
    assert config.vision.backbone["model_type"] == "clip_vision_model"
    assert ImageEncoder(config).vision.width == CLIP["hidden_size"]


def test_a_oneformer_is_planned_as_it_is_run_and_not_as_it_was_trained(tmp_path: Path) -> None:
    save_config(tmp_path / "clip", CLIP)
    save_config(tmp_path / "oneformer", {**ONEFORMER, "is_training": True})
    config = encoder_config(recipe_of(tmp_path, 'pretrained = "clip"', 'pretrained = "oneformer"'))
    assert config.segmentation.task_tokens == ONEFORMER_TASK_TOKENS
    encoder = ImageEncoder(config)
    assert not any("text_mapper" in name for name, _ in encoder.segmenter.named_parameters())
    encoder(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_the_papers_towers_need_no_files(tmp_path: Path) -> None:
    config = encoder_config(recipe_of(tmp_path, PAPER_VISION, PAPER_SEGMENTER, classes=150))
    assert config.vision.backbone == VisionConfig.clip_vit_large_336().backbone
    assert config.segmentation.task_tokens == ONEFORMER_TASK_TOKENS
    published = SegmentationConfig.oneformer_ade20k_swin_large().backbone
    assert {key: config.segmentation.backbone[key] for key in published} == published


@pytest.mark.parametrize(
    ("vision", "reason"),
    [
        ('pretrained = "facebook/dinov2-large"\nrevision = "0"', r"encoder\.vision\.pretrained: .*config\.json"),
        ('pretrained = "openai/clip-vit-large-patch14-336"', r"encoder\.vision\.pretrained: .*`revision`"),
    ],
)
def test_what_is_neither_at_hand_nor_known_says_what_to_do(tmp_path: Path, vision: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        encoder_config(recipe_of(tmp_path, vision, PAPER_SEGMENTER, classes=150))


def test_a_directory_without_a_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    with pytest.raises(EncoderError, match=r"config\.json"):
        encoder_config(recipe_of(tmp_path, 'pretrained = "clip"', PAPER_SEGMENTER, classes=150))
    (tmp_path / "clip" / "config.json").write_text(json.dumps({"model_type": "no such thing"}))
    with pytest.raises(EncoderError, match="no such thing"):
        encoder_config(recipe_of(tmp_path, 'pretrained = "clip"', PAPER_SEGMENTER, classes=150))
