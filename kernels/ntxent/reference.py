"""Both losses as the equations read: complete matrices, derivatives by autograd. The oracle."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from common.gather import (
    DifferentiableGather,
    Group,
    first_row,
    gather_rows,
    rank_and_size,
)


def reference_nt_xent(
    unit_MD: torch.Tensor,
    temperature: float,
    *,
    group: Group = None,
    rows_per_rank: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SimCLR eq. 1, averaged over the rows of all ranks (arXiv 2002.05709).

    Every rank gathers all N rows *with* gradient and computes the complete loss. The adjoint of the
    gather sums W equal gradients, so a local row receives W times the gradient of the global mean:
    the convention of :func:`kernels.ntxent.nt_xent`, reached by another way than there.

    Args:
        unit_MD: this rank's unit rows, the M/2 of view 0 and then those of view 1.
        temperature: tau.
        group: the process group of the loss.
        rows_per_rank: M of every rank, where they differ.

    Returns:
        The global mean and top-1 accuracy, 0-d, in the dtype of ``unit_MD``. Takes O(N^2) memory
        on every rank.
    """
    all_ND = DifferentiableGather.apply(unit_MD, rows_per_rank, group)
    logits_NN = all_ND @ all_ND.T / temperature
    itself_NN = torch.eye(len(all_ND), dtype=torch.bool, device=all_ND.device)
    rows = rows_per_rank or [len(unit_MD)] * rank_and_size(group)[1]
    logits_NN = logits_NN.masked_fill(itself_NN, float("-inf"))
    positive_N = positive_indices(rows).to(all_ND.device)
    hit_N = _nearest_is_positive(logits_NN, positive_N)
    return cross_entropy(logits_NN, positive_N), hit_N.mean()


def reference_info_nce(
    unit_MD: torch.Tensor,
    key_MD: torch.Tensor,
    temperature: float,
    *,
    positive_M: torch.Tensor | None = None,
    queue_QD: torch.Tensor | None = None,
    group: Group = None,
    rows_per_rank: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """InfoNCE with the complete matrix of this rank's queries (arXiv 1911.05722, 2104.02057).

    Args:
        unit_MD: this rank's unit queries.
        key_MD: this rank's unit keys, which take no gradient.
        temperature: tau.
        positive_M: as in :func:`kernels.ntxent.contrast.info_nce`.
        queue_QD: as there.
        group: as there.
        rows_per_rank: as there.

    Returns:
        Loss, whose gradient is W times that of the global mean, and top-1 accuracy, 0-d.
    """
    if queue_QD is None:
        columns_ND = gather_rows(key_MD, rows_per_rank, group)
        if positive_M is None:
            start = first_row(rows_per_rank, len(key_MD), group)
            positive_M = start + torch.arange(len(key_MD), device=key_MD.device)
        else:
            require_indices(positive_M, len(columns_ND))
        logits_MN = unit_MD @ columns_ND.T / temperature
    else:
        own_M1 = (unit_MD * key_MD.detach()).sum(1, keepdim=True)
        logits_MN = torch.cat([own_M1, unit_MD @ queue_QD.detach().T], 1) / temperature
        positive_M = torch.zeros(len(key_MD), dtype=torch.int64, device=key_MD.device)
    loss_M = cross_entropy(logits_MN, positive_M, reduction="none")
    hit_M = _nearest_is_positive(logits_MN, positive_M)
    # The gather's adjoint sums W equal gradients: W times the gradient of the global mean.
    loss = DifferentiableGather.apply(loss_M, rows_per_rank, group).mean()
    return loss, gather_rows(hit_M, rows_per_rank, group).mean()


def _nearest_is_positive(logits_MN: torch.Tensor, positive_M: torch.Tensor) -> torch.Tensor:
    """1 for rows whose positive has the largest logit of all, else 0 (on a tie too)."""
    index_M1 = positive_M[:, None]
    rival_M = logits_MN.scatter(1, index_M1, float("-inf")).amax(1)
    return (logits_MN.gather(1, index_M1)[:, 0] > rival_M).to(logits_MN.dtype)


def require_indices(positive_M: torch.Tensor, keys: int) -> None:
    """Fail where a positive is none of the ``keys``; on CUDA when the stream gets there.

    Without it a negative index would count from the end, and cross-entropy pass over -100.

    Raises:
        RuntimeError: on the CPU; on CUDA a later call raises it, for the host does not wait.
    """
    torch._assert_async(
        ((positive_M >= 0) & (positive_M < keys)).all(),
        f"info_nce: positive_M must name keys of all processes, 0 to {keys - 1}",
    )


def positive_indices(rows_per_rank: Sequence[int]) -> torch.Tensor:
    """Index of each row's positive among all rows, int64 ``(N,)``.

    A rank holds both views of its samples, so the positive of a row is half the rank's block away:
    for 2 ranks with 4 rows, ``[2, 3, 0, 1, 6, 7, 4, 5]``.
    """
    positive, start = [], 0
    for rows in rows_per_rank:
        positive.append(start + torch.arange(rows).roll(rows // 2))
        start += rows
    return torch.cat(positive)


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
