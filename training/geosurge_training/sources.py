"""The data source and the encoder that a recipe asks for."""

from __future__ import annotations

from typing import Any

import torch

from geosurge.encoder import EncoderConfig, ImageEncoder, SegmentationConfig, VisionConfig
from geosurge.encoder.segmentation import Segmenter
from geosurge.encoder.vision import VisionTower
from geosurge.errors import ConfigurationError
from geosurge_training.blue_marble import BlueMarble
from geosurge_training.csv_images import CsvImages
from geosurge_training.data import ImageSource
from geosurge_training.recipe import BlueMarbleData, Recipe


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


def open_source(recipe: Recipe, encoder: ImageEncoder) -> ImageSource:
    """Opens the data source of a recipe.

    Args:
        recipe: The recipe.
        encoder: The encoder that the images are prepared for.

    Returns:
        The source.

    Raises:
        ConfigurationError: Its files or packages are not at hand.
    """
    data = recipe.data
    if isinstance(data, BlueMarbleData):
        return BlueMarble(encoder.image_size, seed=recipe.seed, partition_samples=data.partition_samples)
    return CsvImages(
        data.csv,
        data.images,
        decode=encoder.preprocessing.decode,
        seed=recipe.seed,
        held_out_share=data.held_out_share,
        max_bad_share=data.max_bad_share,
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
