"""Trains the small segmenter of the Blue Marble world, on classes that come from maps instead of annotators."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from geosurge.encoder import ImageEncoder
from geosurge.encoder.segmentation import Segmenter
from geosurge.errors import ConfigurationError
from geosurge_training.aside import written_aside
from geosurge_training.data.blue_marble import CLASSES, BlueMarble
from geosurge_training.data.source import ImageSource
from geosurge_training.progress import track
from geosurge_training.recipe import Recipe
from geosurge_training.run_directory import SEGMENTER_FILE

_LOGGER = logging.getLogger(__name__)


def prepare_segmenter(recipe: Recipe, run: Path, encoder: ImageEncoder, source: ImageSource) -> None:
    """Trains the segmenter where the recipe says so and something will look at it, once a run.

    Args:
        recipe: The recipe.
        run: Directory of the run, where the segmenter's weights are kept.
        encoder: Receives them.
        source: Gives the images and their classes.

    Raises:
        ConfigurationError: The source has no classes, or another number of them than the recipe.
    """
    section = recipe.encoder.segmentation
    if section.training_steps == 0 or recipe.encoder.fusion.blocks == 0:
        return
    if not isinstance(source, BlueMarble):
        raise ConfigurationError(
            "encoder.segmentation.training_steps: this data source has no classes to train a segmenter on; "
            "give a pretrained one"
        )
    if section.class_count != len(CLASSES):
        raise ConfigurationError(
            f"encoder.segmentation.class_count is {section.class_count}, but this data source has {len(CLASSES)} "
            f"classes: {', '.join(CLASSES)}"
        )
    path = run / SEGMENTER_FILE
    if not path.exists():
        accuracy = train_segmenter(
            encoder.segmenter,
            source,
            steps=section.training_steps,
            batch_size=section.training_batch_size,
            learning_rate=section.training_learning_rate,
            seed=recipe.seed,
        )
        _LOGGER.info("segmenter: pixel accuracy %.3f on unseen views", accuracy)
        with written_aside(path) as aside:
            save_file(encoder.segmenter.backbone.state_dict(), aside)
    encoder.segmenter.backbone.load_state_dict(load_file(path))


def train_segmenter(
    segmenter: Segmenter, world: BlueMarble, *, steps: int, batch_size: int, learning_rate: float, seed: int
) -> float:
    """Trains a segmenter's backbone with per-pixel cross-entropy; it is frozen again afterwards.

    Args:
        segmenter: Segmenter with as many classes as the world has.
        world: Source of views and their classes.
        steps: Optimisation steps, with a one-cycle learning rate.
        batch_size: Views a step.
        learning_rate: Highest learning rate.
        seed: Seed of the optimisation's own randomness.

    Returns:
        Pixel accuracy on views of the next, unseen steps.
    """
    torch.manual_seed(seed)
    backbone = segmenter.backbone
    backbone.requires_grad_(requires_grad=True).train()
    optimiser = torch.optim.AdamW(backbone.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=learning_rate, total_steps=steps)
    with track("segmenter", steps) as progress:
        for step in range(steps):
            pixels, classes = world.labelled_batch(step, batch_size)
            loss = F.cross_entropy(_logits_at(segmenter, pixels, classes), classes)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            progress.advance(loss=float(loss.detach()))
    backbone.requires_grad_(requires_grad=False).eval()
    with torch.no_grad():
        pixels, classes = world.labelled_batch(steps, 512)
        return float((_logits_at(segmenter, pixels, classes).argmax(dim=1) == classes).float().mean())


def _logits_at(segmenter: Segmenter, pixels: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Logits of every pixel of the class map."""
    logits = segmenter.logits(pixels)
    return F.interpolate(logits, size=classes.shape[-2:], mode="bilinear", align_corners=False)
