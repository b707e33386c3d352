"""Batch normalisation over the parts of a batch that several processes share."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation whose statistics are those of all processes' images, of which each has as many.

    What torch has for it, `SyncBatchNorm`, is for GPUs only.
    """

    @classmethod
    def in_place_of(cls, norm: nn.BatchNorm2d) -> Self:
        """A layer with the parameters and buffers of another, the very tensors."""
        shared = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        shared.weight, shared.bias = norm.weight, norm.bias
        shared.running_mean, shared.running_var = norm.running_mean, norm.running_var
        shared.num_batches_tracked = norm.num_batches_tracked
        return shared.train(norm.training)

    def forward(self, images: Tensor) -> Tensor:
        """Normalises.

        Args:
            images: (n, c, h, w).

        Returns:
            (n, c, h, w).
        """
        if not self.training:
            return super().forward(images)
        processes = torch.distributed.get_world_size()
        count = processes * images.numel() // images.shape[1]
        values = images.float()
        mean = _sum_over_processes(values.sum(dim=(0, 2, 3))) / count
        centred = values - mean[:, None, None]
        variance = _sum_over_processes(centred.square().sum(dim=(0, 2, 3))) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked += 1
                share = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(variance * (count / (count - 1)), share)
        normalised: Tensor = centred * (variance + self.eps).rsqrt()[:, None, None]
        if self.affine:
            normalised = normalised * self.weight[:, None, None] + self.bias[:, None, None]
        return normalised.to(images.dtype)


def share_batch_norms(module: nn.Module) -> None:
    """Puts shared layers in the place of all batch normalisation in a module."""
    for name, child in list(module.named_children()):
        if type(child) is nn.BatchNorm2d:
            setattr(module, name, SharedBatchNorm2d.in_place_of(child))
        else:
            share_batch_norms(child)


class _Sum(torch.autograd.Function):
    """Sum over the processes. Each of them depends on it, so that its gradient is the sum of theirs."""

    @staticmethod
    def forward(_context: Any, values: Tensor) -> Tensor:  # noqa: ANN401 - torch does not type it
        summed = values.clone()
        torch.distributed.all_reduce(summed)
        return summed

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> Tensor:  # noqa: ANN401
        return _Sum.forward(None, gradients[0])


def _sum_over_processes(values: Tensor) -> Tensor:
    summed: Tensor = _Sum.apply(values)  # type: ignore[no-untyped-call]
    return summed
