"""Batches of views in an order that any number of processes shares, from any position on.

Shape suffixes: B samples of this process, N of a part of them, V views of a group, S their side,
4 = (top, left, height, width).
"""

import functools
import math
from collections.abc import Iterator

import numpy as np
import torch

from common.errors import DataError
from data_pipeline.crops import centre_crop_boxes, frame_boxes, random_resized_crop_boxes
from data_pipeline.reading.batch import Batch
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.order import EpochOrder, IdArray, Position, Weights, rank_slice
from data_pipeline.reading.pool import BatchPlan, LoaderConfig, PendingBatch, PoolLoader
from data_pipeline.reading.substitutes import (
    BoxArray,
)
from data_pipeline.views import ViewPlan


class TrainLoader(PoolLoader):
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
        frames = [group.frames for group in views if group.frames is not None]
        together = len(views) - len(frames)
        # An image is cut for all groups at once, a frame for one view.
        groups = {together, 1} if frames else {together}
        super().__init__(data, config, device, sorted(groups - {0}))
        if order is None:
            order = EpochOrder(data.info.num_samples)
            if frames:
                weights_N = np.minimum.reduce([data.clips.weights(draw) for draw in frames])
                order = _moving(data, weights_N, max(draw.length for draw in frames))
        self.order = order
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

    def _pending(
        self, position: Position, order: EpochOrder, endless: bool
    ) -> Iterator[PendingBatch]:
        count = self._share.stop - self._share.start
        while True:
            first = position.step * self._batch_size
            places = np.arange(first + self._share.start, first + self._share.stop)
            ids = functools.partial(order.at, self._seed, position.epoch, places)
            boxes = functools.partial(self._boxes, position.epoch)
            frames = functools.partial(self._frames, position.epoch)
            plan = BatchPlan(position, self._seed, count, ids, boxes, self._groups, frames)
            yield PendingBatch(self, plan)
            step = position.step + 1
            last = step == self.steps_per_epoch
            if last and not endless:
                return
            position = Position(position.epoch + last, 0 if last else step)

    def _frames(self, epoch: int, group: int, numbers_N: IdArray, ids_N: IdArray) -> IdArray | None:
        draw = self._views[group].frames
        if draw is None:
            return None
        return self.data.clips.draw(draw, self._seed, epoch, numbers_N, ids_N)

    def _boxes(self, epoch: int, group: int, numbers_N: IdArray, shown: IdArray) -> BoxArray:
        heights, widths = self.data.table.heights[shown], self.data.table.widths[shown]
        of_group = self._views[group]
        count, crop = len(of_group.looks), of_group.crop
        if not of_group.random:
            boxes = centre_crop_boxes(heights.ravel(), widths.ravel(), crop.size, crop.size)
            return boxes.repeat(count, axis=1) if shown.ndim == 1 else boxes.reshape(-1, count, 4)
        first = sum(views for views, _ in self._groups[:group])
        if of_group.frames is not None:
            shift = of_group.frames.shift
            return frame_boxes(
                self._seed, epoch, numbers_N, heights, widths, crop, shift, first=first
            )
        return random_resized_crop_boxes(
            self._seed, epoch, numbers_N, count, heights, widths, crop, first=first
        )


def _moving(data: OpenData, weights_N: Weights, length: int) -> EpochOrder:
    """As many samples as there are, by their weights."""
    if not weights_N.any():
        raise DataError(
            f"{data.info.name}: no clip has {length} frames that move, without a cut; pack"
            " longer clips, or lower --objective.gap and --objective.apart"
        )
    return EpochOrder.weighted(weights_N, data.info.num_samples)


class EvalLoader(PoolLoader):
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

    def _all(self) -> Iterator[PendingBatch]:
        for step in range(len(self)):
            ids = self.local_ids[step * self._batch_size : (step + 1) * self._batch_size]
            ids_of = functools.partial(self._ids, ids)
            groups = ((1, self._size),)
            yield PendingBatch(
                self, BatchPlan(Position(0, step), 0, len(ids), ids_of, self._boxes, groups)
            )

    def _ids(self, ids: range) -> tuple[IdArray, IdArray]:
        ids_N = np.arange(ids.start, ids.stop)
        return ids_N, ids_N

    def _boxes(self, group: int, numbers_N: IdArray, shown_N: IdArray) -> BoxArray:
        heights, widths = self.data.table.heights[shown_N], self.data.table.widths[shown_N]
        return centre_crop_boxes(heights, widths, self._size, self._resize)
