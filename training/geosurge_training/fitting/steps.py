"""Gradients of one training step, whose batch may be larger than memory and shared by several processes.

A contrastive batch cannot simply be cut: every image's loss runs over the candidates of the whole batch. GradCache
(Gao et al. 2021, arXiv 2101.06983) encodes everything once without a graph, takes the loss's gradient at the
embeddings, and sends it back through a second encoding, part by part. Here the candidates are *cells*: rows of a table,
known from the coordinates before any image is encoded. So the cache is on their side, and one encoding is enough:

1. the candidates of the whole batch are computed once and detached;
2. each part of the batch is encoded and its share of the loss is sent back at once, which collects gradients on the
   encoder and on the detached candidates;
3. the gradients are summed over the processes, and those of the candidates go on into the tables.

The gradient is that of the whole batch, exactly: a sum over images, each of which saw all negatives. Activations are
kept for one part at a time. (Only batch normalisation in a tower that is trained sees the part and not the batch, as
with GradCache.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from geosurge_training.fitting.geocells import Labels, Negatives, known_counts
from geosurge_training.fitting.label_smoothing import LabelSmoothing
from geosurge_training.fitting.trainable import Trainable

Encode = Callable[[slice], Tensor]
"""From rows of this process's part of a batch to their (n, d) visual embeddings, with a graph."""


def compute_gradients(
    fabric: Fabric,
    model: Trainable,
    encode: Encode,
    labels: Labels,
    *,
    negatives: Negatives,
    micro_batch_size: int,
    seed: Callable[[int], int],
    smoothing: LabelSmoothing | None = None,
) -> Tensor:
    """Leaves the gradient of a whole batch's loss on the parameters, the same in every process.

    Args:
        fabric: The processes; their parts of the batch have one size and follow each other by rank.
        model: What is trained.
        encode: Embeds images of this process's part of the batch.
        labels: Where the images of this part were taken.
        negatives: Which cells stand in the denominator.
        micro_batch_size: Images that are encoded at once.
        seed: Seed of the randomness (dropout) of the images from a position in the whole batch on.
        smoothing: Soft targets.

    Returns:
        (L,) loss of each level of the whole batch.
    """
    model.zero_grad(set_to_none=True)
    count = len(labels.ordinals)
    whole = _of_all_processes(fabric, labels.ordinals)
    counts = known_counts(whole)
    attached = model.geocells.candidates(whole, negatives)
    candidates = [candidate.detached() for candidate in attached]
    total = torch.zeros(len(candidates), device=labels.ordinals.device)
    for start in range(0, count, micro_batch_size):
        rows = slice(start, start + micro_batch_size)
        torch.manual_seed(seed(fabric.global_rank * count + start))
        with fabric.autocast():
            visual = encode(rows)
        losses = model.geocells.losses(visual, labels.cut(rows), candidates, counts, smoothing)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        total += losses.detach()
    cached = [_gradient(candidate.embeddings) for candidate in candidates]
    if fabric.world_size > 1:
        temperatures = model.geocells.log_temperatures
        temperatures.grad = _gradient(temperatures) if temperatures.requires_grad else None
        own = (parameter.grad for parameter in model.parameters())
        sum_over_processes(fabric, [total, *cached, *(gradient for gradient in own if gradient is not None)])
    torch.autograd.backward([candidate.embeddings for candidate in attached], cached)
    return total


def part_seed(seed: int, step: int, position: int) -> int:
    """Seed of the randomness of a part of a batch: one of its own for each run, step and position in the batch."""
    if position == 0:
        return seed * 1_000_003 + step
    # Torch's CPU generator looks at the lower 32 bits only, so they have to be mixed.
    return int(np.random.SeedSequence([seed, step, position]).generate_state(1)[0])


def _of_all_processes(fabric: Fabric, own: Tensor) -> Tensor:
    """Rows of all processes in the order of their ranks, (p * n, ...) from (n, ...)."""
    rows = torch.zeros(fabric.world_size, *own.shape, dtype=own.dtype, device=own.device)
    rows[fabric.global_rank] = own
    if fabric.world_size > 1:
        sum_over_processes(fabric, [rows])
    return rows.flatten(0, 1)


def sum_over_processes(fabric: Fabric, tensors: Iterable[Tensor]) -> None:
    """Replaces tensors of one type, in place, by their sums over the processes, in one message."""
    tensors = list(tensors)
    summed = fabric.all_reduce(torch.cat([tensor.reshape(-1) for tensor in tensors]), reduce_op="sum")
    assert isinstance(summed, Tensor)
    for tensor, values in zip(tensors, torch.split(summed, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(values.view_as(tensor))


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
