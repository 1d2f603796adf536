"""NT-Xent and InfoNCE as custom operations, which ``torch.compile`` takes without a graph break.

Each is one operation with its collectives inside: the compiler sees neither the gather nor the
tiles, and cannot move one against the other. That is what lets the gather of the rows run while
the own block is computed. A process group travels by its name, since an operation takes no objects.

The operations are ``widebatch::ntxent``, ``widebatch::ntxent_gradient``, ``widebatch::info_nce``
and ``widebatch::info_nce_gradient``. The functions that they run stand beside them, undecorated:
:func:`ntxent_forward` and so on.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.library import custom_op

from kernels.ntxent.gather import (
    Group,
    first_row,
    gather_rows,
    group_named,
    rank_and_size,
    start_gather,
)
from kernels.ntxent.implementations import RowKernels, kernels_for
from kernels.ntxent.reference import statistics_dtype

__all__ = ["info_nce", "info_nce_forward", "ntxent", "ntxent_forward"]


# --- NT-Xent --------------------------------------------------------------------------------------


def ntxent_forward(
    unit_MD: torch.Tensor,
    factor_dtype: torch.dtype,
    inv_temperature: float,
    rows_per_rank: Sequence[int] | None,
    group: str,
    block_size: int | None,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss over all ranks, and what backward needs of the others.

    Args:
        unit_MD: this rank's unit rows, view 0's and then view 1's, float32 or float64.
        factor_dtype: what they are rounded to as factors of the products.
        inv_temperature: 1 / tau.
        rows_per_rank: M of every rank, where they differ.
        group: name of the process group, empty for this process alone.
        block_size: rows and columns of a tile.
        implementation: ``"auto"``, ``"blocked"`` or ``"triton"``.

    Returns:
        The loss, 0-d; all rows in ``factor_dtype``, ``(N, D)``; their log-sum-exps, ``(N,)``.
    """
    local_MD = unit_MD.to(factor_dtype)
    kernels = kernels_for(local_MD, implementation, "ntxent")
    gathering = start_gather(local_MD, rows_per_rank, group_named(group))
    # While the other ranks' rows travel: the own block, where the matrix is symmetric.
    itself = slice(0, len(local_MD))
    lse_M = kernels.row_logsumexp(local_MD, itself, inv_temperature, block_size)
    all_ND = gathering.wait()
    start = first_row(rows_per_rank, len(local_MD), group_named(group))
    for others in (all_ND[:start], all_ND[start + len(local_MD) :]):
        if len(others):
            other_M, _ = kernels.cross_statistics(
                local_MD, others, inv_temperature, None, block_size
            )
            lse_M = torch.logaddexp(lse_M, other_M)
    one_BD, other_BD = local_MD.to(lse_M.dtype).chunk(2)
    positive_M = (one_BD * other_BD).sum(1).repeat(2) * inv_temperature
    # Not one mean per process and a sum of means: gathered rows make the value equal on all.
    lse_N, positive_N = gather_rows(
        torch.stack([lse_M, positive_M], dim=1), rows_per_rank, group_named(group)
    ).unbind(1)
    loss = (lse_N - positive_N).mean()
    return loss, _own_storage(all_ND, unit_MD), lse_N.contiguous()


def ntxent_gradient_rows(
    all_ND: torch.Tensor,
    lse_N: torch.Tensor,
    start: int,
    stop: int,
    inv_temperature: float,
    block_size: int | None,
    implementation: str,
) -> torch.Tensor:
    """``sum_{j != i} (p_ij + p_ji) u_j - 2 u_pos(i)`` for rows ``start`` to ``stop``."""
    kernels = kernels_for(all_ND, implementation, "ntxent")
    own = slice(start, stop)
    gradient_MD = kernels.row_gradient(all_ND, own, lse_N, inv_temperature, block_size)
    for half_BD, positive_BD in zip(gradient_MD.chunk(2), reversed(all_ND[own].chunk(2))):
        half_BD.sub_(positive_BD, alpha=2)
    return gradient_MD


@custom_op("widebatch::ntxent", mutates_args=())
def ntxent(
    unit_MD: torch.Tensor,
    factor_dtype: torch.dtype,
    inv_temperature: float,
    rows_per_rank: Sequence[int] | None,
    group: str,
    block_size: int | None,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`ntxent_forward`, with its derivative by ``unit_MD``."""
    with torch.autocast(unit_MD.device.type, enabled=False):
        return ntxent_forward(
            unit_MD,
            factor_dtype,
            inv_temperature,
            rows_per_rank,
            group,
            block_size,
            implementation,
        )


@ntxent.register_fake
def _(
    unit_MD: torch.Tensor,
    factor_dtype: torch.dtype,
    inv_temperature: float,
    rows_per_rank: Sequence[int] | None,
    group: str,
    block_size: int | None,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    count = _all_rows(unit_MD, rows_per_rank, group_named(group))
    dtype = statistics_dtype(factor_dtype)
    return (
        unit_MD.new_empty((), dtype=dtype),
        unit_MD.new_empty((count, unit_MD.shape[1]), dtype=factor_dtype),
        unit_MD.new_empty((count,), dtype=dtype),
    )


@custom_op("widebatch::ntxent_gradient", mutates_args=())
def ntxent_gradient(
    all_ND: torch.Tensor,
    lse_N: torch.Tensor,
    start: int,
    stop: int,
    inv_temperature: float,
    block_size: int | None,
    implementation: str,
) -> torch.Tensor:
    """:func:`ntxent_gradient_rows`."""
    with torch.autocast(all_ND.device.type, enabled=False):
        return ntxent_gradient_rows(
            all_ND, lse_N, start, stop, inv_temperature, block_size, implementation
        )


@ntxent_gradient.register_fake
def _(
    all_ND: torch.Tensor,
    lse_N: torch.Tensor,
    start: int,
    stop: int,
    inv_temperature: float,
    block_size: int | None,
    implementation: str,
) -> torch.Tensor:
    return lse_N.new_empty((stop - start, all_ND.shape[1]))


def _keep_for_ntxent(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    unit_MD, _, inv_temperature, rows_per_rank, group, block_size, implementation = inputs
    _, all_ND, lse_N = output
    ctx.mark_non_differentiable(all_ND, lse_N)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(all_ND, lse_N)
    ctx.start = first_row(rows_per_rank, unit_MD.shape[0], group_named(group))
    ctx.stop = ctx.start + unit_MD.shape[0]
    ctx.world_size = rank_and_size(group_named(group))[1]
    ctx.inv_temperature, ctx.block_size = inv_temperature, block_size
    ctx.implementation = implementation


def _ntxent_backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    _refuse_second_derivative()
    if grad is None:
        return (None,) * 7
    all_ND, lse_N = ctx.saved_tensors
    grad_MD = ntxent_gradient(
        all_ND,
        lse_N,
        ctx.start,
        ctx.stop,
        ctx.inv_temperature,
        ctx.block_size,
        ctx.implementation,
    )
    # W: DistributedDataParallel averages (see the package's docstring).
    grad_MD = grad_MD.mul_(grad * (ctx.world_size * ctx.inv_temperature / all_ND.shape[0]))
    return grad_MD, None, None, None, None, None, None


ntxent.register_autograd(_ntxent_backward, setup_context=_keep_for_ntxent)


def _refuse_second_derivative() -> None:
    """Backward runs with gradients enabled where ``create_graph=True`` was asked for.

    Its operations would count as constants there, and the second derivative be silently wrong.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("the contrastive losses have no second derivative (create_graph=True)")


def _all_rows(local: torch.Tensor, rows_per_rank: Sequence[int] | None, group: Group) -> int:
    if rows_per_rank is not None:
        return sum(rows_per_rank)
    return local.shape[0] * rank_and_size(group)[1]


def _own_storage(gathered: torch.Tensor, argument: torch.Tensor) -> torch.Tensor:
    """Gathered rows, copied where they are the argument: an operation returns no view of that."""
    if gathered.data_ptr() != argument.data_ptr():
        return gathered.contiguous()
    return gathered.clone(memory_format=torch.contiguous_format)


# --- InfoNCE --------------------------------------------------------------------------------------


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
    hit_M = torch.zeros_like(logit_M) if rival_M is None else (logit_M > rival_M).to(lse_M.dtype)
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
    return _own_storage(all_ND, key_MD), positive_M, lse_M, rival_M


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


@custom_op("widebatch::info_nce", mutates_args=())
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
    count = _all_rows(key_MD, rows_per_rank, group_named(group))
    columns = count if queue_QD is None else queue_QD.shape[0]
    dtype = statistics_dtype(factor_dtype)
    return (
        unit_MD.new_empty((), dtype=dtype),
        unit_MD.new_empty((), dtype=dtype),
        unit_MD.new_empty((columns, unit_MD.shape[1]), dtype=factor_dtype),
        unit_MD.new_empty((unit_MD.shape[0],), dtype=dtype),
        unit_MD.new_empty(unit_MD.shape, dtype=factor_dtype),
    )


@custom_op("widebatch::info_nce_gradient", mutates_args=())
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
    ctx.count = _all_rows(key_MD, rows_per_rank, group_named(group))
    ctx.world_size = rank_and_size(group_named(group))[1]
    ctx.inv_temperature, ctx.block_size, ctx.implementation = inv_temperature, *inputs[8:10]


def _info_nce_backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    _refuse_second_derivative()
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
