"""A copy of a checkpoint's tensors in host memory, which training cannot change any more."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from common.cores import cores_alone
from trainer.state.checkpoint.files import Tensors

_THREADS = 4  # at most: a core copies some 5 GB/s, memory gives several times that


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
