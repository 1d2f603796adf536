"""Batches in the making: planned, decoded by a pool of threads, handed out in order.

Nothing here keeps state between batches: a batch is a function of (seed, position), cut into chunks
that a pool of threads computes in any order. Starting in the middle of an epoch is therefore
exact, the number of threads changes no byte, an error in a chunk reaches the consumer as the
exception that it is, and prefetching runs on over the end of an epoch. The threads hold no Python
lock while they decode.

A damaged sample is such an error, unless the data may have some: then its place shows the sample
that :mod:`data_pipeline.reading.substitutes` draws, and the batch says so. How many a run may see
is the caller's to watch, over all its processes; a loader knows its own share only.

A view may show another frame of its sample's clip: then frames are decoded, each for one view.

Shape suffixes: B samples of this process, N of a part of them, V views of a group, S their side,
4 = (top, left, height, width).
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from common.bounds import check_bounds
from common.cores import cores_alone
from common.errors import ConfigError, DataError
from data_pipeline.reading.batch import Batch, BatchMemory, Transfer
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.order import IdArray, Position
from data_pipeline.reading.substitutes import (
    BoxArray,
    Cut,
    Cuts,
    Decoder,
    Substitute,
    cuts_of,
    decode_or_substitute,
)

Backend = Literal["auto", "ffcv", "torchvision"]

_LEAST_CHUNK = 8  # samples; below, handing out work costs more than it balances


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How batches are read; nothing here changes which samples and boxes they hold."""

    backend: Backend = "auto"
    """What decodes: ffcv, torchvision, or ffcv where it can be used."""
    workers: int = 0
    """Decoding threads; 0: this process's share of the cores, less 2 where it has a GPU."""
    prefetch: int = 2
    """Batches decoded ahead of the one in use."""
    max_reduction: Literal[1, 2, 4, 8] = 1
    """How much smaller a JPEG may be decoded where every crop stays at least as large as its view.
    2: images of 1600 pixels load 1.4 times as fast and differ by 0.6 instead of 0.3 of 256 levels
    on average from torchvision's; smaller than twice the crop's size: no difference. FFCV only."""

    def __post_init__(self) -> None:
        if self.backend not in ("auto", "ffcv", "torchvision"):
            raise ConfigError(f"unknown loader backend {self.backend!r}: auto, ffcv or torchvision")
        check_bounds(self, "--loader.", workers="[0, 4096]", prefetch="[1, 1000]")
        if self.max_reduction not in (1, 2, 4, 8):
            raise ConfigError(
                f"loader max_reduction must be 1, 2, 4 or 8, got {self.max_reduction}"
            )


@dataclass(frozen=True)
class BatchPlan:
    """One process's part of a batch: which samples, which boxes; a function of its position."""

    position: Position
    seed: int
    count: int
    ids: Callable[[], tuple[IdArray, IdArray]]
    """Of the samples, and the numbers that their views are drawn by."""
    boxes: Callable[[int, IdArray, IdArray], BoxArray]
    """Of a group of views ``(N, V, 4)``, drawn by these numbers, in the images of samples of these
    ids: ``(N,)``, or ``(N, V)`` where each view shows another."""
    groups: tuple[tuple[int, int], ...]
    """Of each, its number of views and their side."""
    frames: Callable[[int, IdArray, IdArray], IdArray | None] = lambda group, numbers, ids: None
    """Of a group whose views show other samples, those ``(N, V)``, drawn by these numbers about
    samples of these ids."""


@dataclass
class _Read:
    """Groups of views that are cut out of the same images."""

    groups: tuple[int, ...]
    shown: IdArray
    """``(B,)``, the samples of all views; ``(B, V)`` where each view shows another."""
    boxes: list[BoxArray] = field(default_factory=list)
    """Of each group ``(B, V, 4)``."""


class PendingBatch:
    """A batch being decoded."""

    def __init__(self, loader: "PoolLoader", plan: BatchPlan) -> None:
        shapes = [(plan.count, views, size, size, 3) for views, size in plan.groups]
        memory = loader._memory.take((sum(map(math.prod, shapes)),))
        parts = memory.split([math.prod(shape) for shape in shapes])
        self._crops = tuple(part.view(shape) for part, shape in zip(parts, shapes))
        self._labels = torch.empty(plan.count, dtype=torch.int64)
        self._loader, self._plan = loader, plan
        # Planned once, by the first thread that is free: in every part it would hold Python's lock
        # for milliseconds. Parts wait for it, and the pool begins none of them before.
        self._planned = loader._pool.submit(self._make_plan)
        self._parts: list[Future[list[Substitute]]] = [
            loader._pool.submit(self._decode, part) for part in loader._chunks(plan.count)
        ]

    def _make_plan(self) -> tuple[IdArray, IdArray, list[_Read]]:
        ids_B, numbers_B = self._plan.ids()
        together, reads = list[int](), list[_Read]()
        for group in range(len(self._plan.groups)):
            frames_BV = self._plan.frames(group, numbers_B, ids_B)
            if frames_BV is None:
                together.append(group)
            else:
                reads.append(_Read((group,), frames_BV))
        if together:
            reads.insert(0, _Read(tuple(together), ids_B))
        for read in reads:
            read.boxes += (self._plan.boxes(group, numbers_B, read.shown) for group in read.groups)
        return ids_B, numbers_B, reads

    def _decode(self, part: slice) -> list[Substitute]:
        ids_B, numbers_B, reads = self._planned.result()
        ids_N, numbers_N = ids_B[part], numbers_B[part]
        replaced = []
        for read in reads:
            outs = [self._crops[group].numpy() for group in read.groups]
            cuts = cuts_of(tuple(map(Cut, read.boxes, outs)), part)
            replaced += self._loader._decode(self._plan, read, read.shown[part], numbers_N, cuts)
        shown = {substitute.sample: substitute.shown for substitute in replaced}
        shown_N = np.array([shown.get(i, i) for i in ids_N.tolist()]) if shown else ids_N
        self._labels[part] = torch.from_numpy(self._loader.data.table.labels[shown_N])
        return replaced

    def ready(self) -> bool:
        """Whether :meth:`result` would not wait."""
        return all(part.done() for part in self._parts)

    def result(self) -> Batch:
        """Wait for the batch; raises what decoding raised, of the first sample in the batch.

        What was decoded while somebody wrote over the file is never handed out.
        """
        wait(self._parts)
        self._loader.data.check_unchanged()
        replaced = [substitute for part in self._parts for substitute in part.result()]
        ids_B, numbers_B, _ = self._planned.result()
        return Batch(
            self._crops,
            torch.from_numpy(ids_B),
            self._labels,
            self._plan.position,
            tuple(replaced),
            None if numbers_B is ids_B else torch.from_numpy(numbers_B),
        )

    def cancel(self) -> None:
        """Begin no more of it."""
        self._planned.cancel()
        for part in self._parts:
            part.cancel()


class PoolLoader:
    """A set, its decoder, the threads that use it, and ``prefetch`` batches in the making.

    Attributes:
        data: that is read.
        config: how it is read, by how many threads.
        wait_seconds: how long consumers have waited for batches so far.
    """

    def __init__(
        self,
        data: OpenData,
        config: LoaderConfig,
        device: torch.device | None = None,
        groups: Sequence[int] = (1,),
    ) -> None:
        self.data = data
        self.config = replace(config, workers=config.workers or cores_alone())
        self.wait_seconds = 0.0
        self._decoder = _open_decoder(data, config, groups)
        self._device = device
        self._memory = BatchMemory(keep=config.prefetch + 2)
        self._closed = False
        self._pool = ThreadPoolExecutor(self.config.workers, thread_name_prefix="widebatch-decode")

    def close(self) -> None:
        """Stop the threads; iterators of this loader end. Safe to call twice."""
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _chunks(self, count: int) -> list[slice]:
        """A batch's samples, in parts for the threads: two for each, so that none waits long."""
        size = max(_LEAST_CHUNK, math.ceil(count / (2 * self.config.workers)))
        return [slice(first, min(first + size, count)) for first in range(0, count, size)]

    def _decode(
        self, plan: BatchPlan, read: _Read, shown: IdArray, numbers_N: IdArray, cuts: Cuts
    ) -> list[Substitute]:
        """Cut views out of samples of ``plan``; returns what was replaced.

        Raises:
            DataError: a sample is damaged, and substitutes are not allowed or are too.
        """
        views = math.prod(shown.shape[1:])
        if shown.ndim > 1:  # an image for each view
            shown, cuts = shown.ravel(), tuple(cut.one_by_one() for cut in cuts)
        if not self.data.max_damaged:
            self._decoder.decode(shown, cuts)
            return []

        def boxes_of(place: slice, other: IdArray) -> list[BoxArray]:
            row, view = divmod(place.start, views)
            number_1 = numbers_N[row : row + 1]
            if len(shown) == len(numbers_N):
                return [plan.boxes(group, number_1, other) for group in read.groups]
            (group,) = read.groups
            boxes_1V4 = plan.boxes(group, number_1, np.broadcast_to(other, (1, views)))
            return [boxes_1V4[:, view : view + 1]]

        return decode_or_substitute(
            self._decoder,
            shown,
            cuts,
            boxes_of=boxes_of,
            seed=plan.seed,
            epoch=plan.position.epoch,
            num_samples=self.data.info.num_samples,
        )

    def _run(self, pending: Iterator[PendingBatch]) -> Iterator[Batch]:
        """``pending`` makes batches as it is advanced; they are handed out in its order."""
        queue: deque[PendingBatch] = deque()
        transfer = Transfer(self._device)
        try:
            while not self._closed:
                while len(queue) <= self.config.prefetch:
                    made = next(pending, None)
                    if made is None:
                        break
                    queue.append(made)
                if not queue and not transfer.waiting:
                    return
                if not transfer.waiting:
                    transfer.start(self._wait(queue.popleft()))
                batch = transfer.finish()
                if queue and queue[0].ready():  # one step ahead, never at the price of a wait
                    transfer.start(self._wait(queue.popleft()))
                yield batch
        finally:
            for left in queue:
                left.cancel()

    def _wait(self, pending: PendingBatch) -> Batch:
        start = time.perf_counter()
        try:
            return pending.result()
        finally:
            self.wait_seconds += time.perf_counter() - start


def _open_decoder(data: OpenData, config: LoaderConfig, groups: Sequence[int]) -> Decoder:
    if config.backend != "torchvision":
        from data_pipeline.reading.ffcv_compat import ffcv_problem

        problem = ffcv_problem()
        if problem is None:
            from data_pipeline.reading.ffcv_loader import FfcvDecoder

            return FfcvDecoder(data, config.max_reduction, groups)
        if config.backend == "ffcv":
            raise DataError(problem)
    from data_pipeline.reading.torchvision_loader import TorchvisionDecoder

    return TorchvisionDecoder(data)
