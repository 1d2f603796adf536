"""What ranks tell each other besides gradients. Everything here works without a process group too.

All functions are collectives unless they say otherwise: every rank calls them, in the same order,
never under ``if rank == 0`` and never from a signal handler. Nothing travels as a pickled object.

Whatever waits for other ranks stands in ``with waiting("..."):``, so that a watcher can say what a
process is stuck in. While nobody watches that costs one look at a global.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.distributed_c10d import _get_default_group


def rank_and_size() -> tuple[int, int]:
    """This process's place among all, ``(0, 1)`` where no process group was initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


# --- waits ----------------------------------------------------------------------------------------


class Observer(Protocol):
    """Is told of every wait of this process, in the thread that waits."""

    def begin(self, name: str) -> None:
        """The process is about to wait in the collective ``name``."""

    def end(self) -> None:
        """It has returned. Not told where it raised: that is where the process ends."""


_observer: Observer | None = None


def observe(observer: Observer | None) -> None:
    """Tell ``observer`` of all waits from now on, and nobody else; ``None``: nobody."""
    global _observer
    _observer = observer


class waiting:  # noqa: N801 - reads as a statement
    """A context in which this process waits for others.

    Args:
        name: of the collective, for a person: "batch norm: all-gather of statistics".
    """

    __slots__ = ("_name", "_told")

    def __init__(self, name: str) -> None:
        self._name = name
        self._told: Observer | None = None

    def __enter__(self) -> None:
        self._told = _observer
        if self._told is not None:
            self._told.begin(self._name)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._told is not None and kind is None:
            self._told.end()


# --- rows -----------------------------------------------------------------------------------------


def own_slice(rows: int) -> slice:
    """This rank's rows among those of all, each of which has as many. Not a collective."""
    start = rank_and_size()[0] * rows
    return slice(start, start + rows)


class Gathering(NamedTuple):
    """Rows on their way; what :func:`start_gather` returns."""

    work: dist.Work | None
    gathered: torch.Tensor

    def wait(self) -> torch.Tensor:
        """All rows in rank order. On CUDA the stream waits, not the host."""
        if self.work is not None:
            with waiting("rows of all processes: all-gather"):
                self.work.wait()
        return self.gathered


def start_gather(local: torch.Tensor) -> Gathering:
    """:func:`gather_rows` that returns at once, so that work on the own rows hides the transfer.

    Every rank has as many rows. ``local`` must not be written to before :meth:`Gathering.wait` has
    returned.
    """
    local, size = local.detach(), rank_and_size()[1]
    if size == 1:
        return Gathering(None, local)
    gathered = local.new_empty((size * local.shape[0], *local.shape[1:]))
    return Gathering(dist.all_gather_single(gathered, local.contiguous(), async_op=True), gathered)


def gather_rows(local: torch.Tensor, rows_per_rank: Sequence[int] | None = None) -> torch.Tensor:
    """Concatenate every rank's rows in rank order. One collective; no gradient.

    Args:
        local: ``(M, ...)``, this rank's rows, any dtype. Trailing sizes and dtype are equal on
            all ranks.
        rows_per_rank: M of every rank, where they differ; ``None`` says that they are all equal.
            Known on the host, so that no size has to travel.

    Returns:
        ``(sum of M, ...)``, on one process ``local`` itself.

    Raises:
        ValueError: ``rows_per_rank`` contradicts the number of ranks or this rank's rows.
    """
    rank, size = rank_and_size()
    rows = [len(local)] * size if rows_per_rank is None else list(rows_per_rank)
    if len(rows) != size or rows[rank] != len(local):
        raise ValueError(f"rows_per_rank {rows}: rank {rank} of {size} brought {len(local)} rows")
    longest = max(rows)
    if min(rows) == longest:
        return start_gather(local).wait()
    padded = local.new_zeros((longest, *local.shape[1:]))  # one shape on all ranks
    padded[: len(local)] = local
    blocks = start_gather(padded).wait().split(longest)
    return torch.cat([block[:n] for block, n in zip(blocks, rows)])


def sum_ranks(local: torch.Tensor) -> torch.Tensor:
    """Every rank's tensor added up, the same on each. One collective; no gradient.

    Args:
        local: of one shape and dtype on all ranks; it stays as it is.
    """
    if rank_and_size()[1] == 1:
        return local
    total = local.detach().clone(memory_format=torch.contiguous_format)
    with waiting("sum over all processes: all-reduce"):
        dist.all_reduce(total)
    return total


class DifferentiableGather(torch.autograd.Function):
    """:func:`gather_rows` with its true adjoint: the sum of all ranks' gradients of these rows."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor) -> torch.Tensor:  # noqa: D102
        ctx.rows = len(local)
        # A new tensor on one process too: autograd takes no input for an output.
        gathered = gather_rows(local)
        return gathered.clone() if gathered.data_ptr() == local.data_ptr() else gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # noqa: D102
        if rank_and_size()[1] > 1:
            grad = grad.contiguous().clone()
            with waiting("embeddings: all-reduce of gradients"):
                dist.all_reduce(grad)
        return grad[own_slice(ctx.rows)]


# --- JSON -----------------------------------------------------------------------------------------


def all_gather_json(value: Any) -> list[Any]:
    """What every rank has, in rank order, by way of JSON (so tuples become lists everywhere).

    Args:
        value: anything that JSON holds, of any length.
    """
    return [json.loads(text) for text in _all_gather_texts(json.dumps(value).encode())]


def broadcast_json(value: Any) -> Any:
    """Give every rank what rank 0 has, by way of JSON (so tuples become lists everywhere).

    Args:
        value: anything that JSON holds; only rank 0's is looked at.

    Raises:
        TypeError: on all ranks, when JSON cannot hold the value.
    """
    text, problem = b"", None
    if rank_and_size()[0] == 0:
        try:
            text = json.dumps(value).encode()
        except (TypeError, ValueError) as error:
            problem = error  # raised after the others have heard of it
    text = _all_gather_texts(text)[0]
    if not text:
        raise TypeError("broadcast_json: rank 0's object is not JSON") from problem
    return json.loads(text)


def _all_gather_texts(text: bytes) -> list[bytes]:
    device = torch.device("cpu")
    if rank_and_size()[1] > 1 and dist.get_backend() == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    counts = gather_rows(torch.tensor([len(text)], device=device)).tolist()
    letters = torch.tensor(list(text), dtype=torch.uint8, device=device)
    return [part.numpy().tobytes() for part in gather_rows(letters, counts).cpu().split(counts)]


# --- flags of a step ------------------------------------------------------------------------------


class AgreedFlags:
    """A few numbers per step, the maximum over all ranks, equal on all ranks at the same step.

    On a GPU nothing waits for the device: the reduced numbers travel to pinned memory behind the
    step's other work and :meth:`read` hands out those of the step before, which have long arrived.
    Every rank reads with the same delay, so ranks never act on different numbers. On the CPU there
    is no delay.

        flags = AgreedFlags(("stop", "skipped"), device)
        ...
        flags.post(stop=stop_requested(), skipped=skipped_tensor)
        if flags.read()["stop"]: ...
    """

    def __init__(
        self,
        names: Sequence[str],
        device: torch.device | str = "cpu",
        *,
        lag: int | None = None,
    ) -> None:
        """Not a collective.

        Args:
            names: of the numbers, in the same order on all ranks.
            device: where the numbers are reduced: a device of the group's backend.
            lag: how many posts ago the numbers that ``read`` returns were posted; by default 1 on a
                GPU and 0 on the CPU. Equal on all ranks.
        """
        self.names = tuple(names)
        self.device = torch.device(device)
        self.lag = lag if lag is not None else int(self.device.type == "cuda")
        self._posted = 0
        on_gpu = self.device.type == "cuda"
        # One buffer more than the lag: what is being read is never what is being written.
        self._host = [
            torch.zeros(len(self.names), dtype=torch.float64, pin_memory=on_gpu)
            for _ in range(self.lag + 1)
        ]
        self._arrived: list[torch.cuda.Event | None] = [None] * (self.lag + 1)

    def post(self, **values: bool | int | float | torch.Tensor) -> None:
        """Contribute this rank's numbers of this step: one MAX all-reduce.

        Args:
            values: one number, or tensor of one element, for each name. A tensor on the device is
                read there. NaN counts as infinity, so that no backend loses it.

        Raises:
            ValueError: the names are not those of the constructor.
        """
        if values.keys() != set(self.names):
            raise ValueError(f"flags {sorted(values)} posted, {sorted(self.names)} declared")
        slot = self._posted % len(self._host)
        self._wait(slot)  # returns at once, unless nobody has read for a whole round
        host = self._host[slot]
        for i, name in enumerate(self.names):
            value = values[name]
            host[i] = 0.0 if isinstance(value, torch.Tensor) else float(value)
        vector = host.to(self.device, non_blocking=True)
        for i, name in enumerate(self.names):
            value = values[name]
            if isinstance(value, torch.Tensor):
                vector[i].copy_(value.detach().reshape(()), non_blocking=True)
        vector.nan_to_num_(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
        if rank_and_size()[1] > 1:
            with waiting("agreed flags: all-reduce"):
                dist.all_reduce(vector, dist.ReduceOp.MAX)
        host.copy_(vector, non_blocking=True)
        if self.device.type == "cuda":
            self._arrived[slot] = torch.cuda.Event()
            self._arrived[slot].record()  # type: ignore[union-attr]
        self._posted += 1

    def read(self) -> dict[str, float]:
        """The maxima of the post ``lag`` posts before the newest; zeros where there is none.

        Not a collective.
        """
        wanted = self._posted - 1 - self.lag
        if wanted < 0:
            return dict.fromkeys(self.names, 0.0)
        slot = wanted % len(self._host)
        self._wait(slot)
        return dict(zip(self.names, self._host[slot].tolist()))

    def _wait(self, slot: int) -> None:
        event = self._arrived[slot]
        if event is not None:
            event.synchronize()


def collectives_entered() -> int:
    """Collectives that this process has entered in the default group; 0 without one.

    Not a collective, and for any thread. Of two processes, the one with the smaller number has not
    come to the collective that the other is in.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 0
    try:
        group: Any = _get_default_group()
        return int(group._get_sequence_number_for_group())
    except (RuntimeError, ValueError):  # being taken down, or a backend that does not count
        return 0
