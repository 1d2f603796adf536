"""NT-Xent as the equation reads: the complete N x N matrix, derivatives by autograd. The oracle."""

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy

from kernels.ntxent.gather import DifferentiableGather, Group, rank_and_size


def reference_nt_xent(
    unit_MD: torch.Tensor,
    temperature: float,
    *,
    group: Group = None,
    rows_per_rank: Sequence[int] | None = None,
) -> torch.Tensor:
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
        The global mean, 0-d, in the dtype of ``unit_MD``. Takes O(N^2) memory on every rank.
    """
    all_ND = DifferentiableGather.apply(unit_MD, rows_per_rank, group)
    logits_NN = all_ND @ all_ND.T / temperature
    itself_NN = torch.eye(len(all_ND), dtype=torch.bool, device=all_ND.device)
    rows = rows_per_rank or [len(unit_MD)] * rank_and_size(group)[1]
    return cross_entropy(
        logits_NN.masked_fill(itself_NN, float("-inf")),
        positive_indices(rows).to(all_ND.device),
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
    float32.
    """
    wide = z.to(statistics_dtype(z.dtype))
    return wide * wide.square().sum(-1, keepdim=True).clamp_min(1e-12).rsqrt()


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and exponentials over rows of ``dtype`` are taken in: float32, or float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
