"""The encoder that a recipe asks for: built, or as a configuration, for which no weights need be at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from geosurge.encoder import EncoderConfig, ImageEncoder, SegmentationConfig, VisionConfig
from geosurge.encoder.backbones import read_settings
from geosurge.encoder.segmentation import ONEFORMER_TASK_TOKENS, Segmenter
from geosurge.encoder.vision import VisionTower
from geosurge.errors import ConfigurationError
from geosurge_training.recipe import Recipe, TowerSection

_PUBLISHED: Final[Mapping[str, Callable[[], VisionConfig | SegmentationConfig]]] = {
    "openai/clip-vit-large-patch14-336": VisionConfig.clip_vit_large_336,
    "shi-labs/oneformer_ade20k_swin_large": SegmentationConfig.oneformer_ade20k_swin_large,
}
"""Configurations of the models that the paper trains with, by hub id."""


def build_encoder(recipe: Recipe) -> ImageEncoder:
    """Builds the encoder of a recipe: pretrained towers as they are, everything else at random from the recipe's seed.

    Args:
        recipe: The recipe.

    Returns:
        The encoder on the CPU.

    Raises:
        ConfigurationError: A pretrained segmenter has another number of classes than the recipe says.
        EncoderError: A backbone is unknown, or its files are not at hand.
    """
    torch.manual_seed(recipe.seed)
    section = recipe.encoder
    vision = _vision_tower(recipe)
    segmenter = _segmenter(recipe)
    config = EncoderConfig(vision.config, segmenter.config, section.fusion.config(), section.weight_dtype)
    return ImageEncoder(config, vision, segmenter)


def encoder_config(recipe: Recipe) -> EncoderConfig:
    """Finds out what an encoder is made of, without weights and without a network.

    Args:
        recipe: The recipe. Of a pretrained tower, `config.json` in its directory or in the hub's cache is enough; the
            towers of the paper are known without it.

    Returns:
        A configuration of the same size; colour statistics are not those of pretrained towers.

    Raises:
        ConfigurationError: A pretrained tower is not at hand and not known, or a hub id has no revision.
        EncoderError: A configuration is damaged.
    """
    vision, segmentation = recipe.encoder.vision, recipe.encoder.segmentation
    vision_settings = _settings(vision, "vision")
    segmentation_settings = _settings(segmentation, "segmentation")
    if vision_settings["model_type"] == "clip":
        # The files of a CLIP model hold a text tower too.
        vision_settings = {**vision_settings["vision_config"], "model_type": "clip_vision_model"}
    task_tokens = None
    if segmentation_settings["model_type"] == "oneformer":
        segmentation_settings = {**segmentation_settings, "is_training": False}
        task_tokens = ONEFORMER_TASK_TOKENS
    if segmentation.pretrained is None:
        segmentation_settings = {**segmentation_settings, "num_labels": segmentation.class_count}
    return EncoderConfig(
        VisionConfig(vision_settings, vision.image_size, frozen=vision.frozen),
        SegmentationConfig(
            segmentation_settings, segmentation.image_size, segmentation.class_count, task_tokens=task_tokens
        ),
        recipe.encoder.fusion.config(),
        recipe.encoder.weight_dtype,
    )


def _vision_tower(recipe: Recipe) -> VisionTower:
    section = recipe.encoder.vision
    if section.pretrained is not None:
        return VisionTower.from_pretrained(
            section.pretrained, section.revision, image_size=section.image_size, frozen=section.frozen
        )
    return VisionTower(VisionConfig(_plain(section.backbone), section.image_size, frozen=section.frozen))


def _segmenter(recipe: Recipe) -> Segmenter:
    section = recipe.encoder.segmentation
    if section.pretrained is not None:
        segmenter = Segmenter.from_pretrained(section.pretrained, section.revision, image_size=section.image_size)
        if segmenter.config.class_count != section.class_count:
            raise ConfigurationError(
                f"encoder.segmentation.class_count is {section.class_count}, but {section.pretrained} has "
                f"{segmenter.config.class_count} classes"
            )
        return segmenter
    backbone = {**_plain(section.backbone), "num_labels": section.class_count}
    return Segmenter(SegmentationConfig(backbone, section.image_size, section.class_count))


def _plain(backbone: dict[str, Any] | None) -> dict[str, Any]:
    assert backbone is not None  # the recipe's validator has seen to it
    return dict(backbone)


def _settings(section: TowerSection, key: str) -> Mapping[str, Any]:
    source = section.pretrained
    if source is None:
        assert section.backbone is not None  # the recipe's validator has seen to it
        return section.backbone
    if not Path(source).is_dir() and section.revision is None:
        raise ConfigurationError(
            f"encoder.{key}.pretrained: {source!r} is not a local directory; to load it from the hub give its "
            "`revision` (a commit)"
        )
    settings = read_settings(source, section.revision)
    if settings is not None:
        return settings
    if source in _PUBLISHED:
        return _PUBLISHED[source]().backbone
    raise ConfigurationError(
        f"encoder.{key}.pretrained: {source!r} is not at hand, and only {' and '.join(_PUBLISHED)} can be planned "
        "without their files; put its config.json (no weights are needed) into a directory and name that"
    )
