"""The images of a step as the step wants them: where they were taken, and something that embeds them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray

from geosurge.encoder import ImageEncoder
from geosurge_training.data.source import ImageSource, NumberedSource, prefetch
from geosurge_training.fitting.steps import Encode
from geosurge_training.fitting.tower_cache import TowerCache


@dataclass(frozen=True)
class StepImages:
    """This process's part of the batch of a step.

    Attributes:
        latitude_deg: (n,) float64.
        longitude_deg: (n,) float64.
        encode: Embeds some of them.
    """

    latitude_deg: NDArray[np.float64]
    longitude_deg: NDArray[np.float64]
    encode: Encode


def decoded_images(
    fabric: Fabric, encoder: ImageEncoder, source: ImageSource, steps: range, batch_size: int
) -> Iterator[StepImages]:
    """Images that the whole encoder embeds; they are read while the ones before them are trained on.

    Args:
        fabric: The processes that share each batch.
        encoder: What embeds them.
        source: The images.
        steps: Steps to give the images of.
        batch_size: Images in the whole batch.

    Yields:
        Each step's images.
    """
    with closing(prefetch(source, steps, batch_size, _own_rows(fabric, batch_size))) as batches:
        for batch in batches:
            pixels = batch.pixels

            def encode(rows: slice, pixels: torch.Tensor = pixels) -> torch.Tensor:
                embeddings: torch.Tensor = encoder(pixels[rows].to(fabric.device))
                return embeddings

            yield StepImages(batch.latitude_deg, batch.longitude_deg, encode)


def cached_images(
    fabric: Fabric,
    encoder: ImageEncoder,
    source: NumberedSource,
    steps: range,
    cache: TowerCache,
    *,
    batch_size: int,
    micro_batch_size: int,
) -> Iterator[StepImages]:
    """Images of which the cache knows what the towers see; those that it does not know are seen first.

    Args:
        fabric: The processes that share each batch.
        encoder: What embeds them.
        source: The images.
        steps: Steps to give the images of.
        cache: Outputs of the encoder's towers.
        batch_size: Images in the whole batch.
        micro_batch_size: Images that the towers see at once.

    Yields:
        Each step's images.
    """
    rows = _own_rows(fabric, batch_size)
    source.skip(cache.unusable())
    for step in steps:
        numbers = source.train_numbers(step, batch_size, rows)
        if not cache.has(numbers).all():
            # All of the step's images, the known ones too: arithmetic depends on the batch in the last bits, and a run
            # that was cut in the middle of a step must store what one that was not does.
            batch = source.train_batch(step, batch_size, rows)
            cache.mark_unusable(source.unusable_numbers())
            # Of what stands in for images that turned out to be unusable, as well.
            numbers = source.train_numbers(step, batch_size, rows)
            for start in range(0, len(numbers), micro_batch_size):
                part = slice(start, start + micro_batch_size)
                with torch.no_grad(), fabric.autocast():
                    seen = encoder.towers(batch.pixels[part].to(fabric.device))
                cache.add(numbers[part], batch.cut(part), seen)

        def encode(rows: slice, numbers: NDArray[np.int64] = numbers) -> torch.Tensor:
            return encoder.fuse(cache.outputs(numbers[rows], fabric.device))

        yield StepImages(*cache.coordinates(numbers), encode)


def _own_rows(fabric: Fabric, batch_size: int) -> slice:
    share = batch_size // fabric.world_size
    return slice(fabric.global_rank * share, (fabric.global_rank + 1) * share)
