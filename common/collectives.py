"""What ranks tell each other besides gradients. Everything here works without a process group too.

All functions are collectives unless they say otherwise: every rank calls them, in the same order,
never under ``if rank == 0`` and never from a signal handler. Nothing travels as a pickled object.
"""

import gc
import json
import logging
import sys
import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_group
from torch.nn.parallel import DistributedDataParallel

from common.gather import Group, gather_rows, rank_and_size
from common.waiting import waiting

__all__ = [
    "AgreedFlags",
    "all_gather_json",
    "all_gather_rows",
    "broadcast_json",
    "collectives_entered",
    "rank_and_size",
    "release",
    "shutdown",
]

log = logging.getLogger(__name__)

_NOT_JSON = -1  # in place of a length: the source could not encode its object


@torch.no_grad()
def all_gather_rows(
    x: torch.Tensor, rows_per_rank: Sequence[int] | None = None, group: Group = None
) -> torch.Tensor:
    """Concatenate all ranks' rows in rank order; no gradient.

    Args:
        x: ``(M, ...)`` on the device of the group's backend, any dtype. Trailing sizes and dtype
            are equal on all ranks; M may differ and may be 0.
        rows_per_rank: M of every rank. ``None``: the ranks exchange their M first, which waits for
            the device; name them where that matters.
        group: the process group; ``None`` is the default group.

    Returns:
        ``(sum of M, ...)``, equal on all ranks.

    Raises:
        ValueError: ``rows_per_rank`` contradicts the group's size or this rank's rows.
    """
    if rows_per_rank is None:
        mine = torch.tensor([x.shape[0]], device=x.device)
        rows_per_rank = gather_rows(mine, group=group).tolist()
    return gather_rows(x, rows_per_rank, group)


def all_gather_json(value: Any, group: Group = None) -> list[Any]:
    """What every rank has, in rank order, by way of JSON (so tuples become lists everywhere).

    Args:
        value: anything that JSON holds, of any length.
        group: the process group; ``None`` is the default group.
    """
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    text = text.to(_device_of(group))
    sizes = all_gather_rows(torch.tensor([len(text)], device=text.device), None, group).tolist()
    texts = all_gather_rows(text, sizes, group).cpu().split(sizes)
    return [json.loads(each.numpy().tobytes()) for each in texts]


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
        group: Group = None,
        lag: int | None = None,
    ) -> None:
        """Not a collective.

        Args:
            names: of the numbers, in the same order on all ranks.
            device: where the numbers are reduced: a device of the group's backend.
            group: the process group; ``None`` is the default group.
            lag: how many posts ago the numbers that ``read`` returns were posted; by default 1 on a
                GPU and 0 on the CPU. Equal on all ranks.
        """
        self.names = tuple(names)
        self.device = torch.device(device)
        self.lag = lag if lag is not None else int(self.device.type == "cuda")
        self._group = group
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
        if rank_and_size(self._group)[1] > 1:
            with waiting("agreed flags: all-reduce"):
                dist.all_reduce(vector, dist.ReduceOp.MAX, group=self._group)
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


def broadcast_json(value: Any, src: int = 0, group: Group = None) -> Any:
    """Give every rank what rank ``src`` has, by way of JSON (so tuples become lists everywhere).

    Args:
        value: anything that JSON holds; only rank ``src``'s is looked at.
        src: rank in the default group.
        group: the process group; ``None`` is the default group.

    Raises:
        TypeError: on all ranks, when JSON cannot hold the value.
    """
    rank, size = rank_and_size(None)
    is_source = rank == src or size == 1
    payload: bytes | None = None
    problem: Exception | None = None
    if is_source:
        payload, problem = _encode(value)
    if rank_and_size(group)[1] > 1:
        payload = _broadcast_bytes(payload, src, group)
    if payload is None:
        raise TypeError(f"broadcast_json: rank {src}'s object is not JSON") from problem
    return json.loads(payload)


def _encode(value: Any) -> tuple[bytes | None, Exception | None]:
    try:
        return json.dumps(value).encode(), None
    except (TypeError, ValueError) as problem:
        return None, problem  # raised after the others have heard of it


def _broadcast_bytes(payload: bytes | None, src: int, group: Group) -> bytes | None:
    """Rank ``src``'s bytes, ``None`` when it has none; the other ranks bring ``None``."""
    device = _device_of(group)
    length = torch.tensor([_NOT_JSON if payload is None else len(payload)], device=device)
    with waiting("settings: broadcast"):
        dist.broadcast(length, src, group=group)
    size = int(length.item())
    if size == _NOT_JSON:
        return None
    if payload is not None:
        content = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(device)
    else:
        content = torch.empty(size, dtype=torch.uint8, device=device)
    with waiting("settings: broadcast"):
        dist.broadcast(content, src, group=group)
    return content.cpu().numpy().tobytes()


def _device_of(group: Group) -> torch.device:
    """Where a tensor must be to travel from here."""
    backend = dist.get_backend(group) if rank_and_size(group)[1] > 1 else "gloo"
    if "nccl" in backend and "gloo" not in backend:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


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


def release(*models: torch.nn.Module) -> None:
    """Part models from the process group; they are unusable afterwards. Not a collective.

    A DistributedDataParallel model's reducer that outlives its process group can end a finished
    process with ``terminate called without an active exception``.

    Args:
        models: modules that are, or hold, DistributedDataParallel models.
    """
    for model in models:
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                vars(module).pop("reducer", None)
                vars(module).pop("logger", None)
    gc.collect()


def shutdown(*models: torch.nn.Module, timeout_s: float = 60.0) -> bool:
    """Leave the process group in the one order that is safe: models, barrier, group.

    For the models see :func:`release`. While an exception is on its way
    (as in ``finally`` or an ``ExitStack``) the other ranks may never come: then there is no
    barrier, and little patience.

    Args:
        models: modules that are, or hold, DistributedDataParallel models; unusable afterwards.
        timeout_s: seconds to wait for the other ranks; at most 5 while an exception is on its way.

    Returns:
        Whether the group is gone. If not, a collective is still pending and only ``os._exit``
        leaves the process without waiting for it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return True
    failing = sys.exc_info()[0] is not None
    release(*models)
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def leave() -> None:
        if device is not None:
            torch.cuda.set_device(device)  # a thread starts at device 0
        try:
            if not failing:
                dist.barrier()
        except RuntimeError as error:
            log.warning("the other ranks did not come to the end: %s", error)
        dist.destroy_process_group()

    # Both calls can wait for ever on a rank that is gone; a thread can be left behind.
    leaving = threading.Thread(target=leave, name="leave-process-group", daemon=True)
    leaving.start()
    leaving.join(min(timeout_s, 5.0) if failing else timeout_s)
    if leaving.is_alive():
        log.warning("rank %d could not leave its process group in time", dist.get_rank())
    return not leaving.is_alive()
