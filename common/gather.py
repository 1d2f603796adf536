"""The collectives of the loss: rows of all ranks, in rank order, equal on every rank."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.distributed_c10d import GroupName, _get_default_group, _resolve_process_group

from common.waiting import waiting

Group = dist.ProcessGroup | None


def rank_and_size(group: Group = None) -> tuple[int, int]:
    """This process's place in ``group``, ``(0, 1)`` where no process group was initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


class Shares(NamedTuple):
    """How many rows each rank has, and which of the ranks this one is."""

    rows: list[int]
    rank: int

    @property
    def own(self) -> slice:
        """This rank's rows among all rows."""
        start = sum(self.rows[: self.rank])
        return slice(start, start + self.rows[self.rank])


def shares(
    local_rows: int, rows_per_rank: Sequence[int] | None = None, group: Group = None
) -> Shares:
    """The rows of all ranks, by what the host knows. Not a collective.

    Args:
        local_rows: M of this rank.
        rows_per_rank: as in :func:`gather_rows`.
        group: as there.

    Raises:
        ValueError: ``rows_per_rank`` contradicts the group's size or this rank's rows.
    """
    rank, size = rank_and_size(group)
    rows = [local_rows] * size if rows_per_rank is None else list(rows_per_rank)
    if len(rows) != size:
        raise ValueError(f"rows_per_rank names {len(rows)} ranks, the process group has {size}")
    if rows[rank] != local_rows:
        raise ValueError(
            f"rows_per_rank gives rank {rank} {rows[rank]} rows, but it brought {local_rows}"
        )
    return Shares(rows, rank)


def gather_rows(
    local: torch.Tensor, rows_per_rank: Sequence[int] | None = None, group: Group = None
) -> torch.Tensor:
    """Concatenate every rank's rows in rank order. One collective; no gradient.

    Args:
        local: ``(M, ...)``, this rank's rows, any dtype. Trailing sizes and dtype are equal on
            all ranks.
        rows_per_rank: M of every rank, where they differ; ``None`` says that they are all equal.
            Known on the host, so that no size has to travel.
        group: the process group; ``None`` is the default group.

    Returns:
        ``(sum of M, ...)``, on one process ``local`` itself.

    Raises:
        ValueError: ``rows_per_rank`` contradicts the group's size or this rank's rows.
    """
    return start_gather(local, rows_per_rank, group).wait()


class Gathering(NamedTuple):
    """Rows on their way; what :func:`start_gather` returns."""

    work: dist.Work | None
    gathered: torch.Tensor
    rows: list[int]

    def wait(self) -> torch.Tensor:
        """All rows in rank order. On CUDA the stream waits, not the host."""
        if self.work is None:
            return self.gathered
        with waiting("rows of all processes: all-gather"):
            self.work.wait()
        longest = max(self.rows)
        if min(self.rows) == longest:
            return self.gathered
        return torch.cat([block[:n] for block, n in zip(self.gathered.split(longest), self.rows)])


def start_gather(
    local: torch.Tensor, rows_per_rank: Sequence[int] | None = None, group: Group = None
) -> Gathering:
    """:func:`gather_rows` that returns at once, so that work on the own rows hides the transfer.

    Arguments and errors are those of :func:`gather_rows`. ``local`` must not be written to before
    :meth:`Gathering.wait` has returned.
    """
    rows = shares(local.shape[0], rows_per_rank, group).rows
    local = local.detach()
    if len(rows) == 1:
        return Gathering(None, local, rows)
    longest = max(rows)
    padded = local.contiguous()
    if local.shape[0] < longest:  # all_gather_single wants one shape on all ranks
        padded = local.new_zeros((longest, *local.shape[1:]))
        padded[: local.shape[0]] = local
    gathered = local.new_empty((len(rows) * longest, *local.shape[1:]))
    work = dist.all_gather_single(gathered, padded, group=group, async_op=True)
    return Gathering(work, gathered, rows)


def group_name(group: Group = None) -> str:
    """Name by which a custom operation, which takes no objects, finds ``group`` again.

    Empty without a process group: this process alone.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return ""
    return str((group or _get_default_group()).group_name)


def group_named(name: str) -> Group:
    """The group of that :func:`group_name`."""
    return _resolve_process_group(GroupName(name)) if name else None


class DifferentiableGather(torch.autograd.Function):
    """:func:`gather_rows` with its true adjoint: the sum of all ranks' gradients of these rows."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, local: torch.Tensor, rows_per_rank: Sequence[int] | None, group: Group
    ) -> torch.Tensor:
        ctx.group = group
        ctx.own = shares(local.shape[0], rows_per_rank, group).own
        # A new tensor on one process too: autograd takes no input for an output.
        gathered = gather_rows(local, rows_per_rank, group)
        return gathered.clone() if gathered.data_ptr() == local.data_ptr() else gathered

    @staticmethod
    @once_differentiable
    def backward(  # noqa: D102
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        if rank_and_size(ctx.group)[1] > 1:
            grad = grad.contiguous().clone()
            with waiting("embeddings: all-reduce of gradients"):
                dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.own], None, None
