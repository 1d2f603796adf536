"""Augmentation by torchvision, one image after the other: the oracle, and where no kernel runs.

Legend: R rows (views times samples, view-major), 3 channels, H height, W width, P parameters, K
weights of half a blur's kernel.

Which rows an operation takes is known on the host, from the table, so a GPU is never waited for. An
image's result does not depend, in one bit, on the images beside it: no operation sees two.
"""

import numpy as np
import torch
from torchvision.transforms.v2 import functional as tv

from kernels.augment.table import JITTER_STEPS, Column, FloatArray, Jitter
from kernels.dispatch import to_device

Triple = tuple[float, float, float]


def augment_reference(
    crops_BVHWC: torch.Tensor,
    table_RP: FloatArray,
    mean: Triple,
    std: Triple,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As :func:`kernels.augment.augment`, on any device."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    images_R3HW = crops_BVHWC.permute(1, 0, 4, 2, 3).flatten(0, 1).contiguous().to(real)
    images_R3HW *= 1.0 / 255.0
    for image_3HW, row_P in zip(images_R3HW, table_RP):
        image_3HW.copy_(_augmented(image_3HW, row_P))
    for values, by in ((mean, images_R3HW.sub_), (std, images_R3HW.div_)):
        by(to_device(np.array(values), images_R3HW.device).to(real)[:, None, None])
    return images_R3HW.to(dtype).contiguous(memory_format=torch.channels_last)


def _augmented(image_3HW: torch.Tensor, row_P: FloatArray) -> torch.Tensor:
    for code in row_P[Column.JITTER : Column.JITTER + JITTER_STEPS]:
        if code != Jitter.NONE:
            adjust, column = _JITTERS[Jitter(int(code))]
            image_3HW = adjust(image_3HW, row_P[column])
    if row_P[Column.GRAYSCALE] != 0:
        image_3HW = tv.rgb_to_grayscale(image_3HW, num_output_channels=3)
    if row_P[Column.BLUR] != 1:
        for axis in (1, 2):
            image_3HW = _blurred(image_3HW, row_P[Column.BLUR :], axis)
    if row_P[Column.SOLARIZE] <= 1:
        image_3HW = tv.solarize(image_3HW, row_P[Column.SOLARIZE])
    return tv.horizontal_flip(image_3HW) if row_P[Column.FLIP] != 0 else image_3HW


def _turn_hue(image_3HW: torch.Tensor, turns: float) -> torch.Tensor:
    """Through HSV (Smith, SIGGRAPH 1978), in the image's own precision, unlike torchvision's."""
    red, green, blue = image_3HW
    value, chroma = image_3HW.amax(0), image_3HW.amax(0) - image_3HW.amin(0)
    divisor = torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4)
    hue = torch.where(value == red, (green - blue) / divisor, hue) + 6 * turns
    k_3HW = torch.stack([hue + 5, hue + 3, hue + 1]).remainder(6)
    return value - chroma * torch.minimum(k_3HW, 4 - k_3HW).clamp(0, 1)


_JITTERS = {
    Jitter.BRIGHTNESS: (tv.adjust_brightness, Column.BRIGHTNESS),
    Jitter.CONTRAST: (tv.adjust_contrast, Column.CONTRAST),
    Jitter.SATURATION: (tv.adjust_saturation, Column.SATURATION),
    Jitter.HUE: (_turn_hue, Column.HUE),
}


def _blurred(image_3HW: torch.Tensor, half_kernel_K: FloatArray, axis: int) -> torch.Tensor:
    """By the table's own weights; reflected at the border without the edge."""
    radius, length = len(half_kernel_K) - 1, image_3HW.shape[axis]
    index = torch.arange(-radius, length + radius, device=image_3HW.device).abs()
    padded = image_3HW.index_select(axis, length - 1 - (length - 1 - index).abs())
    total = image_3HW * half_kernel_K[0]
    for k in range(1, radius + 1):
        before = padded.narrow(axis, radius - k, length)
        total += (before + padded.narrow(axis, radius + k, length)) * half_kernel_K[k]
    return total
