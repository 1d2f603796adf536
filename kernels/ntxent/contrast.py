"""InfoNCE, MoCo's loss, over the queries of all processes. Keys take no gradient.

For M unit queries q of this process, their keys k and temperature tau::

    loss = 1/N sum_i ( log sum_j exp(q_i . k_j / tau) - q_i . k_pos(i) / tau )

over all N queries of all processes. What j runs over is the difference:

- MoCo v3 (arXiv 2104.02057): the keys of all processes, gathered; a query's positive is its own
  key. The symmetric loss is two calls, and the paper multiplies it by ``2 tau``.
- MoCo v1 and v2 (arXiv 1911.05722, 2003.04297): the own key and the queue; no other key of the
  batch.

The gradient by a query, ``1/(N tau) (sum_j p_ij k_j - k_pos(i))``, needs nothing of other queries:
backward communicates nothing. It is scaled by W, as NT-Xent's (see the package).
"""

from collections.abc import Sequence

import torch

from common.gather import Group, group_name
from kernels import choice
from kernels.ntxent import info_nce_ops
from kernels.ntxent.implementations import Implementation, check_options
from kernels.ntxent.reference import reference_info_nce, unit_rows

__all__ = ["info_nce", "info_nce_and_accuracy"]


def info_nce(
    queries_MD: torch.Tensor,
    keys_MD: torch.Tensor,
    temperature: float,
    *,
    positive_M: torch.Tensor | None = None,
    queue_QD: torch.Tensor | None = None,
    group: Group = None,
    implementation: Implementation = "auto",
    rows_per_rank: Sequence[int] | None = None,
    block_size: int | None = None,
) -> torch.Tensor:
    """InfoNCE of the global batch: the same value and gradient on any number of processes.

    A collective: every process of ``group`` must call it, and call ``backward`` with the same
    upstream gradient. Runs outside autocast. Memory is that of the rows, the columns and one tile.

    Args:
        queries_MD: ``(M, D)``, this process's predictions before normalisation, any floating
            dtype; normalised, rounded and differentiated as :func:`kernels.ntxent.nt_xent` does.
        keys_MD: ``(M, D)``, the keys of these queries, before normalisation; no gradient.
        temperature: tau, a positive number; it has no gradient.
        positive_M: int64 ``(M,)``, each query's positive among the keys of all processes, in rank
            order; ``None`` takes ``keys_MD`` row by row. Not with a queue.
        queue_QD: ``(Q, D)`` unit rows: a query is then compared with its own key and these, not
            with other keys. Equal on all processes, if the loss is to be the same on any number.
        group: the process group; ``None`` is the default group, or this process alone.
        implementation: as in :func:`kernels.ntxent.nt_xent`.
        rows_per_rank: M of every process, where they differ.
        block_size: as in :func:`kernels.ntxent.nt_xent`.

    Returns:
        The mean over all queries of all processes, 0-d float32 (float64 for float64), equal on all;
        its gradient by ``queries_MD`` is W times that of the global mean.

    Raises:
        ValueError: a shape, dtype, temperature or name that cannot be meant.
        RuntimeError: ``positive_M`` names no key. On CUDA a later call raises it.
    """
    return _info_nce(
        queries_MD,
        keys_MD,
        temperature,
        positive_M,
        queue_QD,
        group,
        implementation,
        rows_per_rank,
        block_size,
        accuracy=False,
    )[0]


def info_nce_and_accuracy(
    queries_MD: torch.Tensor,
    keys_MD: torch.Tensor,
    temperature: float,
    *,
    positive_M: torch.Tensor | None = None,
    queue_QD: torch.Tensor | None = None,
    group: Group = None,
    implementation: Implementation = "auto",
    rows_per_rank: Sequence[int] | None = None,
    block_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`info_nce`, and the accuracy of the contrastive task, counted in the same pass.

    Args:
        queries_MD: as in :func:`info_nce`.
        keys_MD: as there.
        temperature: as there.
        positive_M: as there.
        queue_QD: as there.
        group: as there.
        implementation: as there.
        rows_per_rank: as there.
        block_size: as there.

    Returns:
        The loss, and the share of queries of all processes whose positive has the largest logit of
        all (on a tie it has not): 0-d in [0, 1], of the loss's dtype, equal on all, no gradient.
    """
    return _info_nce(
        queries_MD,
        keys_MD,
        temperature,
        positive_M,
        queue_QD,
        group,
        implementation,
        rows_per_rank,
        block_size,
        accuracy=True,
    )


def _info_nce(
    queries_MD: torch.Tensor,
    keys_MD: torch.Tensor,
    temperature: float,
    positive_M: torch.Tensor | None,
    queue_QD: torch.Tensor | None,
    group: Group,
    implementation: Implementation,
    rows_per_rank: Sequence[int] | None,
    block_size: int | None,
    accuracy: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_options("info_nce", temperature, implementation, block_size)
    _check(queries_MD, keys_MD, positive_M, queue_QD, rows_per_rank)
    dtype = queries_MD.dtype
    with torch.autocast(queries_MD.device.type, enabled=False):
        unit_MD = unit_rows(queries_MD)
        with torch.no_grad():
            key_MD = unit_rows(keys_MD).to(dtype)
            queue_QD = None if queue_QD is None else queue_QD.detach().to(dtype)
        if implementation == "reference":
            choice.record("info_nce", "reference", "as asked")
            loss, hits = reference_info_nce(
                unit_MD.to(dtype),
                key_MD,
                temperature,
                positive_M=positive_M,
                queue_QD=queue_QD,
                group=group,
                rows_per_rank=rows_per_rank,
            )
            return loss.to(unit_MD.dtype), hits.to(unit_MD.dtype)
        loss, hits, *_ = info_nce_ops.info_nce(
            unit_MD,
            key_MD,
            queue_QD,
            positive_M,
            dtype,
            1.0 / temperature,
            rows_per_rank,
            group_name(group),
            block_size,
            implementation,
            accuracy,
        )
    return loss, hits


def _check(
    queries_MD: torch.Tensor,
    keys_MD: torch.Tensor,
    positive_M: torch.Tensor | None,
    queue_QD: torch.Tensor | None,
    rows_per_rank: Sequence[int] | None,
) -> None:
    if queries_MD.ndim != 2 or queries_MD.shape != keys_MD.shape:
        raise ValueError(
            f"info_nce wants queries and keys of one shape (M, D), got "
            f"{tuple(queries_MD.shape)} and {tuple(keys_MD.shape)}"
        )
    if not queries_MD.is_floating_point():
        raise ValueError(f"info_nce wants floating-point queries, got {queries_MD.dtype}")
    if sum(rows_per_rank or queries_MD.shape[:1]) == 0:
        raise ValueError("info_nce got no queries")
    if queue_QD is not None and (queue_QD.ndim != 2 or queue_QD.shape[1] != keys_MD.shape[1]):
        raise ValueError(
            f"info_nce wants a queue (Q, {keys_MD.shape[1]}), got {tuple(queue_QD.shape)}"
        )
    if queue_QD is not None and positive_M is not None:
        raise ValueError("info_nce: with a queue a query's positive is its own key")
    if positive_M is None:
        return
    if positive_M.shape != queries_MD.shape[:1] or positive_M.dtype != torch.int64:
        raise ValueError(
            f"info_nce wants one positive per query, int64, got {positive_M.dtype} "
            f"{tuple(positive_M.shape)}"
        )
