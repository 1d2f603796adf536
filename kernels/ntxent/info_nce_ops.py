"""InfoNCE as a custom operation, made as :mod:`kernels.ntxent.ops` makes NT-Xent's.

The operations are ``widebatch::info_nce`` and ``widebatch::info_nce_gradient``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import library

from common.gather import (
    Group,
    first_row,
    gather_rows,
    group_named,
    rank_and_size,
    start_gather,
)
from kernels.ntxent.implementations import RowKernels, kernels_for
from kernels.ntxent.ops import all_rows, own_storage, refuse_second_derivative
from kernels.ntxent.reference import require_indices, statistics_dtype
from kernels.ntxent.rivals import told_apart

__all__ = ["info_nce", "info_nce_forward", "info_nce_gradient"]


def info_nce_forward(
    query_MD: torch.Tensor,
    key_MD: torch.Tensor,
    queue_QD: torch.Tensor | None,
    positive_M: torch.Tensor | None,
    inv_temperature: float,
    rows_per_rank: Sequence[int] | None,
    group: str,
    block_size: int | None,
    implementation: str,
    accuracy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss over all ranks' queries, and what backward needs.

    Args:
        query_MD: this rank's unit queries, in the dtype of the factors.
        key_MD: this rank's unit keys, the same dtype.
        queue_QD: with it a query is compared with its own key and the queue, without it with all
            ranks' keys.
        positive_M: without a queue, int64, each query's key among all ranks' keys; ``None`` takes
            this rank's in order.
        inv_temperature: 1 / tau.
        rows_per_rank: M of every rank, where they differ.
        group: name of the process group, empty for this process alone.
        block_size: rows and columns of a tile.
        implementation: ``"auto"``, ``"blocked"`` or ``"triton"``.
        accuracy: whether to count the queries whose key is the nearest.

    Returns:
        Loss and accuracy, 0-d (accuracy 0 where it was not asked for); the columns the queries
        were compared with; log-sum-exps, ``(M,)``; the positive keys ``(M, D)``.
    """
    kernels = kernels_for(query_MD, implementation, "info_nce")
    options = (inv_temperature, block_size, accuracy)
    if queue_QD is None:
        columns_ND, own_positive_M, lse_M, rival_M = _against_all_keys(
            kernels, query_MD, key_MD, positive_M, rows_per_rank, group_named(group), *options
        )
        if positive_M is not None:
            require_indices(positive_M, len(columns_ND))
        positive_MD = columns_ND[own_positive_M]
    else:
        # Kept for backward, before which MoCo overwrites the oldest keys of the queue.
        columns_ND, positive_MD = queue_QD.clone(), key_MD.clone()
        nowhere = torch.full((len(query_MD),), -1, device=query_MD.device) if accuracy else None
        lse_M, rival_M = kernels.cross_statistics(
            query_MD, queue_QD, inv_temperature, nowhere, block_size
        )
    wide_MD = query_MD.to(lse_M.dtype)
    logit_M = (wide_MD * positive_MD.to(lse_M.dtype)).sum(1) * inv_temperature
    if queue_QD is not None:
        lse_M = torch.logaddexp(lse_M, logit_M)
    hit_M = told_apart(logit_M, rival_M, lse_M)
    loss, hits = (
        gather_rows(torch.stack([lse_M - logit_M, hit_M], 1), rows_per_rank, group_named(group))
        .mean(0)
        .unbind()
    )
    return loss.clone(), hits.clone(), columns_ND, lse_M, positive_MD


def _against_all_keys(
    kernels: RowKernels,
    query_MD: torch.Tensor,
    key_MD: torch.Tensor,
    positive_M: torch.Tensor | None,
    rows_per_rank: Sequence[int] | None,
    group: Group,
    inv_temperature: float,
    block_size: int | None,
    accuracy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """All keys, positives among them, and the queries' statistics over them."""
    gathering = start_gather(key_MD, rows_per_rank, group)
    start = first_row(rows_per_rank, len(key_MD), group)
    if positive_M is None:
        positive_M = start + torch.arange(len(key_MD), device=key_MD.device)

    def statistics(columns_ND: torch.Tensor, first: int) -> tuple[Any, Any]:
        # Among these columns; an index outside of them is none of theirs.
        positive = positive_M - first if accuracy else None
        return kernels.cross_statistics(query_MD, columns_ND, inv_temperature, positive, block_size)

    lse_M, rival_M = statistics(key_MD, start)  # while the other ranks' keys travel
    all_ND = gathering.wait()
    for others, first in (
        (all_ND[:start], 0),
        (all_ND[start + len(key_MD) :], start + len(key_MD)),
    ):
        if len(others):
            other_lse_M, other_rival_M = statistics(others, first)
            lse_M = torch.logaddexp(lse_M, other_lse_M)
            rival_M = torch.maximum(rival_M, other_rival_M) if accuracy else None
    return own_storage(all_ND, key_MD), positive_M, lse_M, rival_M


def info_nce_gradient_rows(
    query_MD: torch.Tensor,
    columns_ND: torch.Tensor,
    lse_M: torch.Tensor,
    positive_MD: torch.Tensor,
    with_queue: bool,
    inv_temperature: float,
    block_size: int | None,
    implementation: str,
) -> torch.Tensor:
    """``sum_j p_ij k_j - k_pos(i)``: tau times the derivative of a query's loss by the query."""
    kernels = kernels_for(query_MD, implementation, "info_nce")
    gradient_MD = kernels.cross_gradient(query_MD, columns_ND, lse_M, inv_temperature, block_size)
    positive_MD = positive_MD.to(lse_M.dtype)
    if not with_queue:
        return gradient_MD.sub_(positive_MD)
    # The own key is no column of the queue: p_pos k_pos - k_pos.
    logit_M = (query_MD.to(lse_M.dtype) * positive_MD).sum(1) * inv_temperature
    return gradient_MD.add_(torch.expm1(logit_M - lse_M)[:, None] * positive_MD)


@library.custom_op("widebatch::info_nce", mutates_args=())
def info_nce(
    unit_MD: torch.Tensor,
    key_MD: torch.Tensor,
    queue_QD: torch.Tensor | None,
    positive_M: torch.Tensor | None,
    factor_dtype: torch.dtype,
    inv_temperature: float,
    rows_per_rank: Sequence[int] | None,
    group: str,
    block_size: int | None,
    implementation: str,
    accuracy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`info_nce_forward` of queries rounded to ``factor_dtype``, with its derivative."""
    with torch.autocast(unit_MD.device.type, enabled=False):
        return info_nce_forward(
            unit_MD.to(factor_dtype),
            key_MD,
            queue_QD,
            positive_M,
            inv_temperature,
            rows_per_rank,
            group,
            block_size,
            implementation,
            accuracy,
        )


@info_nce.register_fake
def _(
    unit_MD: torch.Tensor,
    key_MD: torch.Tensor,
    queue_QD: torch.Tensor | None,
    positive_M: torch.Tensor | None,
    factor_dtype: torch.dtype,
    inv_temperature: float,
    rows_per_rank: Sequence[int] | None,
    group: str,
    block_size: int | None,
    implementation: str,
    accuracy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    count = all_rows(key_MD, rows_per_rank, group_named(group))
    columns = count if queue_QD is None else queue_QD.shape[0]
    dtype = statistics_dtype(factor_dtype)
    return (
        unit_MD.new_empty((), dtype=dtype),
        unit_MD.new_empty((), dtype=dtype),
        unit_MD.new_empty((columns, unit_MD.shape[1]), dtype=factor_dtype),
        unit_MD.new_empty((unit_MD.shape[0],), dtype=dtype),
        unit_MD.new_empty(unit_MD.shape, dtype=factor_dtype),
    )


@library.custom_op("widebatch::info_nce_gradient", mutates_args=())
def info_nce_gradient(
    query_MD: torch.Tensor,
    columns_ND: torch.Tensor,
    lse_M: torch.Tensor,
    positive_MD: torch.Tensor,
    with_queue: bool,
    inv_temperature: float,
    block_size: int | None,
    implementation: str,
) -> torch.Tensor:
    """:func:`info_nce_gradient_rows`."""
    with torch.autocast(query_MD.device.type, enabled=False):
        return info_nce_gradient_rows(
            query_MD,
            columns_ND,
            lse_M,
            positive_MD,
            with_queue,
            inv_temperature,
            block_size,
            implementation,
        )


@info_nce_gradient.register_fake
def _(
    query_MD: torch.Tensor,
    columns_ND: torch.Tensor,
    lse_M: torch.Tensor,
    positive_MD: torch.Tensor,
    with_queue: bool,
    inv_temperature: float,
    block_size: int | None,
    implementation: str,
) -> torch.Tensor:
    return lse_M.new_empty(query_MD.shape)


def _keep_for_info_nce(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    unit_MD, key_MD, queue_QD, _, factor_dtype, inv_temperature, rows_per_rank, group = inputs[:8]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(unit_MD, *output[2:])
    ctx.factor_dtype, ctx.with_queue = factor_dtype, queue_QD is not None
    ctx.count = all_rows(key_MD, rows_per_rank, group_named(group))
    ctx.world_size = rank_and_size(group_named(group))[1]
    ctx.inv_temperature, ctx.block_size, ctx.implementation = inv_temperature, *inputs[8:10]


def _info_nce_backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    refuse_second_derivative()
    if grad is None:
        return (None,) * 11
    unit_MD, columns_ND, lse_M, positive_MD = ctx.saved_tensors
    grad_MD = info_nce_gradient(
        unit_MD.to(ctx.factor_dtype),
        columns_ND,
        lse_M,
        positive_MD,
        ctx.with_queue,
        ctx.inv_temperature,
        ctx.block_size,
        ctx.implementation,
    )
    grad_MD = grad_MD.mul_(grad * (ctx.world_size * ctx.inv_temperature / ctx.count))
    return (grad_MD, *(None,) * 10)


info_nce.register_autograd(_info_nce_backward, setup_context=_keep_for_info_nce)
