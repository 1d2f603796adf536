"""The mean over the images of all processes, of losses that are each one image's."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from common.collectives import gather_rows


def global_mean(values_NK: torch.Tensor) -> torch.Tensor:
    """Means over the images of all processes, ``(K,)``: the same bits on each, for any number.

    A collective of N x K numbers. The gradient is 1/N of the upstream one for each image of this
    process, so that DDP's mean over processes is the gradient of the global mean.

    Args:
        values_NK: K numbers of each of this process's N images; N is the same on all processes.
    """
    means_K: torch.Tensor = _GlobalMean.apply(values_NK)
    return means_K


class _GlobalMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_NK: torch.Tensor) -> torch.Tensor:
        ctx.rows = len(values_NK)
        return gather_rows(values_NK).mean(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_K: torch.Tensor) -> torch.Tensor:
        return (grad_K / ctx.rows).expand(ctx.rows, -1)
