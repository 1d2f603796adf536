"""What one augmented image is: a row of numbers, the one input all implementations share.

A table is a float64 array ``(R, P)`` on the host, one row per output image. Its columns are
:class:`Column`; from ``Column.BLUR`` on, to the right end, stands half of the blur's kernel (centre
first), so that all implementations weigh with the same bits. Everything random has been drawn
before: an implementation is a pure function of pixels and table.
"""

from enum import IntEnum

import numpy as np
import numpy.typing as npt

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


def gaussian_half_kernels(sigma_R: FloatArray, radius: int) -> FloatArray:
    """Weights at distance 0..radius of normalised Gaussian kernels ``2 * radius + 1`` pixels wide.

    Args:
        sigma_R: standard deviations in pixels, above 0.
        radius: pixels.

    Returns:
        float64 ``(R, radius + 1)``; ``w[0] + 2 * sum(w[1:]) == 1``.
    """
    distance = np.arange(radius + 1)
    weights = np.exp(-0.5 * (distance / sigma_R[:, None]) ** 2)
    # cumsum adds in order; sum would choose an order by the number of rows beside this one.
    half = weights.cumsum(axis=1)[:, -1:]
    return weights / (2.0 * half - weights[:, :1])
