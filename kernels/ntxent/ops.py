"""Both losses as one custom operation, which ``torch.compile`` takes without a graph break.

Its collectives are inside: the compiler sees neither the gather nor the tiles, and cannot move one
against the other. That is what lets the gather of the rows run while the own block is computed.

NT-Xent is InfoNCE whose keys are the rows themselves: they have a gradient too, and no row meets
itself. What follows from that is told by ``key_MD is None``.

Shapes: M rows of this process, N columns, Q rows of the queue, D dimensions.
"""

from collections.abc import Callable
from functools import partial, reduce
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import library

from common.collectives import gather_rows, own_slice, rank_and_size, start_gather
from kernels import dispatch
from kernels.ntxent import cpu
from kernels.ntxent.reference import statistics_dtype

PART = 4096  # rows at a time, where they are copied

Implementation = Literal["auto", "reference", "blocked", "triton"]


class Settings(NamedTuple):
    """What a loss is told beside its tensors, in types that an operation takes."""

    inv_temperature: float
    """1 / tau."""
    block_size: int | None
    """Rows and columns of a tile; ``None`` chooses by device."""
    implementation: str
    """``"auto"``, ``"blocked"`` or ``"triton"``."""


_SETTINGS = "float inv_temperature, SymInt? block_size, str implementation"


def choose(device: torch.device, dtype: torch.dtype, size_d: int, asked: str) -> dispatch.Choice:
    """Which implementation serves rows of ``size_d`` dimensions, and why.

    Raises:
        ValueError: ``"triton"`` was asked for and cannot run.
    """
    obstacle = dispatch.triton_obstacle(device)
    if not obstacle and asked != "blocked":
        from kernels.ntxent import triton

        obstacle = triton.unsupported(device, dtype, size_d)
    return dispatch.choose("ntxent", asked, device, obstacle, plain="blocked")


def kernels_for(rows_MD: torch.Tensor, asked: str) -> ModuleType:
    """The module that :func:`choose` chooses for these rows; notes the choice."""
    choice = choose(rows_MD.device, rows_MD.dtype, rows_MD.shape[1], asked)
    dispatch.record(choice)
    if choice.implementation == "blocked":
        return cpu
    from kernels.ntxent import triton

    return triton


def loss_rows(
    unit_MD: torch.Tensor,
    key_MD: torch.Tensor | None,
    queue_QD: torch.Tensor | None,
    positive_M: torch.Tensor,
    dtype: torch.dtype,
    *settings: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and accuracy over all processes, and what backward needs of the others.

    Args:
        unit_MD: this process's unit rows, float32 or float64; for NT-Xent view 0's, then view 1's.
        key_MD: this process's unit keys in ``dtype``, of any number where ``positive_M`` names
            places among those of all; ``None`` for NT-Xent; of no rows where they are in the queue.
        queue_QD: with it a row is compared with its own key and these, without it with the rows
            or keys of all processes.
        positive_M: int64, each row's positive: its place among the rows or keys of all processes,
            or in the queue and behind it.
        dtype: what the rows are rounded to as factors of the products.
        settings: :class:`Settings`, one by one.

    Returns:
        Loss and accuracy, 0-d; all columns in ``dtype``, the own keys behind the queue; the rows'
        log-sum-exps, ``(M,)``, for NT-Xent those of all processes' rows, ``(N,)``.
    """
    given = Settings(*settings)
    rows_MD = unit_MD.to(dtype)
    statistics = partial(
        kernels_for(rows_MD, given.implementation).statistics,
        rows_MD,
        inv_temperature=given.inv_temperature,
        block_size=given.block_size,
    )
    if key_MD is None or queue_QD is None:
        own_MD = rows_MD if key_MD is None else key_MD
        own = own_slice(len(own_MD))
        gathering = start_gather(own_MD)
        # While the other processes' rows travel: the own block, where NT-Xent's is symmetric.
        found = [statistics(own_MD, positive_M - own.start, symmetric=key_MD is None)]
        columns_ND = gathering.wait()
        for first, others in ((0, columns_ND[: own.start]), (own.stop, columns_ND[own.stop :])):
            if len(others):
                found.append(statistics(others, positive_M - first))
        columns_ND = columns_ND.contiguous()
        if columns_ND.data_ptr() == (unit_MD if key_MD is None else key_MD).data_ptr():
            columns_ND = columns_ND.clone()  # an operation returns no argument
    else:
        # Kept for backward, before which MoCo overwrites the oldest keys of the queue.
        columns_ND = torch.cat([queue_QD, key_MD])
        found = [statistics(queue_QD, positive_M)]
    lses, hardests = zip(*found)
    lse_M, hardest_M = reduce(torch.logaddexp, lses), reduce(torch.maximum, hardests)
    logit_M = given.inv_temperature * _similarities(rows_MD, columns_ND, positive_M)
    if _behind_queue(key_MD, queue_QD):
        lse_M = torch.logaddexp(lse_M, logit_M)
    # Of a NaN there is no hit: Triton's maxima pass over NaN where torch's keep it.
    hit_M = ((logit_M > hardest_M) & ~lse_M.isnan()).to(lse_M.dtype)
    # Not one mean per process and a sum of means: gathered rows make the value equal on all.
    if key_MD is None:
        of_rows_M3 = torch.stack([lse_M, logit_M, hit_M], 1)
        lse_N, logit_N, hit_N = gather_rows(of_rows_M3).unbind(1)
        return (lse_N - logit_N).mean(), hit_N.mean(), columns_ND, lse_N.contiguous()
    of_rows_M2 = torch.stack([lse_M - logit_M, hit_M], 1)
    loss, accuracy = gather_rows(of_rows_M2).mean(0).unbind()
    return loss.clone(), accuracy.clone(), columns_ND, lse_M


def gradient_rows(
    columns_ND: torch.Tensor,
    lse: torch.Tensor,
    unit_MD: torch.Tensor | None,
    positive_M: torch.Tensor,
    dtype: torch.dtype,
    behind_queue: bool,
    *settings: Any,
) -> torch.Tensor:
    """tau times the derivative of the sum of all losses by this process's rows.

    ``sum_{j != i} (p_ij + p_ji) u_j - 2 u_pos(i)``, or ``sum_j p_ij k_j - k_pos(i)`` of InfoNCE.

    Args:
        columns_ND: what :func:`loss_rows` returned.
        lse: as those.
        unit_MD: as there; ``None`` for NT-Xent, whose rows are among the columns.
        positive_M: as there.
        dtype: as there.
        behind_queue: whether the positives are the last columns, behind a queue.
        settings: as there.
    """
    given = Settings(*settings)
    rows = len(positive_M)
    own = own_slice(rows) if unit_MD is None else None
    rows_MD = columns_ND[own] if unit_MD is None else unit_MD.to(dtype)
    gradient_MD: torch.Tensor = kernels_for(rows_MD, given.implementation).gradient(
        rows_MD,
        columns_ND[: len(columns_ND) - rows] if behind_queue else columns_ND,
        lse,
        given.inv_temperature,
        own=own,
        block_size=given.block_size,
    )
    if behind_queue:  # the own key is no column of it: p_pos k_pos - k_pos
        logit_M = given.inv_temperature * _similarities(rows_MD, columns_ND, positive_M)
        return gradient_MD.add_(torch.expm1(logit_M - lse)[:, None] * columns_ND[positive_M])
    for gradient_rD, positive_r in zip(gradient_MD.split(PART), positive_M.split(PART)):
        gradient_rD.sub_(columns_ND[positive_r], alpha=1 if own is None else 2)
    return gradient_MD


def _behind_queue(key_MD: torch.Tensor | None, queue_QD: torch.Tensor | None) -> bool:
    return key_MD is not None and queue_QD is not None and key_MD.shape[0] > 0


def _similarities(
    rows_MD: torch.Tensor, columns_ND: torch.Tensor, positive_M: torch.Tensor
) -> torch.Tensor:
    """Of the rows and their positives, ``(M,)``."""
    dtype = statistics_dtype(rows_MD.dtype)
    parts = zip(rows_MD.split(PART), positive_M.split(PART))
    return torch.cat(
        [(u_rD.to(dtype) * columns_ND[positive_r]).sum(1) for u_rD, positive_r in parts]
    )


def _outside_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(columns: torch.Tensor, *rest: Any) -> Any:
        with torch.autocast(columns.device.type, enabled=False):
            return function(columns, *rest)

    return run


loss = library.custom_op(
    "widebatch::contrastive_loss",
    _outside_autocast(loss_rows),
    mutates_args=(),
    schema="(Tensor unit_MD, Tensor? key_MD, Tensor? queue_QD, Tensor positive_M, ScalarType dtype,"
    f" {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
gradient = library.custom_op(
    "widebatch::contrastive_gradient",
    _outside_autocast(gradient_rows),
    mutates_args=(),
    schema="(Tensor columns_ND, Tensor lse, Tensor? unit_MD, Tensor positive_M, ScalarType dtype,"
    f" bool behind_queue, {_SETTINGS}) -> Tensor",
)


@loss.register_fake
def _(unit_MD: Any, key_MD: Any, queue_QD: Any, positive: Any, dtype: Any, *_: Any) -> Any:
    rows, size_d = unit_MD.shape
    total = rows * rank_and_size()[1]
    columns = (rows if key_MD is None else key_MD.shape[0]) * rank_and_size()[1]
    if queue_QD is not None:
        columns = queue_QD.shape[0] + key_MD.shape[0]
    return (
        *(unit_MD.new_empty((), dtype=statistics_dtype(dtype)) for _ in range(2)),
        unit_MD.new_empty((columns, size_d), dtype=dtype),
        unit_MD.new_empty((total if key_MD is None else rows,), dtype=statistics_dtype(dtype)),
    )


@gradient.register_fake
def _(columns_ND: Any, lse: Any, unit_MD: Any, positive_M: Any, *_: Any) -> Any:
    return lse.new_empty((positive_M.shape[0], columns_ND.shape[1]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    unit_MD, key_MD, queue_QD, positive_M, dtype, *settings = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:], None if key_MD is None else unit_MD, positive_M)
    ctx.rest = (dtype, _behind_queue(key_MD, queue_QD), *settings)


def _backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    # Backward runs with gradients enabled where create_graph=True was asked for. Its operations
    # would count as constants there, and the second derivative be silently wrong.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("the contrastive losses have no second derivative (create_graph=True)")
    others = (None,) * (4 + len(Settings._fields))
    if grad is None:
        return None, *others
    given = Settings(*ctx.rest[2:])
    grad_MD = gradient(*ctx.saved_tensors, *ctx.rest)
    size = rank_and_size()[1]
    # W: DistributedDataParallel averages (see the package's docstring).
    scale = size * given.inv_temperature / (size * grad_MD.shape[0])
    return grad_MD.mul_(grad * scale), *others


loss.register_autograd(_backward, setup_context=_keep)
