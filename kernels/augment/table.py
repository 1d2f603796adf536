"""What one augmented image is: a row of numbers, the one input all implementations share.

A table is a float64 array ``(R, P)`` on the host, one row per output image. Its columns are
:class:`Column`; from ``Column.BLUR`` on, to the right end, stands half of the blur's kernel (centre
first), so that all implementations weigh with the same bits. Everything random has been drawn
before: an implementation is a pure function of pixels and table.
"""

from enum import IntEnum
from functools import reduce

import numpy as np
import numpy.typing as npt
import torch

FloatArray = npt.NDArray[np.float64]


class Column(IntEnum):
    """Columns of a parameter table."""

    FLIP = 0  # 1: mirror left and right
    JITTER = 1  # this column and the next three: codes of `Jitter` in the order they apply
    BRIGHTNESS = 5  # factor, 1 keeps
    CONTRAST = 6  # factor, 1 keeps
    SATURATION = 7  # factor, 1 keeps
    HUE = 8  # shift in turns of the colour wheel, -0.5 to 0.5
    GRAYSCALE = 9  # 1: replace by luma
    SOLARIZE = 10  # invert values from this threshold on; infinity keeps
    BLUR = 11  # first of the weights at distance 0, 1, 2 ... pixels; (1, 0, 0 ...) keeps


class Jitter(IntEnum):
    """The operations of colour jitter; ``NONE`` fills the places of those that do nothing."""

    NONE = 0
    BRIGHTNESS = 1
    CONTRAST = 2
    SATURATION = 3
    HUE = 4


JITTER_STEPS = 4

# torchvision's (and PIL's) luma, ITU-R 601-2 to four digits.
LUMA = (0.2989, 0.587, 0.114)


def identity_table(rows: int, blur_radius: int = 0) -> FloatArray:
    """A table whose every row keeps its image as it is; ``blur_radius`` in pixels makes room."""
    table_RP = np.zeros((rows, Column.BLUR + blur_radius + 1))
    table_RP[:, Column.BRIGHTNESS : Column.SATURATION + 1] = 1.0
    table_RP[:, Column.SOLARIZE] = np.inf
    table_RP[:, Column.BLUR] = 1.0
    return table_RP


def gaussian_half_kernels(sigma_R: torch.Tensor, radius: int) -> torch.Tensor:
    """Weights at distance 0..radius of normalised Gaussian kernels ``2 * radius + 1`` pixels wide.

    Args:
        sigma_R: standard deviations in pixels, above 0; float64.
        radius: pixels.

    Returns:
        float64 ``(R, radius + 1)``; ``w[0] + 2 * sum(w[1:]) == 1``.
    """
    distance = torch.arange(radius + 1, device=sigma_R.device)
    exponents = -0.5 * (distance / sigma_R[:, None]).square()
    # On a CPU by NumPy, whose last digits are those that earlier runs have drawn.
    if exponents.is_cuda:
        weights = exponents.exp()
    else:
        weights = torch.from_numpy(np.exp(np.asarray(exponents)))
    # One after the other: a sum would choose its order by the number of rows beside this one.
    half = reduce(torch.add, weights.unbind(1))[:, None]
    return weights / (2.0 * half - weights[:, :1])
