"""Crop and resize decoded planes: integer arithmetic, compiled by Numba, cached on disk.

Antialiased bilinear resampling, as torchvision's and Pillow's: a triangle filter, as wide as the
scale where it shrinks. It works on the planes that a JPEG stores, brightness and two half-sized
colour planes, and turns only the pixels of the result into RGB; upsampling the colour planes and
converting the whole image, as decoders do, is half of the work on a photograph.

The result does not depend on the processor: all arithmetic on pixels is in integers, so vector
width and order of summation do not matter. Values are 16 bits wide, which a processor multiplies
most of at a time, and carry fractional bits until the last rounding:

* a pixel is in 256ths before, between and after the passes, unsigned;
* weights are in 65536ths, so that a product's upper half is in 256ths again.

Both passes run along rows, where compilers vectorise: the picture is transposed between them, four
rows at a time packed into one 64-bit store, and again when it is written (little-endian only).

Shape suffixes: S side of the result, P = S rounded up to a multiple of 4, C columns of a plane.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from common.compiled import compiled

_ONE = 65535  # the sum of an output's weights: 1, as near as 16 bits come
_GREY = 128 << 8  # colourless
_I16, _I32, _I64 = np.int16, np.int32, np.int64
_U16, _U32, _U64 = np.uint16, np.uint32, np.uint64

# JFIF's conversion (ITU-R BT.601, full range), in 2**-14.
_CR_TO_R, _CB_TO_G, _CR_TO_G, _CB_TO_B = 22970, 5638, 11700, 29032

_compiled = compiled(nogil=True, error_model="numpy")


class Axis(NamedTuple):
    """Filter of one axis: ``taps[0]`` weights from input ``first[i]`` on make output ``i``."""

    first: npt.NDArray[np.int64]  # (S,)
    weights: npt.NDArray[np.uint16]  # (S, most taps)
    taps: npt.NDArray[np.int64]  # (1,)
    shares: npt.NDArray[np.float64]  # (most taps,): working memory


class Scratch(NamedTuple):
    """Working memory of one thread, for images up to a size."""

    decoded: npt.NDArray[np.uint8]  # three planes of the largest image
    vertical: Axis
    horizontal: Axis
    wide: npt.NDArray[np.uint16]  # (H, C): the box of a plane
    rows: npt.NDArray[np.uint16]  # (P, C): after the vertical pass
    line: npt.NDArray[np.uint64]  # (C,)
    columns: npt.NDArray[np.uint64]  # (C, P / 4): the same transposed, four uint16 in one
    planes: npt.NDArray[np.uint16]  # (3, S, P): after the horizontal pass, x-major
    pixels: npt.NDArray[np.uint32]  # (P, P), x-major: 0x00BBGGRR
    words: npt.NDArray[np.uint32]  # (3, P)


def make_scratch(size: int, max_height: int, max_width: int) -> Scratch:
    """Scratch for results of ``size`` pixels from images of at most these dimensions."""
    # A decoder pads its planes to whole blocks, of at most 32 pixels.
    height, width = max_height + 32, max_width + 32
    padded = (size + 3) // 4 * 4
    # One more than a filter can have, twice over: taps are taken in fours.
    taps = 2 * (max(height, width) // size + 1) + 8

    def axis() -> Axis:
        return Axis(
            np.zeros(size, np.int64),
            np.zeros((size, taps), np.uint16),
            np.ones(1, np.int64),
            np.empty(taps),
        )

    return Scratch(
        decoded=np.empty(3 * height * width, np.uint8),
        vertical=axis(),
        horizontal=axis(),
        wide=np.empty((height, width), np.uint16),
        rows=np.zeros((padded, width), np.uint16),
        line=np.empty(width, np.uint64),
        columns=np.empty((width, padded // 4), np.uint64),
        planes=np.empty((3, size, padded), np.uint16),
        pixels=np.zeros((padded, padded), np.uint32),
        words=np.empty((3, padded), np.uint32),
    )


@_compiled
def _set_axis(axis, start, length, low, high):  # type: ignore[no-untyped-def]
    """Triangle filter that maps ``[start, start + length)`` onto the outputs.

    ``low`` and ``high`` bound the inputs it may read; what falls outside is left out and the rest
    weighs more, as at the edge of an image.
    """
    if length <= axis.first.shape[0]:
        _set_enlarging(axis, start, length, low, high)
    else:
        _set_shrinking(axis, start, length, low, high)


@_compiled
def _set_enlarging(axis, start, length, low, high):  # type: ignore[no-untyped-def]
    """Two taps, the filter's least width."""
    firsts, weights = axis.first, axis.weights
    scale = length / firsts.shape[0]
    for i in range(firsts.shape[0]):
        place = start + (i + 0.5) * scale - 0.5
        # At an edge the nearest input has all the weight.
        place = min(max(place, np.float64(low)), np.float64(high - 1))
        first = np.int64(place)
        upper = np.int64((place - first) * _ONE + 0.5)
        firsts[i] = first
        weights[i, 0], weights[i, 1] = _ONE - upper, upper
    axis.taps[0] = 2


@_compiled
def _set_shrinking(axis, start, length, low, high):  # type: ignore[no-untyped-def]
    shares = axis.shares
    size = axis.first.shape[0]
    scale = length / size
    slope, most = 1.0 / scale, 0
    ends = (int(2.0 * scale) + 5) // 4 * 4  # a bound of the taps, in fours
    for i in range(size):
        centre = start + (i + 0.5) * scale
        first = max(int(np.floor(centre - scale + 0.5)), low)
        taps = min(int(np.floor(centre + scale + 0.5)), high) - first
        total, heaviest = 0.0, 0
        for k in range(taps):
            shares[k] = max(0.0, 1.0 - abs(first + k + 0.5 - centre) * slope)
            total += shares[k]
            if shares[k] > shares[heaviest]:
                heaviest = k
        one, rest, row = _ONE / total, _ONE, axis.weights[i]
        for k in range(taps):
            weight = int(shares[k] * one + 0.5)
            row[k] = weight
            rest -= weight
        row[heaviest] += rest  # the sum is exact: flat areas keep their value
        for k in range(taps, ends):
            row[k] = 0
        axis.first[i] = first
        most = max(most, taps)
    axis.taps[0] = most


@_compiled
def _widen(plane, left, columns, first, last, wide_HC):  # type: ignore[no-untyped-def]
    """Rows ``first`` to ``last`` of a plane's box, in 256ths."""
    for y in range(first, last):
        source, target = plane[y, left : left + columns], wide_HC[y]
        for x in range(columns):
            target[x] = _U16(source[x]) << _U16(8)


@_compiled
def _share(value, weight):  # type: ignore[no-untyped-def]
    """A product's upper 16 bits."""
    return _U16(_U32(_U32(value) * _U32(weight)) >> _U32(16))


@_compiled
def _mix_two(source, length, axis, target):  # type: ignore[no-untyped-def]
    """Every row of the target is the sum of two weighted rows of the source: an enlargement."""
    bottom = source.shape[0] - 1
    first, weights = axis.first, axis.weights
    for i in range(first.shape[0]):
        # A tap that an output does not have weighs nothing, but must lie inside the source.
        a, b, row = source[first[i]], source[min(first[i] + 1, bottom)], target[i]
        weight_a, weight_b = weights[i, 0], weights[i, 1]
        for x in range(length):
            row[x] = _U16(_share(a[x], weight_a) + _share(b[x], weight_b) + _U16(1))


@_compiled
def _mix_four(source, length, axis, tap, target):  # type: ignore[no-untyped-def]
    """Add taps ``tap`` to ``tap + 3``; the first four begin the sum."""
    bottom = source.shape[0] - 1
    firsts, weights = axis.first, axis.weights
    keep = _U16(0) if tap == 0 else _U16(65535)
    for i in range(firsts.shape[0]):
        first, row = firsts[i] + tap, target[i]
        a, b = source[min(first, bottom)], source[min(first + 1, bottom)]
        c, d = source[min(first + 2, bottom)], source[min(first + 3, bottom)]
        weight_a, weight_b = weights[i, tap], weights[i, tap + 1]
        weight_c, weight_d = weights[i, tap + 2], weights[i, tap + 3]
        for x in range(length):
            upper = _U16(_share(a[x], weight_a) + _share(b[x], weight_b))
            lower = _U16(_share(c[x], weight_c) + _share(d[x], weight_d))
            row[x] = _U16((row[x] & keep) + upper + lower + _U16(2))


@_compiled
def _mix(source, length, axis, target):  # type: ignore[no-untyped-def]
    """Row ``i`` of the target is the sum of ``axis.taps`` weighted rows of the source.

    A share is rounded down by half a unit on the average; every two are given one unit back.
    """
    if axis.taps[0] <= 2:
        _mix_two(source, length, axis, target)
    else:
        for tap in range(0, axis.taps[0], 4):
            _mix_four(source, length, axis, tap, target)


@_compiled
def _rows_read(axis, height):  # type: ignore[no-untyped-def]
    last = axis.first[axis.first.shape[0] - 1] + axis.taps[0]
    return axis.first[0], min(last, height)


@_compiled
def _transpose(rows_PC, columns, line_C, columns_CP):  # type: ignore[no-untyped-def]
    for quad in range(rows_PC.shape[0] // 4):
        a, b = rows_PC[4 * quad], rows_PC[4 * quad + 1]
        c, d = rows_PC[4 * quad + 2], rows_PC[4 * quad + 3]
        for x in range(columns):
            upper = _U64(a[x]) | _U64(b[x]) << _U64(16)
            line_C[x] = upper | _U64(c[x]) << _U64(32) | _U64(d[x]) << _U64(48)
        for x in range(columns):
            columns_CP[x, quad] = line_C[x]


@_compiled
def _to_byte(value):  # type: ignore[no-untyped-def]
    """64ths to a byte; the caller has added the 32 that rounds."""
    return _U32(min(max(_I16(value >> _I16(6)), _I16(0)), _I16(255)))


@_compiled
def _tint(value, weight):  # type: ignore[no-untyped-def]
    """256ths of colour times 2**-14ths: 64ths."""
    return _I16(_I32(_I32(value) * _I32(weight)) >> _I32(16))


@_compiled
def _ycc_to_pixels(planes_3SP, pixels_PP):  # type: ignore[no-untyped-def]
    for x in range(planes_3SP.shape[1]):
        luma, blue, red, pixels = planes_3SP[0, x], planes_3SP[1, x], planes_3SP[2, x], pixels_PP[x]
        for y in range(luma.shape[0]):
            # Casts keep every step in 16 bits; Numba's integers grow to 64 otherwise.
            base = _I16(_I16(luma[y] >> _U16(2)) + _I16(32))
            cb, cr = _I16(blue[y] ^ _U16(_GREY)), _I16(red[y] ^ _U16(_GREY))
            green = _I16(_tint(cb, _I16(_CB_TO_G)) + _tint(cr, _I16(_CR_TO_G)))
            r = _to_byte(_I16(base + _tint(cr, _I16(_CR_TO_R))))
            g = _to_byte(_I16(base - green))
            b = _to_byte(_I16(base + _tint(cb, _I16(_CB_TO_B))))
            pixels[y] = r | g << _U32(8) | b << _U32(16)


@_compiled
def _rgb_to_pixels(planes_3SP, pixels_PP):  # type: ignore[no-untyped-def]
    for x in range(planes_3SP.shape[1]):
        red, green, blue = planes_3SP[0, x], planes_3SP[1, x], planes_3SP[2, x]
        pixels = pixels_PP[x]
        for y in range(red.shape[0]):
            r = _to_byte(_I16(_I16(red[y] >> _U16(2)) + _I16(32)))
            g = _to_byte(_I16(_I16(green[y] >> _U16(2)) + _I16(32)))
            b = _to_byte(_I16(_I16(blue[y] >> _U16(2)) + _I16(32)))
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
        first, last = _rows_read(scratch.vertical, plane.shape[0])
        _widen(plane, left, columns, first, last, scratch.wide)
        _mix(scratch.wide[:last], columns, scratch.vertical, scratch.rows)
        _transpose(scratch.rows, columns, scratch.line, scratch.columns)
        transposed = scratch.columns.view(np.uint16)
        _mix(transposed[:columns], transposed.shape[1], scratch.horizontal, scratch.planes[channel])
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
