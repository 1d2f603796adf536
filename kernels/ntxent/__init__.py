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
rows, while the own block is computed, and then two floats per row (three with accuracy); backward
communicates nothing, where a differentiable gather would reduce-scatter N x D gradients.

**Scale.** DistributedDataParallel averages parameter gradients over W processes:
``1/W sum_r J_r^T g_r`` with ``J_r`` the Jacobian of process r's rows. The gradient of the global
mean is ``sum_r J_r^T dloss/dz_r``; therefore ``g_r = W dloss/dz_r`` is what backward returns.

MoCo's loss, queries against keys that take no gradient, is :func:`info_nce`
(:mod:`kernels.ntxent.contrast`). Both are custom operations (:mod:`kernels.ntxent.ops` and
:mod:`kernels.ntxent.info_nce_ops`): ``torch.compile`` takes them without a graph break.
"""

from collections.abc import Sequence

import torch

from common.gather import Group, group_name
from kernels import choice
from kernels.ntxent import ops
from kernels.ntxent.contrast import info_nce, info_nce_and_accuracy
from kernels.ntxent.implementations import Implementation, RowKernels, check_options
from kernels.ntxent.reference import reference_nt_xent, unit_rows

__all__ = [
    "Implementation",
    "RowKernels",
    "info_nce",
    "info_nce_and_accuracy",
    "nt_xent",
    "nt_xent_and_accuracy",
]


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
            (float16's small range apart: scale the loss). Loss and gradient are NaN where a value
            is not finite or a row's norm overflows float32.
        temperature: tau, a positive number; it has no gradient.
        group: the process group whose samples are each other's negatives; ``None`` is the default
            group, or this process alone where there is none.
        implementation: ``"reference"`` holds the N x N matrix; ``"blocked"`` holds one tile of it,
            on any device; ``"triton"`` holds it in registers, on CUDA; ``"auto"`` takes the fastest
            that runs here, and ``kernels.explain()`` says which that was.
        rows_per_rank: B of every process, where they differ.
        block_size: rows and columns of a tile (for ``"triton"`` 16, 32, 64 or 128); ``None``
            chooses by device.

    Returns:
        0-d float32 (float64 for float64): the mean over all anchors of all processes, equal on all.
        Its gradient by ``z_VBD`` is W times that of the global mean (see the module).

    Raises:
        ValueError: a shape, dtype, temperature or name that cannot be meant.
    """
    return _nt_xent(
        z_VBD, temperature, group, implementation, rows_per_rank, block_size, accuracy=False
    )[0]


def nt_xent_and_accuracy(
    z_VBD: torch.Tensor,
    temperature: float = 0.1,
    *,
    group: Group = None,
    implementation: Implementation = "auto",
    rows_per_rank: Sequence[int] | None = None,
    block_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`nt_xent`, and the accuracy of the contrastive task, counted in the same pass.

    Args:
        z_VBD: as in :func:`nt_xent`.
        temperature: as there.
        group: as there.
        implementation: as there.
        rows_per_rank: as there.
        block_size: as there.

    Returns:
        The loss, and the share of anchors of all processes to which no other row is as similar as
        their positive (on a tie it is not counted): 0-d in [0, 1], float32 (float64 for float64),
        equal on all processes, no gradient.
    """
    return _nt_xent(
        z_VBD, temperature, group, implementation, rows_per_rank, block_size, accuracy=True
    )


def _nt_xent(
    z_VBD: torch.Tensor,
    temperature: float,
    group: Group,
    implementation: Implementation,
    rows_per_rank: Sequence[int] | None,
    block_size: int | None,
    accuracy: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_options("nt_xent", temperature, implementation, block_size)
    _check(z_VBD, rows_per_rank)
    rows = None if rows_per_rank is None else [2 * count for count in rows_per_rank]
    with torch.autocast(z_VBD.device.type, enabled=False):
        unit_MD = unit_rows(z_VBD).flatten(0, 1)
        if implementation == "reference":
            choice.record("ntxent", "reference", "as asked")
            loss, hits = reference_nt_xent(
                unit_MD.to(z_VBD.dtype), temperature, group=group, rows_per_rank=rows
            )
            return loss.to(unit_MD.dtype), hits.to(unit_MD.dtype)
        loss, hits, _, _ = ops.ntxent(
            unit_MD,
            z_VBD.dtype,
            1.0 / temperature,
            rows,
            group_name(group),
            block_size,
            implementation,
            accuracy,
        )
    return loss, hits


def _check(z_VBD: torch.Tensor, rows_per_rank: Sequence[int] | None) -> None:
    if z_VBD.ndim != 3 or z_VBD.shape[0] != 2:
        raise ValueError(f"nt_xent wants (2, B, D) projections, got {tuple(z_VBD.shape)}")
    if not z_VBD.is_floating_point():
        raise ValueError(f"nt_xent wants floating-point projections, got {z_VBD.dtype}")
    if sum(rows_per_rank or z_VBD.shape[1:2]) == 0:
        raise ValueError("nt_xent got no samples")
