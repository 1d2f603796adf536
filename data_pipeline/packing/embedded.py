"""The data set that ships with the product: handwritten digits in random colours, sizes and places.

The digits are scikit-learn's (``load_digits``: 1,797 images of 8 x 8 pixels, test part of the UCI
Optical Recognition of Handwritten Digits data by E. Alpaydin and C. Kaynak, CC BY 4.0). Plain, they
cannot show that pretraining helps: nearest neighbours on their pixels are 96 % right. So each is
drawn on 32 x 32 pixels in a random ink on a random background, light on dark or dark on light, at a
random size, place, angle and aspect. To pixels the colours are most of an image; what is
left when views disagree about colour, size and place is the digit's shape.

``train`` holds the first 1,437 digits and ``test`` the last 360, the usual split of this set. The
source lists its writers one after another, so the split also (all but) separates writers, which is
why no shuffled split is taken. A digit is drawn :data:`RENDERINGS` times, each time afresh, always
within its own split.

A pure function of nothing: the numbers come from the counter generator, and the arithmetic is
element-wise in float64 (no matrix product, no sine), so that the bytes are the same everywhere. A
test holds their checksum.

Shape legend: N images, H = W = :data:`SIDE` pixels, C = 3 channels, S samples of a smoothed digit.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Literal

import numpy as np
import numpy.typing as npt

from common.errors import DataError
from common.randomness import absorb, run_key, uniforms

FloatArray = npt.NDArray[np.float64]
_Uniform = Callable[..., FloatArray]  # (which draw, low, high) -> one number per image
Split = Literal["train", "test"]

NAME = "digits"
"""What ``embedded:NAME`` is called on the command line."""
CLIPS_NAME = "moving-digits"
"""The same of the clips."""
FRAMES = 12
"""Of a clip."""
CLASS_NAMES = tuple("0123456789")
SIDE = 32
RENDERINGS = {"train": 4, "test": 2}
"""How often each handwritten digit is drawn."""

_TRAIN_DIGITS = 1437  # of 1797
_SEED = 20_201_002  # part of the data set, as the digits are
_CELLS = 8  # the source's pixels along a side
_FINE = 4  # samples per cell after smoothing
_BATCH = 512  # images drawn at once, for the memory's sake

_BOX = (20.0, 28.0)  # side of the digit's 8 x 8 cells, in pixels
_MOVING_BOX = (12.0, 16.0)
_TILT = 0.3  # largest angle, about radians
_ASPECT = (0.87, 1.15)  # width over height, before the tilt
_INK_EDGE = (0.25, 0.60)  # stroke strength where ink begins and where it covers
_LEAST_CONTRAST = 0.3  # luma between ink and background, of 1
_LUMA = (0.299, 0.587, 0.114)


class _Draw(IntEnum):
    """Which of an image's random numbers. Part of the data set: never renumber."""

    BOX = 0
    TILT = 1
    ASPECT = 2
    LEFT = 3
    TOP = 4
    INK_LUMA = 5
    INK = 6  # and the next two: red, green, blue
    BACKGROUND = 9  # and the next two
    PATH = 12  # and the next five, of clips


def embedded_images(
    split: Split,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], tuple[str, ...]]:
    """Draw one split; the same bytes on every call and every machine, in about two seconds.

    Args:
        split: ``train`` or ``test``; they share no handwritten digit.

    Returns:
        Images (N, 32, 32, 3) uint8 RGB, labels (N,) int64 in 0..9, names of the classes. Image
        ``n`` shows digit ``n % D`` of the split's D.

    Raises:
        DataError: there is no such split.
    """
    if split not in RENDERINGS:
        raise DataError(f"embedded:{NAME}:{split}: the splits are {' and '.join(RENDERINGS)}")
    digits, labels = _handwritten_digits()
    members = slice(0, _TRAIN_DIGITS) if split == "train" else slice(_TRAIN_DIGITS, None)
    digits, labels = digits[members], labels[members]
    strokes = _smooth(digits)
    total = RENDERINGS[split] * len(digits)
    # A number for every image of both splits, so that no two are drawn with the same colours.
    numbers = np.arange(total, dtype=np.uint64) * np.uint64(2) + np.uint64(split == "test")
    images = np.empty((total, SIDE, SIDE, 3), np.uint8)
    for start in range(0, total, _BATCH):
        n = np.arange(start, min(start + _BATCH, total))
        images[n] = _draw(strokes, n % len(digits), numbers[n])
    return images, np.tile(labels, RENDERINGS[split]), CLASS_NAMES


def _handwritten_digits() -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """All digits, (1797, 8, 8) with ink from 0 to 1, and their labels."""
    from sklearn.datasets import load_digits  # seconds

    source = load_digits()
    return source.images.astype(np.float64) / 16.0, source.target.astype(np.int64)


def _smooth(digits_NHW: FloatArray) -> FloatArray:
    """Resample cells to 4 x 4 samples each by Catmull-Rom splines: (N, 8, 8) -> (N, 36, 36).

    The result covers half a cell more on every side, so that strokes at the rim end softly.
    """
    fine = np.pad(digits_NHW, ((0, 0), (2, 2), (2, 2)))
    for axis in (1, 2):
        fine = np.moveaxis(fine, axis, -1)
        before, left, right, after = (fine[..., i : fine.shape[-1] - 3 + i] for i in range(4))
        phases = []
        for t in (np.arange(_FINE) + 0.5) / _FINE:
            phases.append(
                ((2.0 - t) * t - 1.0) * t / 2.0 * before
                + ((3.0 * t - 5.0) * t * t + 2.0) / 2.0 * left
                + ((4.0 - 3.0 * t) * t + 1.0) * t / 2.0 * right
                + (t - 1.0) * t * t / 2.0 * after
            )
        fine = np.stack(phases, -1).reshape(*fine.shape[:-1], -1)
        fine = np.moveaxis(fine, -1, axis)
    return fine


def embedded_clips(
    split: Split,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], tuple[str, ...]]:
    """Clips of digits that cross the image in a straight line, at a steady speed, one a digit.

    Smaller than in :func:`embedded_images`, and otherwise drawn as there. A frame alone does not
    tell where its digit came from: the order of frames is told by their places in the image.

    Returns:
        As :func:`embedded_images`; :data:`FRAMES` images after each other are a clip.
    """
    digits, labels = _handwritten_digits()
    members = slice(0, _TRAIN_DIGITS) if split == "train" else slice(_TRAIN_DIGITS, None)
    strokes, clips = _smooth(digits[members]), len(digits[members])
    images = np.empty((clips * FRAMES, SIDE, SIDE, 3), np.uint8)
    for start in range(0, len(images), _BATCH):
        n = np.arange(start, min(start + _BATCH, len(images)))
        clip_N = n // FRAMES
        numbers_N = clip_N.astype(np.uint64) * np.uint64(2) + np.uint64(split == "test")
        images[n] = _draw(strokes, clip_N, numbers_N, n % FRAMES / (FRAMES - 1))
    return images, np.repeat(labels[members], FRAMES), CLASS_NAMES


def _draw(
    strokes_DSS: FloatArray,
    digit_N: npt.NDArray[np.int64],
    number_N: npt.NDArray[np.uint64],
    time_N: FloatArray | None = None,
) -> npt.NDArray[np.uint8]:
    """Images of ``strokes[digit]``, each by the random numbers of its ``number``.

    ``time``, 0 to 1, is how far on its way across the image a moving digit is.
    """
    with np.errstate(over="ignore"):
        keys_N = absorb(run_key(_SEED, 0), number_N)

    def uniform(draw: int, low: float = 0.0, high: float = 1.0) -> FloatArray:
        return low + (high - low) * uniforms(keys_N, draw)

    ink_NHW = _ink(strokes_DSS, digit_N, uniform, time_N)
    background_NC = np.stack([uniform(_Draw.BACKGROUND + c) for c in range(3)], -1)
    ink_NC = _contrasting(
        np.stack([uniform(_Draw.INK + c) for c in range(3)], -1),
        _luma(background_NC),
        uniform(_Draw.INK_LUMA),
    )
    cover_NHW1 = ink_NHW[..., None]
    image_NHWC = (
        background_NC[:, None, None] * (1.0 - cover_NHW1) + ink_NC[:, None, None] * cover_NHW1
    )
    return np.floor(image_NHWC * 255.0 + 0.5).astype(np.uint8)


def _ink(
    strokes_DSS: FloatArray,
    digit_N: npt.NDArray[np.int64],
    uniform: _Uniform,
    time_N: FloatArray | None,
) -> FloatArray:
    """How much ink covers each pixel, 0 to 1: each image's digit at its own place and angle."""
    side_N = uniform(_Draw.BOX, *(_BOX if time_N is None else _MOVING_BOX))
    # With h = tan(angle / 2) the rotation is a ratio of polynomials: the same bits everywhere.
    h_N = uniform(_Draw.TILT, -_TILT / 2.0, _TILT / 2.0)
    cos_N, sin_N = (1.0 - h_N * h_N) / (1.0 + h_N * h_N), 2.0 * h_N / (1.0 + h_N * h_N)
    aspect_N = uniform(_Draw.ASPECT, *_ASPECT)
    room_N = SIDE - side_N
    left_N, top_N = uniform(_Draw.LEFT), uniform(_Draw.TOP)
    if time_N is not None:
        left_N, top_N = _on_its_way(uniform, time_N)
    centre_x_N = side_N / 2.0 + room_N * left_N
    centre_y_N = side_N / 2.0 + room_N * top_N

    # From a pixel's centre back to the smoothed digit: turn about the digit's centre, then scale.
    pixels = np.arange(SIDE) + 0.5
    dx_NHW = pixels[None, None, :] - centre_x_N[:, None, None]
    dy_NHW = pixels[None, :, None] - centre_y_N[:, None, None]
    scale_N = _CELLS * _FINE / side_N
    cos, sin, scale, aspect = (v[:, None, None] for v in (cos_N, sin_N, scale_N, aspect_N))
    middle = (strokes_DSS.shape[-1] - 1) / 2.0
    x_NHW = (cos * dx_NHW + sin * dy_NHW) * scale / aspect + middle
    y_NHW = (cos * dy_NHW - sin * dx_NHW) * scale * aspect + middle
    strength_NHW = _bilinear(strokes_DSS, digit_N, y_NHW, x_NHW)
    low, high = _INK_EDGE
    return np.clip((strength_NHW - low) / (high - low), 0.0, 1.0)


def _on_its_way(uniform: _Uniform, time_N: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Where in its room a moving digit is, 0 to 1: it crosses it one way, and drifts the other."""
    begin_N = uniform(_Draw.PATH, 0.0, 0.2)
    across_N = begin_N + time_N * (uniform(_Draw.PATH + 1, 0.8, 1.0) - begin_N)
    across_N = np.where(uniform(_Draw.PATH + 2) < 0.5, across_N, 1.0 - across_N)
    drift_N = uniform(_Draw.PATH + 3)
    drift_N = drift_N + time_N * (uniform(_Draw.PATH + 4) - drift_N)
    is_level_N = uniform(_Draw.PATH + 5) < 0.5
    return np.where(is_level_N, across_N, drift_N), np.where(is_level_N, drift_N, across_N)


def _bilinear(
    strokes_DSS: FloatArray, digit_N: npt.NDArray[np.int64], y_NHW: FloatArray, x_NHW: FloatArray
) -> FloatArray:
    """Strokes at fractional samples, 0 outside."""
    last = strokes_DSS.shape[-1] - 1
    inside_NHW = (x_NHW >= 0) & (x_NHW < last) & (y_NHW >= 0) & (y_NHW < last)
    x_NHW, y_NHW = np.where(inside_NHW, x_NHW, 0.0), np.where(inside_NHW, y_NHW, 0.0)
    x0_NHW, y0_NHW = x_NHW.astype(np.int64), y_NHW.astype(np.int64)
    right_NHW, down_NHW = x_NHW - x0_NHW, y_NHW - y0_NHW
    d = digit_N[:, None, None]
    upper = strokes_DSS[d, y0_NHW, x0_NHW] * (1.0 - right_NHW)
    upper += strokes_DSS[d, y0_NHW, x0_NHW + 1] * right_NHW
    lower = strokes_DSS[d, y0_NHW + 1, x0_NHW] * (1.0 - right_NHW)
    lower += strokes_DSS[d, y0_NHW + 1, x0_NHW + 1] * right_NHW
    return (upper * (1.0 - down_NHW) + lower * down_NHW) * inside_NHW


def _contrasting(colour_NC: FloatArray, luma_N: FloatArray, where_N: FloatArray) -> FloatArray:
    """Colours lightened or darkened until they stand out from ``luma``, on either side of it.

    The new luma is uniform over what lies at least ``_LEAST_CONTRAST`` away; ``where`` in [0, 1)
    says where in it.
    """
    darker_N = np.maximum(luma_N - _LEAST_CONTRAST, 0.0)
    lighter_N = np.maximum(1.0 - _LEAST_CONTRAST - luma_N, 0.0)
    place_N = where_N * (darker_N + lighter_N)
    target_N = np.where(
        place_N < darker_N, place_N, luma_N + _LEAST_CONTRAST + (place_N - darker_N)
    )[:, None]
    own_N = np.maximum(_luma(colour_NC), 1e-6)[:, None]
    whiter_NC = colour_NC + (1.0 - colour_NC) * (target_N - own_N) / (1.0 - own_N)
    return np.clip(np.where(target_N > own_N, whiter_NC, colour_NC * target_N / own_N), 0.0, 1.0)


def _luma(colour_NC: FloatArray) -> FloatArray:
    red, green, blue = _LUMA
    return red * colour_NC[..., 0] + green * colour_NC[..., 1] + blue * colour_NC[..., 2]
