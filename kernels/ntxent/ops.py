"""NT-Xent as a custom operation, which ``torch.compile`` takes without a graph break.

It is one operation with its collectives inside: the compiler sees neither the gather nor the
tiles, and cannot move one against the other. That is what lets the gather of the rows run while
the own block is computed. A process group travels by its name, since an operation takes no objects.

The operations are ``widebatch::ntxent`` and ``widebatch::ntxent_gradient``. The functions that they
run stand beside them, undecorated: :func:`ntxent_forward` and so on. InfoNCE's are made alike, in
:mod:`kernels.ntxent.info_nce_ops`.
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
from kernels.ntxent.implementations import kernels_for
from kernels.ntxent.reference import statistics_dtype
from kernels.ntxent.rivals import told_apart

__all__ = [
    "all_rows",
    "ntxent",
    "ntxent_forward",
    "ntxent_gradient",
    "ntxent_gradient_rows",
    "own_storage",
    "refuse_second_derivative",
]


def ntxent_forward(
    unit_MD: torch.Tensor,
    factor_dtype: torch.dtype,
    inv_temperature: float,
    rows_per_rank: Sequence[int] | None,
    group: str,
    block_size: int | None,
    implementation: str,
    accuracy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss over all ranks, and what backward needs of the others.

    Args:
        unit_MD: this rank's unit rows, view 0's and then view 1's, float32 or float64.
        factor_dtype: what they are rounded to as factors of the products.
        inv_temperature: 1 / tau.
        rows_per_rank: M of every rank, where they differ.
        group: name of the process group, empty for this process alone.
        block_size: rows and columns of a tile.
        implementation: ``"auto"``, ``"blocked"`` or ``"triton"``.
        accuracy: whether to count the anchors whose positive is the nearest.

    Returns:
        Loss and accuracy, 0-d (accuracy 0 where it was not asked for); all rows in
        ``factor_dtype``, ``(N, D)``; their log-sum-exps, ``(N,)``.
    """
    local_MD = unit_MD.to(factor_dtype)
    kernels = kernels_for(local_MD, implementation, "ntxent")
    gathering = start_gather(local_MD, rows_per_rank, group_named(group))
    # While the other ranks' rows travel: the own block, where the matrix is symmetric.
    itself = slice(0, len(local_MD))
    index_M = torch.arange(len(local_MD), device=local_MD.device).roll(len(local_MD) // 2)
    lse_M, rival_M = kernels.row_statistics(
        local_MD, itself, inv_temperature, index_M if accuracy else None, block_size
    )
    all_ND = gathering.wait()
    start = first_row(rows_per_rank, len(local_MD), group_named(group))
    for others in (all_ND[:start], all_ND[start + len(local_MD) :]):
        if len(others):
            # No column there is a positive: -1 is no index.
            nowhere = torch.full_like(index_M, -1) if accuracy else None
            other_lse_M, other_rival_M = kernels.cross_statistics(
                local_MD, others, inv_temperature, nowhere, block_size
            )
            lse_M = torch.logaddexp(lse_M, other_lse_M)
            if rival_M is not None and other_rival_M is not None:
                rival_M = torch.maximum(rival_M, other_rival_M)
    one_BD, other_BD = local_MD.to(lse_M.dtype).chunk(2)
    positive_M = (one_BD * other_BD).sum(1).repeat(2) * inv_temperature
    columns = [lse_M, positive_M]
    if rival_M is not None:
        columns.append(told_apart(positive_M, rival_M, lse_M))
    # Not one mean per process and a sum of means: gathered rows make the value equal on all.
    lse_N, positive_N, *hit_N = gather_rows(
        torch.stack(columns, dim=1), rows_per_rank, group_named(group)
    ).unbind(1)
    loss = (lse_N - positive_N).mean()
    hits = hit_N[0].mean() if hit_N else torch.zeros_like(loss)
    return loss, hits, own_storage(all_ND, unit_MD), lse_N.contiguous()


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


@library.custom_op("widebatch::ntxent", mutates_args=())
def ntxent(
    unit_MD: torch.Tensor,
    factor_dtype: torch.dtype,
    inv_temperature: float,
    rows_per_rank: Sequence[int] | None,
    group: str,
    block_size: int | None,
    implementation: str,
    accuracy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
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
            accuracy,
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
    accuracy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    count = all_rows(unit_MD, rows_per_rank, group_named(group))
    dtype = statistics_dtype(factor_dtype)
    return (
        unit_MD.new_empty((), dtype=dtype),
        unit_MD.new_empty((), dtype=dtype),
        unit_MD.new_empty((count, unit_MD.shape[1]), dtype=factor_dtype),
        unit_MD.new_empty((count,), dtype=dtype),
    )


@library.custom_op("widebatch::ntxent_gradient", mutates_args=())
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
    unit_MD, _, inv_temperature, rows_per_rank, group, block_size, implementation, _ = inputs
    _, hits, all_ND, lse_N = output
    ctx.mark_non_differentiable(hits, all_ND, lse_N)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(all_ND, lse_N)
    ctx.start = first_row(rows_per_rank, unit_MD.shape[0], group_named(group))
    ctx.stop = ctx.start + unit_MD.shape[0]
    ctx.world_size = rank_and_size(group_named(group))[1]
    ctx.inv_temperature, ctx.block_size = inv_temperature, block_size
    ctx.implementation = implementation


def _ntxent_backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    refuse_second_derivative()
    if grad is None:
        return (None,) * 8
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
    return (grad_MD, *(None,) * 7)


ntxent.register_autograd(_ntxent_backward, setup_context=_keep_for_ntxent)


def refuse_second_derivative() -> None:
    """Backward runs with gradients enabled where ``create_graph=True`` was asked for.

    Its operations would count as constants there, and the second derivative be silently wrong.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("the contrastive losses have no second derivative (create_graph=True)")


def all_rows(local: torch.Tensor, rows_per_rank: Sequence[int] | None, group: Group) -> int:
    """Rows of all processes together: as told, or this process's times their number."""
    if rows_per_rank is not None:
        return sum(rows_per_rank)
    return local.shape[0] * rank_and_size(group)[1]


def own_storage(gathered: torch.Tensor, argument: torch.Tensor) -> torch.Tensor:
    """Gathered rows, copied where they are the argument: an operation returns no view of that."""
    if gathered.data_ptr() != argument.data_ptr():
        return gathered.contiguous()
    return gathered.clone(memory_format=torch.contiguous_format)
