"""A batch of crops: what it holds, whose memory it is, and its way to the device."""

import math
import weakref
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from data_pipeline.reading.order import Position
from data_pipeline.reading.substitutes import Substitute


@dataclass(frozen=True)
class Batch:
    """One process's part of a global batch. It owns its memory and may be kept."""

    crops: tuple[torch.Tensor, ...]
    """Of each group of views, uint8 ``(B, V, S, S, 3)``."""
    ids_B: torch.Tensor  # int64  # noqa: N815
    labels_B: torch.Tensor  # int64; -1: none  # noqa: N815
    position: Position
    # Samples of ids_B that are damaged, and what their places show: pixels and label are another's.
    substitutes: tuple[Substitute, ...] = ()
    # int64: what views are drawn by where that is not the id, see EpochOrder.
    numbers_B: torch.Tensor | None = None  # noqa: N815

    @property
    def drawn_by_B(self) -> torch.Tensor:  # noqa: N802
        """int64: the samples' own coordinate in all that is drawn for their views."""
        return self.ids_B if self.numbers_B is None else self.numbers_B

    @property
    def crops_BVHWC(self) -> torch.Tensor:  # noqa: N802
        """The crops of a batch whose views have all one size."""
        (crops_BVHWC,) = self.crops
        return crops_BVHWC


class BatchMemory:
    """Memory for batches, used again when nobody holds the batch or a view of it any more.

    Fresh memory would cost a tenth of the decoding time in page faults. Pinned memory is not kept
    here: torch has an allocator for it that does the same.
    """

    def __init__(self, keep: int) -> None:
        self._free: deque[npt.NDArray[np.uint8]] = deque(maxlen=keep)

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """An uninitialised uint8 tensor of ``shape``; pinned where there is CUDA."""
        if torch.cuda.is_available():
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        size = math.prod(shape)
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(size, np.uint8)
        if memory.size < size:
            memory = np.empty(size, np.uint8)
        lent = memory[:size]  # an object of its own, which every tensor on it keeps alive
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent).view(shape)


class Transfer:
    """Moves one batch ahead to a CUDA device on a stream of its own; elsewhere hands it on.

    Only pixels travel: ids and labels are wanted on the host, where reading them waits for nothing.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        self._stream = torch.cuda.Stream(self._device) if self._device else None
        self._batch: Batch | None = None

    @property
    def waiting(self) -> bool:
        """Whether a batch has been started and not finished."""
        return self._batch is not None

    def start(self, batch: Batch) -> None:
        """Send ``batch`` on its way; :meth:`finish` hands it out."""
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                # Pinned memory comes from torch's own allocator, which does not hand it out again
                # before this copy is done.
                crops = tuple(group.to(self._device, non_blocking=True) for group in batch.crops)
                batch = replace(batch, crops=crops)
        self._batch = batch

    def finish(self) -> Batch:
        """The batch, safe to use on the device's current stream."""
        batch, self._batch = self._batch, None
        assert batch is not None  # noqa: S101 - start() comes first
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            # Made on another stream: freed only after this one is done with it.
            for group in batch.crops:
                group.record_stream(current)
        return batch
