"""Trains the small segmenter of the Blue Marble world, on classes that come from maps instead of annotators."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from geosurge.encoder.segmentation import Segmenter
from geosurge_training.blue_marble import BlueMarble
from geosurge_training.progress import track


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
