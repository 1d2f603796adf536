"""NT-Xent, SimCLR's loss (arXiv 2002.05709, eq. 1), over the samples of all processes.

For N unit rows u (two views of every sample of every process) and temperature tau::

    s_ij = u_i . u_j / tau
    lse_i = log sum_{j != i} exp(s_ij)
    loss = 1/N sum_i (lse_i - s_i,pos(i))

**The gradient takes one gather.** Row i stands in the loss as an anchor, as a negative of all other
anchors, and as the positive of its positive. With ``p_ij = exp(s_ij - lse_i)``::

    dloss/du_i = 1/(N tau) [ sum_{j != i} (p_ij + p_ji) u_j - 2 u_pos(i) ]

``s`` is symmetric, so ``p_ji = exp(s_ij - lse_j)``: given all rows and all N log-sum-exps, a
process computes the *complete* derivative of the global loss by its own rows. Forward gathers the
rows and then two floats per row; backward communicates nothing, where a differentiable gather
would reduce-scatter N x D gradients.

**Scale.** DistributedDataParallel averages parameter gradients over W processes:
``1/W sum_r J_r^T g_r`` with ``J_r`` the Jacobian of process r's rows. The gradient of the global
mean is ``sum_r J_r^T dloss/dz_r``; therefore ``g_r = W dloss/dz_r`` is what backward returns.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from kernels.ntxent import blocked
from kernels.ntxent.gather import Group, first_row, gather_rows, rank_and_size
from kernels.ntxent.reference import reference_nt_xent, unit_rows

__all__ = ["Implementation", "RowKernels", "nt_xent"]

Implementation = Literal["auto", "reference", "blocked"]


class RowKernels(NamedTuple):
    """What an implementation provides, as :mod:`kernels.ntxent.blocked` defines it."""

    row_logsumexp: Callable[..., torch.Tensor]
    row_gradient: Callable[..., torch.Tensor]


_KERNELS = {"blocked": RowKernels(blocked.row_logsumexp, blocked.row_gradient)}


def nt_xent(
    z_VBD: torch.Tensor,
    temperature: float = 0.1,
    *,
    group: Group = None,
    implementation: Implementation = "auto",
    rows_per_rank: Sequence[int] | None = None,
    block_size: int | None = None,
) -> torch.Tensor:
    """NT-Xent over the global batch: the same value and gradient on any number of processes.

    A collective: every process of ``group`` must call it, and call ``backward`` with the same
    upstream gradient. Runs outside autocast whatever surrounds it.

    Args:
        z_VBD: ``(2, B, D)``, this process's projections before normalisation, view by view, any
            floating dtype. Rows are normalised in float32; those of 16-bit projections are
            rounded to 16 bits again as factors of the products, whose sums, exponentials and
            logarithms are float32. The gradient is then within 1 % of the exact one, in norm
            (float16's small range apart: scale the loss).
        temperature: tau, positive.
        group: the process group whose samples are each other's negatives; ``None`` is the default
            group, or this process alone where there is none.
        implementation: ``"reference"`` holds the N x N matrix; ``"blocked"`` holds one tile of it;
            ``"auto"`` takes the fastest that runs here.
        rows_per_rank: B of every process, where they differ.
        block_size: rows and columns of a tile of ``"blocked"``; ``None`` chooses by device.

    Returns:
        0-d float32 (float64 for float64): the mean over all anchors of all processes, equal on all.
        Its gradient by ``z_VBD`` is W times that of the global mean (see the module).

    Raises:
        ValueError: a shape, dtype, temperature or name that cannot be meant.
    """
    _check(z_VBD, temperature, implementation, rows_per_rank, block_size)
    rows = None if rows_per_rank is None else [2 * count for count in rows_per_rank]
    with torch.autocast(z_VBD.device.type, enabled=False):
        unit_MD = unit_rows(z_VBD).flatten(0, 1)
        if implementation == "reference":
            loss: torch.Tensor = reference_nt_xent(
                unit_MD.to(z_VBD.dtype), temperature, group=group, rows_per_rank=rows
            ).to(unit_MD.dtype)
        else:
            loss = _NTXent.apply(
                unit_MD,
                z_VBD.dtype,
                1.0 / temperature,
                group,
                rows,
                block_size,
                _KERNELS["blocked"],
            )
    return loss


class _NTXent(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        unit_MD: torch.Tensor,
        factor_dtype: torch.dtype,
        inv_temperature: float,
        group: Group,
        rows_per_rank: list[int] | None,
        block_size: int | None,
        kernels: RowKernels,
    ) -> torch.Tensor:
        local_MD = unit_MD.to(factor_dtype)
        all_ND = gather_rows(local_MD, rows_per_rank, group)
        start = first_row(rows_per_rank, len(local_MD), group)
        own = slice(start, start + len(local_MD))
        lse_M = kernels.row_logsumexp(all_ND, own, inv_temperature, block_size)
        wide_MD = local_MD.to(lse_M.dtype)
        positive_M = (wide_MD * _swap_views(wide_MD)).sum(1) * inv_temperature
        # Not one mean per process and a sum of means: gathered rows make the value equal on all.
        lse_N, positive_N = gather_rows(
            torch.stack([lse_M, positive_M], dim=1), rows_per_rank, group
        ).unbind(1)
        ctx.save_for_backward(all_ND, lse_N)
        ctx.own, ctx.inv_temperature, ctx.block_size = own, inv_temperature, block_size
        ctx.kernels, ctx.world_size = kernels, rank_and_size(group)[1]
        return (lse_N - positive_N).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        all_ND, lse_N = ctx.saved_tensors
        with torch.autocast(all_ND.device.type, enabled=False):
            own_MD = all_ND[ctx.own].to(lse_N.dtype)
            grad_MD = ctx.kernels.row_gradient(
                all_ND, ctx.own, lse_N, ctx.inv_temperature, ctx.block_size
            )
            grad_MD -= 2 * _swap_views(own_MD)
            grad_MD *= grad * (ctx.world_size * ctx.inv_temperature / len(all_ND))
        return grad_MD, None, None, None, None, None, None


def _swap_views(rows_MD: torch.Tensor) -> torch.Tensor:
    """The positive of each row: the same sample's other view, half the rows away."""
    return rows_MD.roll(len(rows_MD) // 2, dims=0)


def _check(
    z_VBD: torch.Tensor,
    temperature: float,
    implementation: str,
    rows_per_rank: Sequence[int] | None,
    block_size: int | None,
) -> None:
    if z_VBD.ndim != 3 or z_VBD.shape[0] != 2:
        raise ValueError(f"nt_xent wants (2, B, D) projections, got {tuple(z_VBD.shape)}")
    if not z_VBD.is_floating_point():
        raise ValueError(f"nt_xent wants floating-point projections, got {z_VBD.dtype}")
    if sum(rows_per_rank or z_VBD.shape[1:2]) == 0:
        raise ValueError("nt_xent got no samples")
    if not temperature > 0:
        raise ValueError(f"nt_xent wants a positive temperature, got {temperature}")
    if implementation not in ("auto", "reference", "blocked"):
        raise ValueError(f"no implementation {implementation!r}: auto, reference or blocked")
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be positive, got {block_size}")
