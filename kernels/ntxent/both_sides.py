"""InfoNCE whose keys take a gradient as well, as predictive coding asks (arXiv 1807.03748).

For unit queries q and keys k of all processes, any number of each::

    L = 1/M sum_i lse_i,    lse_i = log sum_j exp(q_i . k_j / tau)
    dL/dq_i = 1/(M tau) sum_j p_ij k_j,    dL/dk_j = 1/(M tau) sum_i p_ij q_i

The second sum is one of NT-Xent's, whose rows are columns of others too: among queries of a known
log-sum-exp, keys stand as rows of an infinite one, which takes their own sum and each other away.

Shapes: M queries and K keys of this process, N keys of all, D dimensions.
"""

from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from common.collectives import gather_rows, own_slice, rank_and_size
from kernels.ntxent import ops
from kernels.ntxent.reference import unit_rows


def mean_log_sum_exp(
    queries_MD: torch.Tensor,
    keys_KD: torch.Tensor,
    positive_M: torch.Tensor,
    settings: ops.Settings,
) -> tuple[torch.Tensor, torch.Tensor]:
    """L, and the share of queries that no key is as near to as their positive. A collective.

    InfoNCE is L less the mean logit of the positives, which is whoever calls's to take away: of his
    own rows, in an order that he knows.

    Args:
        queries_MD: before normalisation, any floating dtype; as many on each process.
        keys_KD: as the queries.
        positive_M: int64, each query's key among those of all processes.
        settings: of the kernels.

    Returns:
        0-d, equal on all processes. The gradient is W times that of the global mean, as
        :func:`kernels.ntxent.nt_xent` has it.
    """
    with torch.autocast(queries_MD.device.type, enabled=False):
        units = unit_rows(queries_MD), unit_rows(keys_KD)
        dtype = torch.promote_types(queries_MD.dtype, keys_KD.dtype)
        value, accuracy = _BothSides.apply(*units, positive_M, dtype, settings)
    return value, accuracy


class _BothSides(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries_MD: torch.Tensor,
        keys_KD: torch.Tensor,
        positive_M: torch.Tensor,
        dtype: torch.dtype,
        settings: ops.Settings,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows_MD, keys_KD = queries_MD.to(dtype), keys_KD.to(dtype)
        _, accuracy, columns_ND, lse_M = ops.loss(
            queries_MD, keys_KD, None, positive_M, dtype, *settings
        )
        ctx.save_for_backward(rows_MD, columns_ND, lse_M)
        ctx.settings, ctx.keys = settings, len(keys_KD)
        ctx.mark_non_differentiable(accuracy)
        return gather_rows(lse_M[:, None]).mean(), accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:
        rows_MD, columns_ND, lse_M = ctx.saved_tensors
        given = ctx.settings
        kernels = ops.kernels_for(rows_MD, given.implementation)
        sums = partial(
            kernels.gradient,
            inv_temperature=given.inv_temperature,
            block_size=given.block_size,
        )
        of_queries_MD = sums(rows_MD, columns_ND, lse_M)
        all_rows_RD, all_lse_R = gather_rows(rows_MD), gather_rows(lse_M)
        keys_KD = columns_ND[own_slice(ctx.keys)]
        known = torch.cat([all_lse_R, torch.full_like(lse_M[:1], torch.inf).expand(ctx.keys)])
        among = slice(len(all_rows_RD), len(known))
        of_keys_KD = sums(keys_KD, torch.cat([all_rows_RD, keys_KD]), known, own=among)
        scale = grad * given.inv_temperature * rank_and_size()[1] / len(all_rows_RD)
        return of_queries_MD * scale, of_keys_KD * scale, None, None, None
