"""The loss on held-out images, which early stopping watches."""

from __future__ import annotations

import torch
from lightning_fabric import Fabric
from torch import Tensor

from geosurge_training.data.source import ImageSource
from geosurge_training.fitting.geocells import Labels, known_counts
from geosurge_training.fitting.steps import sum_over_processes
from geosurge_training.fitting.trainable import Trainable
from geosurge_training.partitions.interface import Partition


@torch.no_grad()
def held_out_loss(
    fabric: Fabric,
    model: Trainable,
    source: ImageSource,
    partition: Partition,
    *,
    count: int,
    seed: int,
    batch_size: int,
) -> Tensor:
    """Loss of each level on held-out images, against all cells whatever the training does: the softmax of inference.

    Args:
        fabric: The processes; each takes a part of the images.
        model: What is trained; left in training mode.
        source: The images.
        partition: The cells.
        count: Held-out images to take, at most.
        seed: Which of them.
        batch_size: Images that a process encodes at once.

    Returns:
        (L,) mean loss of each level, the same in every process.
    """
    model.eval()
    candidates = model.geocells.candidates(torch.empty(0), "all_cells")
    total = torch.zeros(2, len(candidates), device=fabric.device)
    for batch in source.held_out(count, seed, batch_size * fabric.world_size):
        own = batch.cut(slice(fabric.global_rank * batch_size, (fabric.global_rank + 1) * batch_size))
        if len(own.pixels) == 0:
            continue
        ordinals = torch.from_numpy(partition.assign(own.latitude_deg, own.longitude_deg)).to(fabric.device)
        with fabric.autocast():
            visual = model.encoder(own.pixels.to(fabric.device))
        total[0] += model.geocells.losses(visual, Labels(ordinals), candidates, [1] * len(candidates))
        total[1] += torch.tensor(known_counts(ordinals), device=fabric.device)
    if fabric.world_size > 1:
        sum_over_processes(fabric, [total])
    model.train()
    return total[0] / total[1].clamp(min=1)
