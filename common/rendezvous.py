"""How the processes of a run find each other, what one says and does until then, and how they part.

torch's own calls neither speak nor end nor let a signal through while they wait. So a thread of
its own makes them, and the main thread waits for it in short looks. Who has come stands in the
store that the launcher names: torchrun's, or the one of rank 0.
"""

import gc
import itertools
import logging
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common.errors import RankLostError, first_sentence

log = logging.getLogger(__name__)

JOIN_TIMEOUT = 120.0
"""Seconds that a process waits for the others."""

_LOOK = 0.1  # seconds between two looks
_SILENT = 1.0  # seconds in which processes that start together come without a word
_SILENT_OTHERS = 10.0  # of all but rank 0, which speaks for them unless it is the one that lacks
_AGAIN = 30.0  # seconds until the next word

_TO_REACH = timedelta(seconds=10)  # what answers at the port at all may be no store
_TO_CONNECT = timedelta(minutes=30)  # torch's own, and that of the group's collectives

_joins = itertools.count()


def join(
    backend: Literal["gloo", "nccl"],
    timeout: float = JOIN_TIMEOUT,
    device: torch.device | None = None,
) -> None:
    """Join the process group that torch's environment variables describe. A collective.

    Args:
        backend: of the group.
        timeout: seconds to wait for the others; 0: for ever.
        device: this process's GPU, for nccl.

    Raises:
        RankLostError: the others did not come in time, or could not be connected.
    """
    if dist.is_initialized():
        return
    meeting = _Meeting(backend, device)
    thread = threading.Thread(target=meeting.hold, name="join", daemon=True)
    thread.start()
    started, said = time.monotonic(), False
    word = _SILENT_OTHERS if meeting.rank else _SILENT
    try:
        while not meeting.over.wait(_LOOK):
            waited = time.monotonic() - started
            if 0 < timeout < waited:
                raise RankLostError(meeting.failure(timeout))
            if waited >= word:
                log.log(logging.WARNING if meeting.rank else logging.INFO, "%s", meeting.state())
                said, word = True, word + _AGAIN
    finally:
        meeting.abandoned.set()
    if isinstance(meeting.problem, RuntimeError) and meeting.size > 1:
        reason = first_sentence(meeting.problem)
        raise RankLostError(
            f"the {meeting.size} processes of the run did not find each other: {reason}; start the"
            " run again, and if it stays, `widebatch doctor` under the same launcher examines the"
            " links"
        ) from meeting.problem
    if meeting.problem is not None:
        raise meeting.problem
    if said:
        log.info("all %d processes have come", meeting.size)


class _Meeting:
    """The thread's side of it: the store, who has come to it, and the group.

    Keys are those of this attempt and this join: one store serves all attempts of a torchrun (2.14,
    one node), and the addresses of the attempt before, which still stand there, lead nowhere.
    """

    def __init__(self, backend: str, device: torch.device | None) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.come = 0
        """Processes at the store; 0 while it cannot be reached."""
        self.problem: BaseException | None = None
        self.over, self.abandoned = threading.Event(), threading.Event()
        self._backend, self._device = backend, device
        self._host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        self._port = int(os.environ.get("MASTER_PORT", "29500"))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._prefix = f"widebatch-{attempt}-{next(_joins)}"

    def hold(self) -> None:
        """Meet the others at the store and make the group; leaves word in ``problem``."""
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)  # a thread starts at device 0
            store = self._meet() if self.size > 1 else dist.HashStore()
            if store is not None:
                dist.init_process_group(
                    self._backend,
                    store=store,
                    rank=self.rank,
                    world_size=self.size,
                    timeout=_TO_CONNECT,
                    device_id=self._device,
                )
        except BaseException as problem:  # the main thread raises it
            self.problem = problem
        finally:
            self.over.set()

    def _meet(self) -> dist.Store | None:
        """The store when all have come to it; ``None`` if nobody waits for that any more."""
        of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        own = self._store("127.0.0.1", serve=True) if self.rank == 0 and not of_agent else None
        while not self.abandoned.is_set():
            try:
                store = own or self._reach()
                if store is not None and self._all_come(
                    keyed := dist.PrefixStore(self._prefix, store)
                ):
                    return keyed
            except dist.DistNetworkError:
                # What listened there has gone: a run that ended just now, whose port this one has.
                if own is not None:
                    raise
            self.come = 0
            time.sleep(_LOOK)
        return None

    def _reach(self) -> dist.TCPStore | None:
        try:  # TCPStore itself would fill the terminal with every failure to connect
            socket.create_connection((self._host, self._port), timeout=5).close()
        except OSError:
            return None
        return self._store(self._host, serve=False)

    def _store(self, host: str, *, serve: bool) -> dist.TCPStore:
        return dist.TCPStore(
            host, self._port, is_master=serve, wait_for_workers=False, timeout=_TO_REACH
        )

    def _all_come(self, store: dist.Store) -> bool:
        if store.add(f"rank-{self.rank}", 1) == 1:
            store.add("come", 1)
        while not self.abandoned.is_set():
            self.come = store.add("come", 0)
            if self.come >= self.size:
                store.set_timeout(_TO_CONNECT)
                return True
            time.sleep(_LOOK)
        return False

    @property
    def _place(self) -> str:
        return f"{self._host}:{self._port}"

    def state(self) -> str:
        """What is waited for."""
        if self.come >= self.size:
            return f"connecting {self.size} processes"
        if not self.come:
            return f"waiting for rank 0 of {self.size} processes at {self._place}"
        return f"waiting for {self.size - self.come} of {self.size} processes at {self._place}"

    def failure(self, seconds: float) -> str:
        """What has failed after so many seconds, and what to do."""
        if self.come >= self.size:
            return (
                f"the {self.size} processes came to {self._place} and were not connected within"
                f" {seconds:g} s; `widebatch doctor` under the same launcher examines the links"
            )
        if self.come > 1:
            return (
                f"{self.size - self.come} of {self.size} processes did not come to {self._place}"
                f" within {seconds:g} s; their own output says why. A longer"
                " --watchdog.join-timeout (evaluate, doctor: --join-timeout) waits for late ones"
            )
        names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"]
        if "SLURM_STEP_ID" in os.environ:
            names += ["SLURM_STEP_ID", "SLURM_PROCID"]
        return (
            f"none of the other {self.size - 1} processes came to {self._place} within {seconds:g}"
            " s: start all of them with --devices, torchrun or srun; if this process is to run"
            f" alone, first `unset {' '.join(names)}`"
        )


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


def shutdown(*models: torch.nn.Module) -> bool:
    """Leave the process group in the one order that is safe: models, barrier, group.

    For the models see :func:`release`. While an exception is on its way
    (as in ``finally`` or an ``ExitStack``) the other ranks may never come: then there is no
    barrier, and little patience.

    Args:
        models: modules that are, or hold, DistributedDataParallel models; unusable afterwards.

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
    leaving.join(5.0 if failing else 60.0)
    if leaving.is_alive():
        log.warning("rank %d could not leave its process group in time", dist.get_rank())
    return not leaving.is_alive()
