"""Batches of views in an order that any number of processes shares, from any position on.

Nothing here keeps state between batches: a batch is a function of (seed, position), cut into chunks
that a pool of threads computes in any order. Starting in the middle of an epoch is therefore
exact, the number of threads changes no byte, an error in a chunk reaches the consumer as the
exception that it is, and prefetching runs on over the end of an epoch. The threads hold no Python
lock while they decode.

A damaged sample is such an error, unless the data may have some: then its place shows the sample
that :mod:`data_pipeline.reading.substitutes` draws, and the batch says so. How many a run may see
is the caller's to watch, over all its processes; a loader knows its own share only.

Shape suffixes: B samples of this process, N of a part of them, V views of a group, S their side,
4 = (top, left, height, width).
"""

import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from common.bounds import check_bounds
from common.cores import cores_alone
from common.errors import ConfigError, DataError
from data_pipeline.crops import centre_crop_boxes, random_resized_crop_boxes
from data_pipeline.reading.batch import Batch, BatchMemory, Transfer
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.order import EpochOrder, IdArray, Position, rank_slice
from data_pipeline.reading.substitutes import (
    BoxArray,
    Cut,
    Cuts,
    Decoder,
    Substitute,
    cuts_of,
    decode_or_substitute,
)
from data_pipeline.views import ViewPlan

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
class _Plan:
    """One process's part of a batch: which samples, which boxes; a function of its position."""

    position: Position
    seed: int
    count: int
    ids: Callable[[], tuple[IdArray, IdArray]]
    """Of the samples, and the numbers that their views are drawn by."""
    boxes: Callable[[IdArray, IdArray], list[BoxArray]]
    """Of each group of views ``(N, V, 4)``, drawn by these numbers, in the images of samples of
    these ids."""
    groups: tuple[tuple[int, int], ...]
    """Of each, its number of views and their side."""


class _Pending:
    """A batch being decoded."""

    def __init__(self, loader: "_Loader", plan: _Plan) -> None:
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

    def _make_plan(self) -> tuple[IdArray, IdArray, list[BoxArray]]:
        ids_B, numbers_B = self._plan.ids()
        return ids_B, numbers_B, self._plan.boxes(numbers_B, ids_B)

    def _decode(self, part: slice) -> list[Substitute]:
        ids_B, numbers_B, boxes = self._planned.result()
        ids_N, numbers_N = ids_B[part], numbers_B[part]
        cuts = tuple(Cut(boxes_BV4, crops.numpy()) for boxes_BV4, crops in zip(boxes, self._crops))
        replaced = self._loader._decode(self._plan, ids_N, numbers_N, cuts_of(cuts, part))
        shown = {substitute.sample: substitute.shown for substitute in replaced}
        shown_N = np.array([shown.get(i, i) for i in ids_N.tolist()]) if shown else ids_N
        self._labels[part] = torch.from_numpy(self._loader.data.table.labels[shown_N])
        return replaced

    def ready(self) -> bool:
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
        self._planned.cancel()
        for part in self._parts:
            part.cancel()


class _Loader:
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
        groups: int = 1,
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
        self, plan: _Plan, ids_N: IdArray, numbers_N: IdArray, cuts: Cuts
    ) -> list[Substitute]:
        """Cut views out of samples of ``plan``; returns what was replaced.

        Raises:
            DataError: a sample is damaged, and substitutes are not allowed or are too.
        """
        if not self.data.max_damaged:
            self._decoder.decode(ids_N, cuts)
            return []
        return decode_or_substitute(
            self._decoder,
            ids_N,
            cuts,
            boxes_of=lambda place, shown: plan.boxes(numbers_N[place], shown),
            seed=plan.seed,
            epoch=plan.position.epoch,
            num_samples=self.data.info.num_samples,
        )

    def _run(self, pending: Iterator[_Pending]) -> Iterator[Batch]:
        """``pending`` makes batches as it is advanced; they are handed out in its order."""
        queue: deque[_Pending] = deque()
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

    def _wait(self, pending: _Pending) -> Batch:
        start = time.perf_counter()
        try:
            return pending.result()
        finally:
            self.wait_seconds += time.perf_counter() - start


def _open_decoder(data: OpenData, config: LoaderConfig, groups: int) -> Decoder:
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


class TrainLoader(_Loader):
    """Crops of every sample in an order that is drawn anew for each epoch.

    Args:
        data: the set.
        views: of each sample; its image is decoded once.
        config: how they are read.
        seed: the run's seed: of order and crops.
        batch_size: samples of the global batch, over all processes; ``world_size`` divides it.
        rank: of this process.
        world_size: number of processes.
        device: where batches shall lie; CUDA devices get them one step ahead, on a stream of
            their own. None: on the CPU, pinned where there is CUDA.
        order: of the samples, where an epoch is not given its own; None: all of them, once.

    Attributes:
        order: likewise.
        steps_per_epoch: whole global batches in it.

    Raises:
        DataError: the order has fewer places than a batch, or the backend is not there.
        ValueError: the batch does not divide.
    """

    def __init__(
        self,
        data: OpenData,
        views: ViewPlan,
        config: LoaderConfig,
        *,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
        order: EpochOrder | None = None,
    ) -> None:
        super().__init__(data, config, device, len(views))
        self.order = EpochOrder(data.info.num_samples) if order is None else order
        self._share = rank_slice(batch_size, rank, world_size)
        self.steps_per_epoch = self.order.places // batch_size
        if not self.steps_per_epoch:
            raise DataError(
                f"{data.info.name}: {self.order.places} samples are fewer than one global batch "
                f"of {batch_size}; lower --batch"
            )
        self._views, self._seed, self._batch_size = views, seed, batch_size
        self._groups = tuple((len(group.looks), group.crop.size) for group in views)

    def starting_at(self, position: Position) -> Iterator[Batch]:
        """Batches from ``position`` on, over the ends of epochs, for ever.

        Raises:
            IndexError: the epoch has no such step.
            DataError: on reaching a sample that does not decode.
        """
        return self._from(position, self.order, endless=True)

    def epoch(self, position: Position, order: EpochOrder | None = None) -> Iterator[Batch]:
        """Batches from ``position`` to the end of its epoch; nothing is read beyond.

        Args:
            position: of the first.
            order: of this epoch; None: the loader's.

        Raises:
            IndexError, DataError: as :meth:`starting_at`.
            ValueError: the order makes an epoch of another number of steps.
        """
        order = self.order if order is None else order
        if order.places // self._batch_size != self.steps_per_epoch:
            raise ValueError(f"{order.places} places are not {self.steps_per_epoch} steps")
        return self._from(position, order, endless=False)

    def global_ids(self, position: Position, order: EpochOrder | None = None) -> IdArray:
        """Samples of a global batch, in the order of a one-process run; ``order`` as above."""
        first = position.step * self._batch_size
        places = np.arange(first, first + self._batch_size)
        return (order or self.order).at(self._seed, position.epoch, places)[0]

    def _from(self, position: Position, order: EpochOrder, endless: bool) -> Iterator[Batch]:
        if position.epoch < 0 or not 0 <= position.step < self.steps_per_epoch:
            raise IndexError(f"{position}: epochs have steps 0 to {self.steps_per_epoch - 1}")
        return self._run(self._pending(position, order, endless))

    def _pending(self, position: Position, order: EpochOrder, endless: bool) -> Iterator[_Pending]:
        count = self._share.stop - self._share.start
        while True:
            first = position.step * self._batch_size
            places = np.arange(first + self._share.start, first + self._share.stop)
            ids = functools.partial(order.at, self._seed, position.epoch, places)
            boxes = functools.partial(self._boxes, position.epoch)
            yield _Pending(self, _Plan(position, self._seed, count, ids, boxes, self._groups))
            step = position.step + 1
            last = step == self.steps_per_epoch
            if last and not endless:
                return
            position = Position(position.epoch + last, 0 if last else step)

    def _boxes(self, epoch: int, numbers_N: IdArray, shown_N: IdArray) -> list[BoxArray]:
        heights, widths = self.data.table.heights[shown_N], self.data.table.widths[shown_N]
        boxes, first = [], 0
        for group in self._views:
            count, size = len(group.looks), group.crop.size
            if group.random:
                drawn = random_resized_crop_boxes(
                    self._seed, epoch, numbers_N, count, heights, widths, group.crop, first=first
                )
            else:
                drawn = centre_crop_boxes(heights, widths, size, size).repeat(count, axis=1)
            boxes.append(drawn)
            first += count
        return boxes


class EvalLoader(_Loader):
    """Centre crops of every sample of this process's shard of a set, once, in its order.

    Args:
        data: the set; labels of damaged samples are those of what is shown.
        size: side of the result, pixels.
        resize: the crop shows the middle ``size`` pixels of an image whose shorter side is resized
            to this many; at least ``size``. None: size * 256 / 224. An image of ``size`` x ``size``
            pixels with ``resize == size`` is not resampled.
        config: how images are read.
        batch_size: samples of this process's batches; the last may be smaller.
        rank: of this process, which reads samples ``[rank * n // W, (rank + 1) * n // W)``.
        world_size: W, number of processes.

    Attributes:
        local_ids: ids of this process's shard.

    Raises:
        DataError: the backend is not there, or a size is impossible.
    """

    def __init__(
        self,
        data: OpenData,
        size: int,
        resize: int | None,
        config: LoaderConfig,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        resize = round(size * 256 / 224) if resize is None else resize
        if not 1 <= size <= resize:
            raise DataError(
                f"evaluation crops of {size} pixels need resize >= size >= 1, got {resize}"
            )
        if batch_size < 1:
            raise DataError(f"evaluation batches need at least one sample, got {batch_size}")
        super().__init__(data, config)
        count = data.info.num_samples
        self.local_ids = range(rank * count // world_size, (rank + 1) * count // world_size)
        self._size, self._resize, self._batch_size = size, resize, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.local_ids) / self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self._run(self._all())

    def _all(self) -> Iterator[_Pending]:
        for step in range(len(self)):
            ids = self.local_ids[step * self._batch_size : (step + 1) * self._batch_size]
            ids_of = functools.partial(self._ids, ids)
            groups = ((1, self._size),)
            yield _Pending(self, _Plan(Position(0, step), 0, len(ids), ids_of, self._boxes, groups))

    def _ids(self, ids: range) -> tuple[IdArray, IdArray]:
        ids_N = np.arange(ids.start, ids.stop)
        return ids_N, ids_N

    def _boxes(self, numbers_N: IdArray, shown_N: IdArray) -> list[BoxArray]:
        heights, widths = self.data.table.heights[shown_N], self.data.table.widths[shown_N]
        return [centre_crop_boxes(heights, widths, self._size, self._resize)]
