"""Crop and resize decoded planes: integer arithmetic, compiled by Numba, cached on disk.

Antialiased bilinear resampling, as torchvision's and Pillow's: a triangle filter, as wide as the
scale where it shrinks. It works on the planes that a JPEG stores, brightness and two half-sized
colour planes, and turns only the pixels of the result into RGB; upsampling the colour planes and
converting the whole image, as decoders do, is half of the work on a photograph.

The result does not depend on the processor: all arithmetic on pixels is in integers, so vector
width and order of summation do not matter. Values carry fractional bits until the last rounding:

* weights sum to 2**14;
* after the vertical pass a pixel is in 16ths (12 bits), after the horizontal one in 32nds.

Both passes run along rows, where compilers vectorise: the picture is transposed between them, four
rows at a time packed into one 64-bit store, and again when it is written (little-endian only).

Shape suffixes: S side of the result, P = S rounded up to a multiple of 4, C columns of a plane.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

# Symbols of the numbers above; the shifts below follow from them.
_ONE = 1 << 14
_GREY = 128 * 32  # colourless, after both passes
_I16, _I32, _I64, _U32 = np.int16, np.int32, np.int64, np.uint32

# JFIF's conversion (ITU-R BT.601, full range), in 2**-14.
_CR_TO_R, _CB_TO_G, _CR_TO_G, _CB_TO_B = 22970, 5638, 11700, 29032

_compiled = njit(nogil=True, error_model="numpy", cache=True)


class Axis(NamedTuple):
    """Filter of one axis: ``taps[0]`` weights from input ``first[i]`` on make output ``i``."""

    first: npt.NDArray[np.int64]  # (S,)
    weights: npt.NDArray[np.int16]  # (S, most taps)
    taps: npt.NDArray[np.int64]  # (1,)


class Scratch(NamedTuple):
    """Working memory of one thread, for images up to a size."""

    decoded: npt.NDArray[np.uint8]  # three planes of the largest image
    vertical: Axis
    horizontal: Axis
    rows: npt.NDArray[np.int16]  # (P, C): after the vertical pass
    line: npt.NDArray[np.int64]  # (C,)
    columns: npt.NDArray[np.int64]  # (C, P / 4): the same transposed, four int16 in one
    planes: npt.NDArray[np.int16]  # (3, S, P): after the horizontal pass, x-major
    pixels: npt.NDArray[np.uint32]  # (P, P), x-major: 0x00BBGGRR
    words: npt.NDArray[np.uint32]  # (3, P)


def make_scratch(size: int, max_height: int, max_width: int) -> Scratch:
    """Scratch for results of ``size`` pixels from images of at most these dimensions."""
    # A decoder pads its planes to whole blocks, of at most 32 pixels.
    height, width = max_height + 32, max_width + 32
    padded = (size + 3) // 4 * 4
    # One more than a filter can have, twice over: taps are taken in pairs.
    taps = 2 * (max(height, width) // size + 1) + 4

    def axis() -> Axis:
        return Axis(
            np.zeros(size, np.int64), np.zeros((size, taps), np.int16), np.ones(1, np.int64)
        )

    return Scratch(
        decoded=np.empty(3 * height * width, np.uint8),
        vertical=axis(),
        horizontal=axis(),
        rows=np.zeros((padded, width), np.int16),
        line=np.empty(width, np.int64),
        columns=np.empty((width, padded // 4), np.int64),
        planes=np.empty((3, size, padded), np.int16),
        pixels=np.zeros((padded, padded), np.uint32),
        words=np.empty((3, padded), np.uint32),
    )


@_compiled
def _set_axis(axis, start, length, low, high):  # type: ignore[no-untyped-def]
    """Triangle filter that maps ``[start, start + length)`` onto the outputs.

    ``low`` and ``high`` bound the inputs it may read; what falls outside is left out and the rest
    weighs more, as at the edge of an image.
    """
    size = axis.first.shape[0]
    scale = length / size
    support = max(scale, 1.0)
    taps = 1
    for i in range(size):
        centre = start + (i + 0.5) * scale
        first = max(int(np.floor(centre - support + 0.5)), low)
        last = min(int(np.floor(centre + support + 0.5)), high)
        total = 0.0
        for j in range(first, last):
            total += max(0.0, 1.0 - abs(j + 0.5 - centre) / support)
        rest, heaviest = _ONE, 0
        row = axis.weights[i]
        for k in range(row.shape[0]):
            row[k] = 0
        for j in range(first, last):
            share = max(0.0, 1.0 - abs(j + 0.5 - centre) / support) / total
            row[j - first] = int(share * _ONE + 0.5)
            rest -= row[j - first]
            if row[j - first] > row[heaviest]:
                heaviest = j - first
        row[heaviest] += rest  # the sum is exact: flat areas keep their value
        axis.first[i] = first
        taps = max(taps, last - first)
    axis.taps[0] = taps


@_compiled
def _shrink_rows(plane, left, columns, axis, rows_PC):  # type: ignore[no-untyped-def]
    """Vertical pass: uint8 rows of a plane to int16 rows of 16ths, two taps at a time."""
    right, bottom = left + columns, plane.shape[0] - 1
    for y in range(axis.first.shape[0]):
        target, first = rows_PC[y], axis.first[y]
        for k in range(0, axis.taps[0], 2):
            # Taps that this output does not have weigh nothing, but must lie inside the plane.
            a = plane[min(first + k, bottom), left:right]
            b = plane[min(first + k + 1, bottom), left:right]
            weight_a, weight_b = _I32(axis.weights[y, k]), _I32(axis.weights[y, k + 1])
            if k == 0:
                for x in range(columns):
                    both = _I32(_I32(a[x]) * weight_a + _I32(b[x]) * weight_b + _I32(512))
                    target[x] = _I16(both >> _I32(10))
            else:
                for x in range(columns):
                    both = _I32(_I32(a[x]) * weight_a + _I32(b[x]) * weight_b + _I32(512))
                    target[x] += _I16(both >> _I32(10))


@_compiled
def _transpose(rows_PC, columns, line_C, columns_CP):  # type: ignore[no-untyped-def]
    for quad in range(rows_PC.shape[0] // 4):
        a, b = rows_PC[4 * quad], rows_PC[4 * quad + 1]
        c, d = rows_PC[4 * quad + 2], rows_PC[4 * quad + 3]
        for x in range(columns):
            line_C[x] = _I64(a[x]) | _I64(b[x]) << 16 | _I64(c[x]) << 32 | _I64(d[x]) << 48
        for x in range(columns):
            columns_CP[x, quad] = line_C[x]


@_compiled
def _shrink_columns(columns_CP, axis, plane_SP):  # type: ignore[no-untyped-def]
    """Horizontal pass on the transposed picture: 16ths to 32nds, two taps at a time."""
    columns = columns_CP.view(np.int16)
    length, rightmost = plane_SP.shape[1], columns.shape[0] - 1
    for x in range(axis.first.shape[0]):
        target, first = plane_SP[x], axis.first[x]
        for k in range(0, axis.taps[0], 2):
            a, b = columns[min(first + k, rightmost)], columns[min(first + k + 1, rightmost)]
            weight_a, weight_b = _I32(axis.weights[x, k]), _I32(axis.weights[x, k + 1])
            if k == 0:
                for y in range(length):
                    both = _I32(_I32(a[y]) * weight_a + _I32(b[y]) * weight_b + _I32(4096))
                    target[y] = _I16(both >> _I32(13))
            else:
                for y in range(length):
                    both = _I32(_I32(a[y]) * weight_a + _I32(b[y]) * weight_b + _I32(4096))
                    target[y] += _I16(both >> _I32(13))


@_compiled
def _to_byte(value):  # type: ignore[no-untyped-def]
    """32nds to a byte; the caller has added the 16 that rounds."""
    return _U32(min(max(_I32(value >> _I32(5)), _I32(0)), _I32(255)))


@_compiled
def _ycc_to_pixels(planes_3SP, pixels_PP):  # type: ignore[no-untyped-def]
    for x in range(planes_3SP.shape[1]):
        luma, blue, red, pixels = planes_3SP[0, x], planes_3SP[1, x], planes_3SP[2, x], pixels_PP[x]
        for y in range(luma.shape[0]):
            # Casts keep every step in 32 bits; Numba's integers grow to 64 otherwise.
            base = _I32(_I32(luma[y]) + _I32(16))
            cb = _I32(_I32(_I32(blue[y]) - _I32(_GREY)) << _I32(2))
            cr = _I32(_I32(_I32(red[y]) - _I32(_GREY)) << _I32(2))
            green = _I32(cb * _I32(_CB_TO_G) + cr * _I32(_CR_TO_G)) >> _I32(16)
            r = _to_byte(_I32(base + (_I32(cr * _I32(_CR_TO_R)) >> _I32(16))))
            g = _to_byte(_I32(base - green))
            b = _to_byte(_I32(base + (_I32(cb * _I32(_CB_TO_B)) >> _I32(16))))
            pixels[y] = r | g << _U32(8) | b << _U32(16)


@_compiled
def _rgb_to_pixels(planes_3SP, pixels_PP):  # type: ignore[no-untyped-def]
    for x in range(planes_3SP.shape[1]):
        red, green, blue = planes_3SP[0, x], planes_3SP[1, x], planes_3SP[2, x]
        pixels = pixels_PP[x]
        for y in range(red.shape[0]):
            r = _to_byte(_I32(_I32(red[y]) + _I32(16)))
            g = _to_byte(_I32(_I32(green[y]) + _I32(16)))
            b = _to_byte(_I32(_I32(blue[y]) + _I32(16)))
            pixels[y] = r | g << _U32(8) | b << _U32(16)


@_compiled
def _write(pixels_PP, words_3P, out_SS3):  # type: ignore[no-untyped-def]
    """Transpose back into interleaved RGB: four pixels make three 32-bit words."""
    size = out_SS3.shape[0]
    if size % 4:
        for y in range(size):
            for x in range(size):
                pixel = pixels_PP[x, y]
                out_SS3[y, x, 0] = pixel & _U32(255)
                out_SS3[y, x, 1] = (pixel >> _U32(8)) & _U32(255)
                out_SS3[y, x, 2] = pixel >> _U32(16)
        return
    out = out_SS3.reshape(size, 3 * size).view(np.uint32)
    first, second, third = words_3P[0], words_3P[1], words_3P[2]
    for quad in range(size // 4):
        a, b = pixels_PP[4 * quad], pixels_PP[4 * quad + 1]
        c, d = pixels_PP[4 * quad + 2], pixels_PP[4 * quad + 3]
        for y in range(size):
            first[y] = a[y] | b[y] << _U32(24)
            second[y] = b[y] >> _U32(8) | c[y] << _U32(16)
            third[y] = c[y] >> _U32(16) | d[y] << _U32(8)
        for y in range(size):
            out[y, 3 * quad] = first[y]
            out[y, 3 * quad + 1] = second[y]
            out[y, 3 * quad + 2] = third[y]


@_compiled
def _set_axes(vertical, horizontal, box_4, down, across):  # type: ignore[no-untyped-def]
    """Filters for a box on a plane with ``down`` by ``across`` of the picture's resolution.

    Returns the box's first column and number of columns on the plane.
    """
    first, length = box_4[0] * down, box_4[2] * down
    _set_axis(vertical, first, length, np.int64(first), np.int64(np.ceil(first + length)))
    first, length = box_4[1] * across, box_4[3] * across
    left = np.int64(first)
    columns = np.int64(np.ceil(first + length)) - left
    _set_axis(horizontal, first - left, length, np.int64(0), columns)
    return left, columns


@_compiled
def crop(planes, scale, is_rgb, box_4, scratch, out_SS3):  # type: ignore[no-untyped-def]
    """Cut a box out of a picture's planes into an RGB image.

    Args:
        planes: three uint8 arrays (H, W): red, green, blue, or brightness and two colour planes,
            which are empty for a grey picture and may be smaller than the first.
        scale: float64 (4,): resolution of the first plane (down, across) and of the other two
            relative to the picture that the box refers to: 1, 1, 0.5, 0.5 for 4:2:0.
        is_rgb: whether planes are red, green, blue.
        box_4: int64, (top, left, height, width).
        scratch: from :func:`make_scratch`, for at least these dimensions.
        out_SS3: uint8, contiguous; S % 4 == 0 is faster.
    """
    left, columns = np.int64(0), np.int64(0)
    for channel in range(3):
        plane = planes[channel]
        if plane.size == 0:
            for x in range(scratch.planes.shape[1]):
                for y in range(scratch.planes.shape[2]):
                    scratch.planes[channel, x, y] = _GREY
            continue
        if channel < 2:  # the third plane is as the second
            down, across = scale[2 * channel], scale[2 * channel + 1]
            left, columns = _set_axes(scratch.vertical, scratch.horizontal, box_4, down, across)
        _shrink_rows(plane, left, columns, scratch.vertical, scratch.rows)
        _transpose(scratch.rows, columns, scratch.line, scratch.columns)
        _shrink_columns(scratch.columns, scratch.horizontal, scratch.planes[channel])
    if is_rgb:
        _rgb_to_pixels(scratch.planes, scratch.pixels)
    else:
        _ycc_to_pixels(scratch.planes, scratch.pixels)
    _write(scratch.pixels, scratch.words, out_SS3)


@_compiled
def split_channels(rgb_HW3, planes_3HW):  # type: ignore[no-untyped-def]
    """Interleaved RGB, uint8, to planes."""
    for y in range(rgb_HW3.shape[0]):
        row = rgb_HW3[y]
        for channel in range(3):
            target = planes_3HW[channel, y]
            for x in range(target.shape[0]):
                target[x] = row[x, channel]
