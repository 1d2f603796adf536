"""Both losses as the equations read: complete matrices, derivatives by autograd. The oracle."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from common.collectives import DifferentiableGather, gather_rows, own_slice


def reference_loss(
    unit_MD: torch.Tensor,
    key_MD: torch.Tensor | None,
    queue_QD: torch.Tensor | None,
    positive_M: torch.Tensor,
    inv_temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """NT-Xent (arXiv 2002.05709, eq. 1) or InfoNCE (1911.05722, 2104.02057) over all processes.

    Columns are gathered *with* gradient where they have one, and so are losses, whose mean every
    process takes. The adjoint of a gather sums W gradients, so a local row receives W times the
    gradient of the global mean: the convention of :mod:`kernels.ntxent`, reached by another way.

    Args:
        unit_MD: this process's unit rows.
        key_MD: unit rows that they are compared with, which take no gradient; ``None`` for NT-Xent.
        queue_QD: with it each row is compared with its own key and these, or with these alone
            where there are no keys.
        positive_M: int64, each row's positive among the rows or keys of all, or in the queue.
        inv_temperature: 1 / tau.

    Returns:
        The global mean and top-1 accuracy, 0-d, in the dtype of ``unit_MD``. Takes O(M N) memory.
    """
    if key_MD is None:
        columns_ND = DifferentiableGather.apply(unit_MD)
        logits_MN = unit_MD @ columns_ND.T * inv_temperature
        itself_MN = torch.zeros_like(logits_MN, dtype=torch.bool)
        itself_MN[:, own_slice(len(unit_MD))].fill_diagonal_(True)
        logits_MN = logits_MN.masked_fill(itself_MN, float("-inf"))
    elif queue_QD is None:
        logits_MN = unit_MD @ gather_rows(key_MD).T * inv_temperature
    elif not len(key_MD):
        logits_MN = unit_MD @ queue_QD.T * inv_temperature
    else:
        own_M1 = (unit_MD * key_MD).sum(1, keepdim=True)
        logits_MN = torch.cat([own_M1, unit_MD @ queue_QD.T], 1) * inv_temperature
        positive_M = torch.zeros_like(positive_M)
    loss_M = cross_entropy(logits_MN, positive_M, reduction="none")
    loss = DifferentiableGather.apply(loss_M).mean()
    negatives_MN = logits_MN.detach().scatter(1, positive_M[:, None], float("-inf"))
    logit_M = logits_MN.detach().gather(1, positive_M[:, None])[:, 0]
    hit_M = (logit_M > negatives_MN.amax(1)).to(logits_MN.dtype)  # not on a tie
    return loss, gather_rows(hit_M).mean()


def unit_rows(z: torch.Tensor) -> torch.Tensor:
    """L2-normalise the last dimension in float32 (float64 stays float64).

    ``z / sqrt(max(sum z^2, 1e-12))`` as in google-research/simclr (TensorFlow's ``l2_normalize``):
    a zero row stays zero and its gradient finite. Squares of float16 values would overflow, hence
    float32. A row whose squares overflow even so, from a norm of 1.8e19 on, is NaN, as one with
    an infinite value is: a run that explodes must not look healthy.
    """
    unit: torch.Tensor = _UnitRows.apply(z.to(statistics_dtype(z.dtype)))
    return unit


class _UnitRows(torch.autograd.Function):
    """Keeps its input, which is there anyway, and a number per row; autograd would keep a copy."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor) -> torch.Tensor:
        norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
        inverse = norm.clamp_min(1e-6).reciprocal().masked_fill_(norm.isinf(), float("nan"))
        # Where the norm is held from below, it is a constant.
        ctx.save_for_backward(z, inverse, norm > 1e-6)
        return z * inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        z, inverse, varies = ctx.saved_tensors
        result = torch.empty_like(z, memory_format=torch.contiguous_format)
        parts = (t.flatten(0, -2).split(4096) for t in (result, grad, z, inverse, varies))
        for out, grad_rD, z_rD, inverse_r1, varies_r1 in zip(*parts, strict=True):
            unit_rD = z_rD * inverse_r1
            along_r1 = (grad_rD * unit_rD).sum(-1, keepdim=True) * varies_r1
            torch.sub(grad_rD, unit_rD.mul_(along_r1), out=out).mul_(inverse_r1)
        return result


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and exponentials over rows of ``dtype`` are taken in: float32, or float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
