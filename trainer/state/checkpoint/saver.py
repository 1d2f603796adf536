"""Saves checkpoints behind the steps of a run, and decides what a failed save means.

Training waits for a copy of the tensors in host memory. Checksums, writing and flushing to disk
happen in a thread of rank 0 while the next steps run. One save is under way at a time; another one
waits for it. What a run ends with is waited for, by all ranks.
"""

import errno
import logging
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from common import fault_injection
from common.bounds import check_bounds
from common.collectives import broadcast_json
from common.cores import cores_alone
from trainer.state.checkpoint.files import Tensors
from trainer.state.checkpoint.store import CheckpointStore

log = logging.getLogger(__name__)

_THREADS = 4  # that copy, at most: a core copies some 5 GB/s, memory gives several times that


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and how much to keep. A stopped or finished run always saves."""

    every_epochs: int = 1
    """Save after every so many epochs; 0: not at epochs' ends."""
    every_steps: int = 0
    """Save after every so many optimizer steps too; 0: not by steps."""
    keep: int = 2
    """Newest checkpoints to keep, at least 2 so that a damaged one has a predecessor; the one with
    the best online kNN is kept besides."""
    asynchronous: bool = True
    """Write while training goes on; costs rank 0 a copy of weights and optimizer in host memory."""
    max_failures: int = 3
    """End the run, to be started again, after so many failed saves in a row (a full disk). The last
    checkpoint of a run must not fail at all."""

    def __post_init__(self) -> None:
        every = {"every_epochs": "[0, 1e9]", "every_steps": "[0, 1e9]"}
        check_bounds(self, "--checkpoint.", **every, keep="[2, 1e9]", max_failures="[1, 1e9]")


class CheckpointSaver:
    """Saves a run's checkpoints. The same calls on all ranks; one of them writes.

    Args:
        store: where to.
        config: when a failure ends the run, and whether writing happens behind the steps.
        is_writer: whether this rank writes; it is rank 0.
    """

    def __init__(self, store: CheckpointStore, config: CheckpointConfig, is_writer: bool) -> None:
        self._store, self._config, self._is_writer = store, config, is_writer
        self._host = HostCopy()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="widebatch-checkpoint")
        self._under_way: tuple[int, Future[None]] | None = None
        self._failures = 0
        self._error: OSError | None = None
        self.step: int | None = None
        """The step that was given to :meth:`save` last."""

    def save(
        self,
        state: Mapping[str, Any],
        parts: Mapping[str, Tensors],
        best: Mapping[str, Any] | None = None,
    ) -> None:
        """Save a checkpoint; returns when the tensors may change. Not a collective.

        A failure to write is logged and counted; see :meth:`raise_if_failing`.

        Args:
            state: JSON values with ``step``; see :meth:`CheckpointStore.save`.
            parts: file stem to tensors; only the writer's are looked at.
            best: facts to mark this checkpoint as the best one with.
        """
        self.step = int(state["step"])
        if not self._is_writer:
            return
        self._settle()
        if self._config.asynchronous:
            fault_injection.at("checkpoint.copy")
            parts = self._host.take(parts)
        written = self._thread.submit(self._write, dict(state), parts, best)
        self._under_way = (self.step, written)
        if not self._config.asynchronous:
            self._settle()

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written behind the steps."""
        return self._under_way is not None and not self._under_way[1].done()

    def failure(self) -> int:
        """For ranks to agree on each step: the last failed save's errno, after too many in a row.

        0 while there are fewer.
        """
        if not self.is_writing:
            self._settle()
        if self._error is None or self._failures < self._config.max_failures:
            return 0
        return self._error.errno or errno.EIO

    def raise_if_failing(self, code: int) -> None:
        """End the run on all ranks together.

        Args:
            code: the maximum over all ranks of what :meth:`failure` returned.

        Raises:
            OSError: with that errno, where it is not 0.
        """
        if code and self._error is not None:
            raise self._error
        if code:
            raise OSError(
                code,
                f"{os.strerror(code)}: rank 0 could not write {self._config.max_failures}"
                " checkpoints in a row",
            )

    def finish(self) -> None:
        """Return when what was given to :meth:`save` last is on disk. A collective.

        Raises:
            OSError: on all ranks, when it could not be written; earlier checkpoints stand.
        """
        self._settle()
        error = self._error
        verdict = broadcast_json([error.errno or errno.EIO, str(error)] if error else None)
        if error is not None:
            raise error
        if verdict is not None:
            raise OSError(verdict[0], f"rank 0 could not save: {verdict[1]}")

    def close(self) -> None:
        """Wait for the write that is under way; its failure is logged. Not a collective."""
        try:
            self._settle()
        finally:
            self._thread.shutdown()
            self._host.close()

    def _write(
        self, state: Mapping[str, Any], parts: Mapping[str, Tensors], best: Mapping[str, Any] | None
    ) -> None:
        self._host.wait()
        self._store.save(state, parts)
        if best is not None:
            self._store.mark_best(int(state["step"]), **best)

    def _settle(self) -> None:
        """Wait for the write that is under way, and note how it ended.

        Raises:
            Exception: what went wrong, if it was not the file system: a defect, at once.
        """
        if self._under_way is None:
            return
        (step, written), self._under_way = self._under_way, None
        try:
            written.result()
        except OSError as error:
            self._failures += 1
            self._error = error
            log.warning(
                "checkpoint of step %d could not be written: %s (failed in a row: %d, of %d that"
                " end the run); the ones before it stand",
                step,
                error,
                self._failures,
                self._config.max_failures,
            )
        else:
            self._failures = 0
            self._error = None


class HostCopy:
    """Host memory for the tensors of a checkpoint, kept from one to the next.

    From a GPU the memory is pinned and the copies are only queued, behind the work that makes the
    tensors and before that of the next step: nothing waits but :meth:`wait`. On the CPU several
    threads copy.
    """

    def __init__(self) -> None:
        self._layout: list[object] = []
        self._copies: list[torch.Tensor] = []
        self._arrived: torch.cuda.Event | None = None
        self._count = min(_THREADS, cores_alone())
        self._threads = ThreadPoolExecutor(self._count, thread_name_prefix="widebatch-copy")

    @torch.no_grad()
    def take(self, parts: Mapping[str, Tensors]) -> dict[str, Tensors]:
        """Copy tensors. What the call before returned is overwritten.

        Args:
            parts: file stem to tensors, on the CPU or one GPU.

        Returns:
            The same names; tensors of this memory, to be read after :meth:`wait`. They keep their
            memory layout: the copy is a plain one, and row-major order is the writer's work.
        """
        tensors = [tensor.detach() for part in parts.values() for tensor in part.values()]
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        layout = [on_gpu, *((t.dtype, t.shape, t.stride()) for t in tensors)]
        if layout != self._layout:
            self._copies = []  # give the old memory back first
            self._copies = [torch.empty_like(t, device="cpu", pin_memory=on_gpu) for t in tensors]
            self._layout = layout
        self._arrived = None
        if on_gpu:
            torch._foreach_copy_(self._copies, tensors, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._copy_in_threads(tensors)
        copies = iter(self._copies)
        return {part: {name: next(copies) for name in named} for part, named in parts.items()}

    def wait(self) -> None:
        """Return when the copies of the last :meth:`take` are complete. From any thread."""
        if self._arrived is not None:
            self._arrived.synchronize()

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    def _copy_in_threads(self, tensors: list[torch.Tensor]) -> None:
        """About as many bytes in each."""
        shares: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
        share = sum(tensor.nbytes for tensor in tensors) / self._count
        taken = 0
        for copy, tensor in zip(self._copies, tensors):
            if taken >= share * len(shares):
                shares.append(([], []))
            shares[-1][0].append(copy)
            shares[-1][1].append(tensor)
            taken += tensor.nbytes
        for done in [self._threads.submit(torch._foreach_copy_, *lists) for lists in shares]:
            done.result()
