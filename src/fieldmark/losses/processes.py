"""What a loss needs of the other processes, so that all together compute what one would on the joint batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from fieldmark.losses.metric import gather_with_gradient


def processes() -> int:
    """How many processes train together; 1 outside a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(tensor: Tensor) -> Tensor:
    """``[sum of M, ...]`` rows of every process by rank, where each may have another number of them.

    Shorter ones are padded for the journey. Gradients flow back to the process that a row came from, summed over all
    that used it.
    """
    if processes() == 1:
        return tensor
    sizes = gather_with_gradient(torch.tensor([len(tensor)], device=tensor.device))
    longest = int(sizes.max())
    padding = (0, 0) * (tensor.ndim - 1) + (0, longest - len(tensor))
    rows = gather_with_gradient(F.pad(tensor, padding))
    real = torch.arange(longest, device=tensor.device) < sizes[:, None]
    return rows[real.reshape(-1)]


def averaged_gradient(tensor: Tensor) -> Tensor:
    """The tensor itself; its gradient is the mean over all processes."""
    return tensor if processes() == 1 else _AveragedGradient.apply(tensor)


class _AveragedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total / processes()
