"""Augmentation in plain torch: the oracle, and what runs where no kernel does.

Legend: R rows (views times samples, view-major), S rows selected for one operation, 3 channels,
H height, W width, P parameters.

Two rules shape the code. Which rows an operation takes is known on the host, from the table, so a
GPU is never waited for; selecting by a mask on the device would wait. And an image's result must
not depend, in one bit, on the images beside it: only element-wise operations whose vector and
scalar forms round alike (no fused ``add(alpha=)``, no ``exp``, no convolution, whose algorithms
change with the batch), and means by a fixed tree (a library's reduction order depends on shape).
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from kernels.augment.table import JITTER_STEPS, LUMA, Column, FloatArray, Jitter
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
    rows = _Rows(table_RP, images_R3HW)

    for step in range(JITTER_STEPS):  # each image has its own order
        code_R = table_RP[:, Column.JITTER + step]
        rows.apply(code_R == Jitter.BRIGHTNESS, brightness, Column.BRIGHTNESS)
        rows.apply(code_R == Jitter.CONTRAST, contrast, Column.CONTRAST)
        rows.apply(code_R == Jitter.SATURATION, saturation, Column.SATURATION)
        rows.apply(code_R == Jitter.HUE, hue, Column.HUE)
    rows.apply(table_RP[:, Column.GRAYSCALE] != 0, grayscale, Column.GRAYSCALE)
    rows.apply(table_RP[:, Column.BLUR] != 1, blur, slice(Column.BLUR, None))
    rows.apply(table_RP[:, Column.SOLARIZE] <= 1, solarize, Column.SOLARIZE)
    rows.apply(table_RP[:, Column.FLIP] != 0, flip, Column.FLIP)

    if mean != (0.0, 0.0, 0.0):
        images_R3HW -= _channels(mean, images_R3HW)
    if std != (1.0, 1.0, 1.0):
        images_R3HW /= _channels(std, images_R3HW)
    return images_R3HW.to(dtype).contiguous(memory_format=torch.channels_last)


Operation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class _Rows:
    """Applies operations to selected rows of ``images_R3HW``, in place."""

    def __init__(self, table_RP: FloatArray, images_R3HW: torch.Tensor) -> None:
        self.images_R3HW = images_R3HW
        self.table_RP = to_device(table_RP, images_R3HW.device).to(images_R3HW.dtype)

    def apply(
        self, chosen_R: npt.NDArray[np.bool_], operation: Operation, column: slice | int
    ) -> None:
        """``operation(images, parameters)`` on the rows chosen on the host."""
        if not chosen_R.any():
            return
        rows_S = to_device(np.flatnonzero(chosen_R), self.images_R3HW.device)
        parameters_S = self.table_RP[:, column].index_select(0, rows_S)
        images_S3HW = operation(self.images_R3HW.index_select(0, rows_S), parameters_S)
        self.images_R3HW.index_copy_(0, rows_S, images_S3HW)


def brightness(images_S3HW: torch.Tensor, factor_S: torch.Tensor) -> torch.Tensor:
    """Blend with black; the factor weighs the image."""
    return (images_S3HW * _per_image(factor_S)).clamp_(0, 1)


def contrast(images_S3HW: torch.Tensor, factor_S: torch.Tensor) -> torch.Tensor:
    """Blend with the mean of the luma."""
    return _blend(images_S3HW, _mean(_luma(images_S3HW)), factor_S)


def saturation(images_S3HW: torch.Tensor, factor_S: torch.Tensor) -> torch.Tensor:
    """Blend with the luma."""
    return _blend(images_S3HW, _luma(images_S3HW), factor_S)


def hue(images_S3HW: torch.Tensor, turns_S: torch.Tensor) -> torch.Tensor:
    """Turn the colour wheel, through HSV (Smith, SIGGRAPH 1978)."""
    red, green, blue = images_S3HW.unbind(1)
    value, low = images_S3HW.amax(1), images_S3HW.amin(1)
    chroma = value - low
    divisor = torch.where(chroma > 0, chroma, 1.0)
    sixths = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2.0, (red - green) / divisor + 4.0),
    )
    angle = sixths / 6.0 + turns_S[:, None, None]
    sixths = (angle - angle.floor()) * 6.0
    sector = sixths.floor()
    rising = chroma * (sixths - sector)
    high, up, down = value, low + rising, value - rising
    return torch.stack(
        [
            _by_sector(sector, (high, down, low, low, up, high)),
            _by_sector(sector, (up, high, high, down, low, low)),
            _by_sector(sector, (low, low, up, high, high, down)),
        ],
        dim=1,
    )


def grayscale(images_S3HW: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """The luma in all three channels."""
    return _luma(images_S3HW).expand_as(images_S3HW)


def blur(images_S3HW: torch.Tensor, half_kernel_SK: torch.Tensor) -> torch.Tensor:
    """Gaussian blur, vertically then horizontally, reflected at the border without the edge."""
    for axis in (2, 3):
        images_S3HW = _blur_axis(images_S3HW, half_kernel_SK, axis)
    return images_S3HW


def solarize(images_S3HW: torch.Tensor, threshold_S: torch.Tensor) -> torch.Tensor:
    """Invert the values at or above the threshold."""
    return torch.where(images_S3HW >= _per_image(threshold_S), 1.0 - images_S3HW, images_S3HW)


def flip(images_S3HW: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Mirror left and right."""
    return images_S3HW.flip(3)


def _blend(images_S3HW: torch.Tensor, other: torch.Tensor, factor_S: torch.Tensor) -> torch.Tensor:
    factor = _per_image(factor_S)
    return (images_S3HW * factor).add_(other * (1.0 - factor)).clamp_(0, 1)


def _luma(images_S3HW: torch.Tensor) -> torch.Tensor:
    red, green, blue = images_S3HW.split(1, dim=1)
    return (red * LUMA[0]).add_(green * LUMA[1]).add_(blue * LUMA[2])


def _mean(images_S1HW: torch.Tensor) -> torch.Tensor:
    """Mean over pixels as ``(S, 1, 1, 1)``, summed pairwise in an order that only H * W fixes."""
    sums = images_S1HW.flatten(1)
    pixels = sums.shape[1]
    while (width := sums.shape[1]) > 1:
        half = width // 2
        folded = sums[:, :half] + sums[:, half : 2 * half]
        sums = torch.cat([folded, sums[:, 2 * half :]], dim=1) if width % 2 else folded
    return _per_image(sums[:, 0] / pixels)


def _by_sector(sector: torch.Tensor, choices: tuple[torch.Tensor, ...]) -> torch.Tensor:
    chosen = choices[0]  # also of sector 6: an angle just below a turn may round up to one
    for number, choice in enumerate(choices[1:], start=1):
        chosen = torch.where(sector == number, choice, chosen)
    return chosen


def _blur_axis(images_S3HW: torch.Tensor, half_kernel_SK: torch.Tensor, axis: int) -> torch.Tensor:
    radius, length = half_kernel_SK.shape[1] - 1, images_S3HW.shape[axis]
    index = torch.arange(-radius, length + radius, device=images_S3HW.device).abs()
    padded = images_S3HW.index_select(axis, length - 1 - (length - 1 - index).abs())
    total = images_S3HW * _per_image(half_kernel_SK[:, 0])
    for k in range(1, radius + 1):
        before = padded.narrow(axis, radius - k, length)
        after = padded.narrow(axis, radius + k, length)
        total += (before + after).mul_(_per_image(half_kernel_SK[:, k]))
    return total


def _per_image(values_S: torch.Tensor) -> torch.Tensor:
    return values_S[:, None, None, None]


def _channels(values: Triple, like: torch.Tensor) -> torch.Tensor:
    return to_device(np.array(values), like.device).to(like.dtype)[:, None, None]
