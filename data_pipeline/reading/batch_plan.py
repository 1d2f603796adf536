"""What a batch shows: which samples, and which boxes of them. Pure functions of its position.

Shape suffixes: N samples, V views, 4 = (top, left, height, width).
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from data_pipeline.crops import CropConfig, centre_crop_boxes, random_resized_crop_boxes
from data_pipeline.reading.beton import SampleTable
from data_pipeline.reading.order import IdArray, permute


class Plan(Protocol):
    """One process's part of one batch."""

    @property
    def seed(self) -> int:
        """Of the run."""

    @property
    def epoch(self) -> int:
        """From 0."""

    @property
    def count(self) -> int:
        """Samples of this process's part."""

    def ids(self) -> IdArray:
        """Their ids."""

    def boxes(self, ids_N: IdArray, shown_N: IdArray) -> npt.NDArray[np.int64]:
        """Boxes (N, V, 4), drawn for samples ``ids_N``, in the images of samples ``shown_N``."""


@dataclass(frozen=True)
class RandomCrops:
    """A training batch: ``count`` samples from place ``first`` of the epoch's order on."""

    seed: int
    epoch: int
    first: int
    count: int
    table: SampleTable
    crop: CropConfig
    views: int
    only: IdArray | None = None  # the samples that there are; None: all of the table

    def ids(self) -> IdArray:
        """See :class:`Plan`."""
        places = np.arange(self.first, self.first + self.count)
        if self.only is not None:
            return self.only[permute(self.seed, self.epoch, places, len(self.only))]
        return permute(self.seed, self.epoch, places, len(self.table.sizes))

    def boxes(self, ids_N: IdArray, shown_N: IdArray) -> npt.NDArray[np.int64]:
        """See :class:`Plan`."""
        heights, widths = self.table.heights[shown_N], self.table.widths[shown_N]
        return random_resized_crop_boxes(
            self.seed, self.epoch, ids_N, self.views, heights, widths, self.crop
        )


@dataclass(frozen=True)
class CentreCrops:
    """An evaluation batch: ``count`` samples from ``first`` on, in the file's order."""

    first: int
    count: int
    table: SampleTable
    size: int
    resize: int
    seed: int = 0
    epoch: int = 0

    def ids(self) -> IdArray:
        """See :class:`Plan`."""
        return np.arange(self.first, self.first + self.count)

    def boxes(self, ids_N: IdArray, shown_N: IdArray) -> npt.NDArray[np.int64]:
        """See :class:`Plan`."""
        heights, widths = self.table.heights[shown_N], self.table.widths[shown_N]
        return centre_crop_boxes(heights, widths, self.size, self.resize)
