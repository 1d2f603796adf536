"""The sum over all processes of what each adds to a matrix of statistics."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from common.collectives import rank_and_size, sum_ranks


def global_sum(local: torch.Tensor) -> torch.Tensor:
    """``local`` of all processes added up; any shape, the same on each. A collective.

    What follows must be the same on all processes and end in the loss: then they all have one
    gradient of the sum, and the sum of theirs, which DDP's mean wants, is W times it. Backward
    is no collective. Nothing that is one process's own may be made of a sum that has a gradient.
    """
    if rank_and_size()[1] == 1:
        return local
    total: torch.Tensor = _GlobalSum.apply(local)
    return total


class _GlobalSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor) -> torch.Tensor:
        return sum_ranks(local)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * rank_and_size()[1]
