"""Which part of an image each view shows: crop boxes from the counter generator.

A box is ``(top, left, height, width)`` in pixels of the stored image. Boxes are computed here once,
by NumPy, and handed to whichever backend cuts them out, so that every backend, process and worker
cuts the same ones.

Shape suffixes: N samples, V views, 4 = (top, left, height, width).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.bounds import check_bounds
from common.errors import ConfigError
from common.randomness import Stream, sample_keys, uniforms

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

_ATTEMPTS = 10  # torchvision's RandomResizedCrop gives up after as many
_DRAWS = 4  # uniforms per attempt: area, aspect ratio, top, left
_DRAW_41 = np.arange(_DRAWS)[:, None]


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """Random resized crops (Szegedy et al., CVPR 2015), with torchvision's semantics."""

    size: int = 224
    """Side of the square views, pixels."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Least and greatest area of a crop, as a fraction of the image's."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and greatest aspect ratio of a crop before resizing, width / height."""

    def __post_init__(self) -> None:
        check_bounds(self, "--crop.", size="[2, 65535]", scale="(0, 1]", ratio="(0, inf)")
        for name, (least, greatest) in (("scale", self.scale), ("ratio", self.ratio)):
            if least > greatest:
                raise ConfigError(f"--crop.{name} {least} {greatest}: the least comes first")


def random_resized_crop_boxes(
    seed: int,
    epoch: int,
    ids_N: npt.ArrayLike,
    views: int,
    heights_N: npt.ArrayLike,
    widths_N: npt.ArrayLike,
    crop: CropConfig,
    *,
    first: int = 0,
) -> IntArray:
    """Boxes of ``views`` random resized crops of each sample, a pure function of its arguments.

    As torchvision's ``RandomResizedCrop.get_params``: up to ten attempts at an area uniform in
    ``crop.scale`` and an aspect ratio log-uniform in ``crop.ratio``, each placed uniformly; then
    the largest centred crop whose ratio is allowed.

    Args:
        seed: the run's seed.
        epoch: from 0.
        ids_N: sample ids.
        views: number of boxes per sample.
        heights_N: heights of the stored images, pixels.
        widths_N: widths of the stored images, pixels.
        crop: the settings.
        first: number of the first view.

    Returns:
        int64 (N, V, 4): top, left, height, width; every box lies inside its image.
    """
    ids_N1 = np.asarray(ids_N, dtype=np.int64)[:, None]
    shape = (len(ids_N1), views)
    view_1V = np.arange(first, first + views)[None, :]
    keys = sample_keys(seed, epoch, ids_N1, view_1V, Stream.CROP).reshape(-1)
    heights = np.broadcast_to(np.asarray(heights_N, np.int64)[:, None], shape).reshape(-1)
    widths = np.broadcast_to(np.asarray(widths_N, np.int64)[:, None], shape).reshape(-1)

    boxes = _largest_centred_boxes(heights, widths, crop.ratio)
    pending = np.arange(boxes.shape[0])
    for attempt in range(_ATTEMPTS):
        if not pending.size:
            break
        drawn, fits = _attempt(keys[pending], attempt, heights[pending], widths[pending], crop)
        boxes[pending[fits]] = drawn[fits]
        pending = pending[~fits]
    return boxes.reshape(*shape, 4)


def frame_boxes(
    seed: int,
    epoch: int,
    numbers_N: npt.ArrayLike,
    heights_NF: IntArray,
    widths_NF: IntArray,
    crop: CropConfig,
    shift: float,
    *,
    first: int = 0,
) -> IntArray:
    """One random resized crop for all frames of a tuple, shifted a little in each.

    Args:
        seed: the run's seed.
        epoch: from 0.
        numbers_N: what tuples are drawn by.
        heights_NF: heights of the stored frames, pixels.
        widths_NF: widths of the stored frames, pixels.
        crop: the settings.
        shift: at most so much of the box's own side, either way.
        first: number of the first view.

    Returns:
        int64 (N, F, 4): top, left, height, width; every box lies inside its frame.
    """
    boxes_N14 = random_resized_crop_boxes(
        seed, epoch, numbers_N, 1, heights_NF[:, 0], widths_NF[:, 0], crop, first=first
    )
    sides_NF2 = np.stack([heights_NF, widths_NF], -1)
    boxes_NF2 = np.minimum(boxes_N14[..., 2:], sides_NF2)
    frames_1F = np.arange(heights_NF.shape[1])[None]
    keys_NF = sample_keys(seed, epoch, np.asarray(numbers_N)[:, None], frames_1F, Stream.FRAME)
    drawn_NF2 = np.stack([uniforms(keys_NF, draw) for draw in (1, 2)], -1)
    shifts_NF2 = np.rint((2 * drawn_NF2 - 1) * shift * boxes_NF2).astype(np.int64)
    corners_NF2 = np.clip(boxes_N14[..., :2] + shifts_NF2, 0, sides_NF2 - boxes_NF2)
    return np.concatenate([corners_NF2, boxes_NF2], -1)


def _attempt(
    keys: npt.NDArray[np.uint64],
    attempt: int,
    heights: IntArray,
    widths: IntArray,
    crop: CropConfig,
) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """One draw for each key: boxes, and which of them fit into their images."""
    of_area, of_ratio, of_top, of_left = uniforms(keys, attempt * _DRAWS + _DRAW_41)
    low, high = crop.scale
    area = heights * widths * (low + (high - low) * of_area)
    log_low, log_high = np.log(crop.ratio)
    ratio = np.exp(log_low + (log_high - log_low) * of_ratio)
    w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (w > 0) & (w <= widths) & (h > 0) & (h <= heights)
    top = (of_top * (heights - h + 1)).astype(np.int64)
    left = (of_left * (widths - w + 1)).astype(np.int64)
    return np.stack([top, left, h, w], axis=-1), fits


def _largest_centred_boxes(
    heights: IntArray, widths: IntArray, ratio: tuple[float, float]
) -> IntArray:
    """The whole image, cut to the nearest allowed aspect ratio."""
    aspect = widths / heights
    h = np.where(aspect < ratio[0], np.rint(widths / ratio[0]), heights).astype(np.int64)
    w = np.where(aspect > ratio[1], np.rint(heights * ratio[1]), widths).astype(np.int64)
    # An image one pixel wide or high can round to nothing.
    h, w = np.clip(h, 1, heights), np.clip(w, 1, widths)
    return np.stack([(heights - h) // 2, (widths - w) // 2, h, w], axis=-1)


def centre_crop_boxes(
    heights_N: npt.ArrayLike, widths_N: npt.ArrayLike, size: int, resize: int
) -> IntArray:
    """Boxes that show what 'resize the shorter side to ``resize``, crop ``size``' shows.

    The crop is taken before resizing, at whole pixels: a centred square of
    ``shorter side * size / resize`` pixels, within half a pixel of torchvision's two steps.

    Returns:
        int64 (N, 1, 4): top, left, height, width.
    """
    heights, widths = np.asarray(heights_N, np.int64), np.asarray(widths_N, np.int64)
    shorter = np.minimum(heights, widths)
    side = np.clip(np.rint(shorter * (size / resize)).astype(np.int64), 1, shorter)
    boxes_N4 = np.stack([(heights - side) // 2, (widths - side) // 2, side, side], axis=-1)
    return boxes_N4[:, None, :]
