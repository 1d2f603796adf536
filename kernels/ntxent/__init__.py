"""NT-Xent, SimCLR's loss, and InfoNCE, MoCo's, over the samples of all processes.

**NT-Xent** (arXiv 2002.05709, eq. 1). For N unit rows u (two views of every sample of every
process) and temperature tau::

    s_ij = u_i . u_j / tau
    lse_i = log sum_{j != i} exp(s_ij)
    loss = 1/N sum_i (lse_i - s_i,pos(i))

**The gradient takes one gather.** Row i stands in the loss as an anchor, as a negative of all other
anchors, and as the positive of its positive. With ``p_ij = exp(s_ij - lse_i)``::

    dloss/du_i = 1/(N tau) [ sum_{j != i} (p_ij + p_ji) u_j - 2 u_pos(i) ]

``s`` is symmetric, so ``p_ji = exp(s_ij - lse_j)``: given all rows and all N log-sum-exps, a
process computes the *complete* derivative of the global loss by its own rows. Forward gathers the
rows, while the own block is computed, and then three floats per row; backward communicates nothing,
where a differentiable gather would reduce-scatter N x D gradients.

**InfoNCE.** For unit queries q and keys k that take no gradient, over all N queries::

    loss = 1/N sum_i ( log sum_j exp(q_i . k_j / tau) - q_i . k_pos(i) / tau )
    dloss/dq_i = 1/(N tau) ( sum_j p_ij k_j - k_pos(i) )

- MoCo v3 (arXiv 2104.02057): j runs over the keys of all processes, gathered; a query's positive is
  its own key. The symmetric loss is two calls, and the paper multiplies it by ``2 tau``.
- MoCo v1 and v2 (arXiv 1911.05722, 2003.04297): over the own key and the queue; no other key of the
  batch.

**Scale.** DistributedDataParallel averages parameter gradients over W processes:
``1/W sum_r J_r^T g_r`` with ``J_r`` the Jacobian of process r's rows. The gradient of the global
mean is ``sum_r J_r^T dloss/dz_r``; therefore ``g_r = W dloss/dz_r`` is what backward returns.

Both are one custom operation (:mod:`kernels.ntxent.ops`): ``torch.compile`` takes them without a
graph break. Both count the accuracy of the contrastive task in the same pass.
"""

import math
from typing import get_args

import torch

from common.collectives import own_slice
from kernels import dispatch
from kernels.ntxent import ops
from kernels.ntxent.both_sides import mean_log_sum_exp
from kernels.ntxent.ops import Implementation
from kernels.ntxent.reference import reference_loss, unit_rows

__all__ = ["Implementation", "info_nce", "nt_xent", "two_sided"]


def nt_xent(
    z_VBD: torch.Tensor,
    temperature: float = 0.1,
    *,
    implementation: Implementation = "auto",
    block_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """NT-Xent over the global batch: the same value and gradient on any number of processes.

    A collective: every process must call it with as many samples, and call ``backward`` with the
    same upstream gradient. Runs outside autocast whatever surrounds it.

    Args:
        z_VBD: ``(2, B, D)``, this process's projections before normalisation, view by view, any
            floating dtype. Rows are normalised in float32; those of 16-bit projections are
            rounded to 16 bits again as factors of the products, whose sums, exponentials and
            logarithms are float32. The gradient is then within 1 % of the exact one, in norm
            (float16's small range apart: scale the loss). Loss and gradient are NaN where a value
            is not finite or a row's norm overflows float32.
        temperature: tau, a positive number; it has no gradient.
        implementation: ``"reference"`` holds the own rows of the N x N matrix; ``"blocked"`` holds
            one tile of it, on any device; ``"triton"`` holds it in registers, on CUDA; ``"auto"``
            takes the fastest that runs here, and the log says which.
        block_size: rows and columns of a tile (for ``"triton"`` 16, 32, 64 or 128); ``None``
            chooses by device.

    Returns:
        The mean loss over all anchors of all processes, and the share of them to which no other row
        is as similar as their positive (on a tie it is not counted): 0-d float32 (float64 for
        float64), equal on all processes. The loss's gradient by ``z_VBD`` is W times that of the
        global mean (see the module); accuracy has none.

    Raises:
        ValueError: a shape, dtype, temperature or name that cannot be meant.
    """
    if z_VBD.ndim != 3 or z_VBD.shape[0] != 2:
        raise ValueError(f"nt_xent wants (2, B, D) projections, got {tuple(z_VBD.shape)}")
    if z_VBD.shape[1] == 0:
        raise ValueError("nt_xent got no samples")
    settings = _settings(temperature, block_size, implementation)
    own = own_slice(2 * z_VBD.shape[1])
    place_M = torch.arange(own.start, own.stop, device=z_VBD.device)
    return _loss(z_VBD, None, None, place_M.roll(z_VBD.shape[1]), settings)


def info_nce(
    queries_MD: torch.Tensor,
    keys_MD: torch.Tensor | None,
    temperature: float,
    *,
    positive_M: torch.Tensor | None = None,
    queue_QD: torch.Tensor | None = None,
    implementation: Implementation = "auto",
    block_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """InfoNCE of the global batch: the same value and gradient on any number of processes.

    A collective, as :func:`nt_xent`. Memory is that of the rows, the columns and one tile.

    Args:
        queries_MD: ``(M, D)``, this process's predictions before normalisation, any floating
            dtype; normalised, rounded and differentiated as :func:`nt_xent` does.
        keys_MD: ``(M, D)``, the keys of these queries, before normalisation; no gradient. ``None``:
            they are rows of the queue, which ``positive_M`` names.
        temperature: tau, a positive number; it has no gradient.
        positive_M: int64 ``(M,)``, each query's key in the queue.
        queue_QD: ``(Q, D)`` unit rows: a query is then compared with its own key and these, not
            with other keys. Equal on all processes, if the loss is to be the same on any number.
        implementation: as in :func:`nt_xent`.
        block_size: as there.

    Returns:
        As :func:`nt_xent`: the mean loss over all queries of all processes, and the share of them
        whose positive has the largest logit of all.

    Raises:
        ValueError: a shape, dtype, temperature or name that cannot be meant.
        RuntimeError: ``positive_M`` names no row of the queue. On CUDA a later call raises it.
    """
    rows, size_d = len(queries_MD), queries_MD.shape[-1]
    if queries_MD.ndim != 2 or (keys_MD is not None and queries_MD.shape != keys_MD.shape):
        raise ValueError(
            f"info_nce wants queries and keys of one shape (M, D), got "
            f"{tuple(queries_MD.shape)} and {None if keys_MD is None else tuple(keys_MD.shape)}"
        )
    if rows == 0:
        raise ValueError("info_nce got no queries")
    if queue_QD is not None and (queue_QD.ndim != 2 or queue_QD.shape[1] != size_d):
        raise ValueError(f"info_nce wants a queue (Q, {size_d}), got {tuple(queue_QD.shape)}")
    settings = _settings(temperature, block_size, implementation)
    if (keys_MD is None) != (positive_M is not None) or (keys_MD is None and queue_QD is None):
        raise ValueError("info_nce wants keys, or a queue and each query's place in it")
    if positive_M is None:
        first = own_slice(rows).start if queue_QD is None else len(queue_QD)
        positive_M = first + torch.arange(rows, device=queries_MD.device)
    else:
        _check_positives(positive_M, rows, len(queue_QD))  # type: ignore[arg-type]
    with torch.no_grad(), torch.autocast(queries_MD.device.type, enabled=False):
        keys_MD = queries_MD[:0] if keys_MD is None else keys_MD
        key_MD = unit_rows(keys_MD).to(queries_MD.dtype)
        queue_QD = None if queue_QD is None else queue_QD.detach().to(queries_MD.dtype)
    return _loss(queries_MD, key_MD, queue_QD, positive_M, settings)


def two_sided(
    queries_MD: torch.Tensor,
    keys_KD: torch.Tensor,
    positive_M: torch.Tensor,
    temperature: float,
    *,
    implementation: Implementation = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean log-sum-exp of each query's logits with the keys of all processes, which take a gradient
    too; see :func:`kernels.ntxent.both_sides.mean_log_sum_exp`. A collective, as :func:`nt_xent`.

    Raises:
        ValueError: a temperature or name that cannot be meant; ``"reference"``, which there is not.
    """
    if implementation == "reference":
        raise ValueError("two_sided has no reference implementation: blocked or triton")
    settings = _settings(temperature, None, implementation)
    return mean_log_sum_exp(queries_MD, keys_KD, positive_M, settings)


def _check_positives(positive_M: torch.Tensor, rows: int, columns: int) -> None:
    if positive_M.shape != (rows,) or positive_M.dtype != torch.int64:
        raise ValueError(
            f"info_nce wants one positive per query, int64, got {positive_M.dtype} "
            f"{tuple(positive_M.shape)}"
        )
    # Or a negative index would count from the end. On CUDA the host does not wait: what comes later
    # fails.
    torch._assert_async(
        ((positive_M >= 0) & (positive_M < columns)).all(),
        f"info_nce: positive_M must name rows of the queue, 0 to {columns - 1}",
    )


def _settings(temperature: float, block_size: int | None, implementation: str) -> ops.Settings:
    """What both losses are told, refused where it cannot be meant."""
    if isinstance(temperature, torch.Tensor):
        raise ValueError("a contrastive loss has no derivative by the temperature: give a number")
    if not 0 < temperature < math.inf:
        raise ValueError(f"a contrastive loss wants a positive temperature, got {temperature}")
    if implementation not in get_args(Implementation):
        names = ", ".join(get_args(Implementation))
        raise ValueError(f"no implementation {implementation!r}: {names}")
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be positive, got {block_size}")
    return ops.Settings(1.0 / temperature, block_size, implementation)


def _loss(
    z: torch.Tensor,
    key_MD: torch.Tensor | None,
    queue_QD: torch.Tensor | None,
    positive_M: torch.Tensor,
    settings: ops.Settings,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Either loss, of ``(..., D)`` rows before normalisation; keys and queue as in ``ops``."""
    if not z.is_floating_point():
        raise ValueError(f"a contrastive loss wants floating-point rows, got {z.dtype}")
    with torch.autocast(z.device.type, enabled=False):
        unit_MD = unit_rows(z).flatten(0, -2)
        tensors = key_MD, queue_QD, positive_M
        if settings.implementation == "reference":
            dispatch.record(dispatch.Choice("ntxent", "reference", "as asked"))
            found = reference_loss(unit_MD.to(z.dtype), *tensors, settings.inv_temperature)
            loss, accuracy = (value.to(unit_MD.dtype) for value in found)
        else:
            loss, accuracy, *_ = ops.loss(unit_MD, *tensors, z.dtype, *settings)
    return loss, accuracy
