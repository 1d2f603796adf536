"""Augmentation on the CPU: one image at a time, its planes in cache, threads over images.

Each loop is one operation on flat arrays, which LLVM turns into vector code; a block of pixels runs
through the whole chain of point operations while it lies in L1. Compiled by numba on first use
and kept on disk. Threads are ours, outside the interpreter's lock, and not numba's parallel
loops: those share one pool in a process with the loader's, and its layers do not all allow that.

Legend: R rows (views times samples, view-major), N pixels of an image, P parameters.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit

from common.compiled import compiled
from kernels.augment.table import JITTER_STEPS, LUMA, Column, FloatArray, Jitter

Triple = tuple[float, float, float]
Array = npt.NDArray[Any]

# Compiled code takes plain integers for constants. All arithmetic stays in the dtype of the
# planes: a bare float literal would widen float32 to float64, hence `real(...)` below.
_FLIP, _JITTER, _GRAYSCALE = int(Column.FLIP), int(Column.JITTER), int(Column.GRAYSCALE)
_SOLARIZE, _BLUR = int(Column.SOLARIZE), int(Column.BLUR)
_FACTORS = int(Column.BRIGHTNESS) - int(Jitter.BRIGHTNESS)  # code + _FACTORS is its factor's column
_CONTRAST, _SATURATION = int(Jitter.CONTRAST), int(Jitter.SATURATION)
_HUE = int(Jitter.HUE)
_STEPS = JITTER_STEPS
_LUMA_R, _LUMA_G, _LUMA_B = LUMA
_BLOCK = 2048  # pixels: three float32 planes of it are 24 KiB, half of an L1 cache


def augment_cpu(
    crops_BVHWC: torch.Tensor,
    table_RP: FloatArray,
    mean: Triple,
    std: Triple,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As :func:`kernels.augment.augment`, for crops on the CPU."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    samples, views, height, width, _ = crops_BVHWC.shape
    rows = samples * views
    out_RHWC = torch.empty((rows, height, width, 3), dtype=real)
    pixels_BVN = crops_BVHWC.flatten(2).contiguous().numpy()
    out_RN = out_RHWC.flatten(1).numpy()
    parameters_RP = _parameters(table_RP, out_RN.dtype)
    scale = (1.0 / np.array(std)).astype(out_RN.dtype)
    shift = (-np.array(mean) / np.array(std)).astype(out_RN.dtype)

    def run(first: int, last: int) -> None:
        _augment_rows(pixels_BVN, parameters_RP, scale, shift, out_RN, width, first, last)

    _over_threads(run, rows)
    return out_RHWC.to(dtype).permute(0, 3, 1, 2)


def _parameters(table_RP: FloatArray, real: np.dtype[Any]) -> Array:
    """The table in the dtype of the arithmetic, fit for a blur that takes four weights at a time.

    Weights too small to matter in that dtype become zero; four zeros more stand at the end.
    """
    parameters_RP = np.pad(table_RP, ((0, 0), (0, 4))).astype(real)
    weights = parameters_RP[:, Column.BLUR :]
    weights[weights < np.finfo(real).eps / 8] = 0.0
    return parameters_RP


def _over_threads(run: Callable[[int, int], None], rows: int) -> None:
    threads = min(torch.get_num_threads(), rows)
    if threads <= 1:
        run(0, rows)
        return
    # Four shares per thread: images differ in cost, and another process may hold up a core.
    edges = np.linspace(0, rows, 4 * threads + 1).astype(int).tolist()
    list(_pool(os.getpid(), threads).map(run, edges[:-1], edges[1:]))


@lru_cache(maxsize=1)
def _pool(pid: int, threads: int) -> ThreadPoolExecutor:
    # Keyed by process: threads do not survive a fork.
    return ThreadPoolExecutor(threads, thread_name_prefix="augment")


# Nothing that lets the compiler choose how to round (contract, reassoc, arcp). What this process
# compiled and what an earlier one left on disk are linked differently; the bits must be the same,
# or a run would not go on as it was. No ninf either: the solarise threshold may be infinite.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"nnan"}}
_inlined = njit(inline="always", **_OPTIONS)  # one function for the compiler: a fifth less time
_compiled = compiled("the augmentation", **_OPTIONS)


@_compiled
def _augment_rows(pixels_BVN, parameters_RP, scale, shift, out_RN, width, first, last):  # type: ignore[no-untyped-def]
    samples = pixels_BVN.shape[0]
    size = out_RN.shape[1] // 3
    # One plane more than colours: blur writes each channel where the one before it lay.
    planes = np.empty((4, size), dtype=out_RN.dtype)
    # One row with the blur's reflected borders. Zeros: weights of zero meet what nobody filled.
    line = np.zeros(width + 2 * (parameters_RP.shape[1] - _BLUR), dtype=out_RN.dtype)
    for row in range(first, last):
        pixels = pixels_BVN[row % samples, row // samples]
        parameters = parameters_RP[row]
        _colour(pixels, parameters, planes)
        channels = 1 if parameters[_GRAYSCALE] != 0 else 3
        base = 1
        if _blur(planes, channels, parameters[_BLUR:], width, line):
            base = 0
        if parameters[_SOLARIZE] <= 1:
            for channel in range(channels):
                _solarize(planes[base + channel], parameters[_SOLARIZE])
        stride = 0 if channels == 1 else 1
        red, green, blue = planes[base], planes[base + stride], planes[base + 2 * stride]
        if parameters[_FLIP] != 0:
            for start in range(0, size, width):
                end = start + width
                _store_flipped(
                    red[start:end],
                    green[start:end],
                    blue[start:end],
                    scale,
                    shift,
                    out_RN[row, 3 * start : 3 * end],
                )
        else:
            _store(red, green, blue, scale, shift, out_RN[row])


@_inlined
def _colour(pixels, parameters, planes):  # type: ignore[no-untyped-def]
    """Fill planes 1 to 3, jittered; grayscale leaves its result in plane 1 alone."""
    size = planes.shape[1]
    split = _STEPS  # contrast needs the whole image as the steps before it leave it
    for step in range(_STEPS):
        if int(parameters[_JITTER + step]) == _CONTRAST:
            split = step
    total = 0.0
    for start in range(0, size, _BLOCK):
        end = min(start + _BLOCK, size)
        red, green, blue = planes[1, start:end], planes[2, start:end], planes[3, start:end]
        _load(pixels[3 * start : 3 * end], red, green, blue)
        for step in range(split):
            _jitter(parameters, step, red, green, blue, planes.dtype.type(0))
        if split < _STEPS:
            total += _luma_sum(red, green, blue)
    gray = parameters[_GRAYSCALE] != 0
    if split == _STEPS and not gray:
        return
    mean = planes.dtype.type(total / size)
    for start in range(0, size, _BLOCK):
        end = min(start + _BLOCK, size)
        red, green, blue = planes[1, start:end], planes[2, start:end], planes[3, start:end]
        for step in range(split, _STEPS):
            _jitter(parameters, step, red, green, blue, mean)
        if gray:
            _grayscale(red, green, blue)


@_inlined
def _jitter(parameters, step, red, green, blue, mean):  # type: ignore[no-untyped-def]
    code = int(parameters[_JITTER + step])
    if code == 0:
        return
    factor = parameters[_FACTORS + code]
    if code == _SATURATION:
        _saturate(red, green, blue, factor)
    elif code == _HUE:
        _turn_hue(red, green, blue, factor)
    else:
        addend = red.dtype.type(0)  # brightness blends with black
        if code == _CONTRAST:
            addend = (red.dtype.type(1) - factor) * mean
        _scale_and_add(red, factor, addend)
        _scale_and_add(green, factor, addend)
        _scale_and_add(blue, factor, addend)


@_inlined
def _load(pixels, red, green, blue):  # type: ignore[no-untyped-def]
    real = red.dtype.type
    scale = real(1.0 / 255.0)
    for i in range(red.size):
        red[i] = real(pixels[3 * i]) * scale
        green[i] = real(pixels[3 * i + 1]) * scale
        blue[i] = real(pixels[3 * i + 2]) * scale


@_inlined
def _scale_and_add(plane, factor, addend):  # type: ignore[no-untyped-def]
    real = plane.dtype.type
    for i in range(plane.size):
        plane[i] = min(max(plane[i] * factor + addend, real(0)), real(1))


@_inlined
def _luma_sum(red, green, blue):  # type: ignore[no-untyped-def]
    real = red.dtype.type
    total = real(0)
    for i in range(red.size):
        total += real(_LUMA_R) * red[i] + real(_LUMA_G) * green[i] + real(_LUMA_B) * blue[i]
    return total


@_inlined
def _saturate(red, green, blue, factor):  # type: ignore[no-untyped-def]
    real = red.dtype.type
    rest = real(1) - factor
    for i in range(red.size):
        r, g, b = red[i], green[i], blue[i]
        luma = rest * (real(_LUMA_R) * r + real(_LUMA_G) * g + real(_LUMA_B) * b)
        red[i] = min(max(r * factor + luma, real(0)), real(1))
        green[i] = min(max(g * factor + luma, real(0)), real(1))
        blue[i] = min(max(b * factor + luma, real(0)), real(1))


@_inlined
def _turn_hue(red, green, blue, turns):  # type: ignore[no-untyped-def]
    """HSV's hue turned without HSV: a channel is low + chroma * f(hue), f a trapezium."""
    real = red.dtype.type
    zero, one, two, three, four, six = real(0), real(1), real(2), real(3), real(4), real(6)
    shift = turns * six
    for i in range(red.size):
        r, g, b = red[i], green[i], blue[i]
        high = max(max(r, g), b)
        low = min(min(r, g), b)
        chroma = high - low
        inverse = one / (chroma if chroma > zero else one)
        # Selects, not branches: red wins ties over green over blue, as torchvision has it.
        hue = (r - g) * inverse + four
        hue = (b - r) * inverse + two if high == g else hue
        hue = (g - b) * inverse if high == r else hue
        hue += shift
        hue = hue + six if hue < zero else hue
        hue = hue - six if hue >= six else hue
        red[i] = low + chroma * min(max(abs(hue - three) - one, zero), one)
        green[i] = low + chroma * min(max(two - abs(hue - two), zero), one)
        blue[i] = low + chroma * min(max(two - abs(hue - four), zero), one)


@_inlined
def _grayscale(red, green, blue):  # type: ignore[no-untyped-def]
    real = red.dtype.type
    for i in range(red.size):
        red[i] = real(_LUMA_R) * red[i] + real(_LUMA_G) * green[i] + real(_LUMA_B) * blue[i]


@_inlined
def _blur(planes, channels, weights, width, line):  # type: ignore[no-untyped-def]
    """Blur planes 1.. into planes 0..; False, and nothing done, where the kernel is a point."""
    radius = weights.size - 1
    while radius > 0 and weights[radius] == 0:
        radius -= 1
    if radius == 0:
        return False
    for channel in range(channels):
        _blur_plane(planes[channel + 1], weights, radius, width, line, planes[channel])
    return True


@_inlined
def _blur_plane(source, weights, radius, width, line, out):  # type: ignore[no-untyped-def]
    """Four distances at a time, so that a running sum is loaded and stored a quarter as often.

    ``weights`` go on with zeros, and ``line`` with room, to a multiple of four past ``radius``.
    """
    height = source.size // width
    middle = len(line) // 2 - width // 2
    down = line[middle : middle + width]
    for y in range(height):
        row, across = source[y * width : (y + 1) * width], out[y * width : (y + 1) * width]
        for x in range(width):
            down[x] = row[x] * weights[0]
        for k in range(1, radius + 1, 4):
            _add_rows(down, source, y, k, weights)
        for k in range(1, radius + 1):  # reflect, the edge pixel not repeated
            line[middle - k] = line[middle + k]
            line[middle + width - 1 + k] = line[middle + width - 1 - k]
        for x in range(width):
            across[x] = down[x] * weights[0]
        for k in range(1, radius + 1, 4):
            left = line[middle - k - 3 : middle - k + width]
            right = line[middle + k : middle + k + width + 3]
            _add_shifted(across, left, right, weights[k : k + 4])


@_inlined
def _add_rows(total, plane, y, k, weights):  # type: ignore[no-untyped-def]
    """Add the rows at distance k to k + 3 above and below ``y``, weighed."""
    a0, b0 = _row(plane, y - k, total.size), _row(plane, y + k, total.size)
    a1, b1 = _row(plane, y - k - 1, total.size), _row(plane, y + k + 1, total.size)
    a2, b2 = _row(plane, y - k - 2, total.size), _row(plane, y + k + 2, total.size)
    a3, b3 = _row(plane, y - k - 3, total.size), _row(plane, y + k + 3, total.size)
    w0, w1, w2, w3 = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
    for x in range(total.size):
        near = w0 * (a0[x] + b0[x]) + w1 * (a1[x] + b1[x])
        total[x] += near + (w2 * (a2[x] + b2[x]) + w3 * (a3[x] + b3[x]))


@_inlined
def _row(plane, y, width):  # type: ignore[no-untyped-def]
    """Row ``y``, reflected into the image; any row where the weight is zero that far out."""
    last = plane.size // width - 1
    y = max(last - abs(last - abs(y)), 0)
    return plane[y * width : (y + 1) * width]


@_inlined
def _add_shifted(total, left, right, weights):  # type: ignore[no-untyped-def]
    """As ``_add_rows`` along a row: ``left`` starts at distance k + 3, ``right`` at k."""
    w0, w1, w2, w3 = weights[0], weights[1], weights[2], weights[3]
    for x in range(total.size):
        near = w0 * (left[x + 3] + right[x]) + w1 * (left[x + 2] + right[x + 1])
        total[x] += near + (w2 * (left[x + 1] + right[x + 2]) + w3 * (left[x] + right[x + 3]))


@_inlined
def _solarize(plane, threshold):  # type: ignore[no-untyped-def]
    real = plane.dtype.type
    for i in range(plane.size):
        value = plane[i]
        plane[i] = real(1) - value if value >= threshold else value


@_inlined
def _store(red, green, blue, scale, shift, out):  # type: ignore[no-untyped-def]
    scale_r, scale_g, scale_b = scale[0], scale[1], scale[2]
    shift_r, shift_g, shift_b = shift[0], shift[1], shift[2]
    for i in range(red.size):
        out[3 * i] = red[i] * scale_r + shift_r
        out[3 * i + 1] = green[i] * scale_g + shift_g
        out[3 * i + 2] = blue[i] * scale_b + shift_b


@_inlined
def _store_flipped(red, green, blue, scale, shift, out):  # type: ignore[no-untyped-def]
    scale_r, scale_g, scale_b = scale[0], scale[1], scale[2]
    shift_r, shift_g, shift_b = shift[0], shift[1], shift[2]
    last = red.size - 1
    for i in range(red.size):
        out[3 * i] = red[last - i] * scale_r + shift_r
        out[3 * i + 1] = green[last - i] * scale_g + shift_g
        out[3 * i + 2] = blue[last - i] * scale_b + shift_b
