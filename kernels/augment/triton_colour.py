"""Device code of :mod:`kernels.augment.triton_kernels`: the colour of pixels.

Jitter and grayscale as bytes are read, solarisation, scale and flip as floats are written.
"""

import triton
import triton.language as tl

from kernels.augment.table import JITTER_STEPS, LUMA, Column, Jitter

STEPS = tl.constexpr(JITTER_STEPS)
_FLIP = tl.constexpr(int(Column.FLIP))
_JITTER = tl.constexpr(int(Column.JITTER))
_FACTORS = tl.constexpr(int(Column.BRIGHTNESS) - int(Jitter.BRIGHTNESS))  # + code: its column
_GRAYSCALE = tl.constexpr(int(Column.GRAYSCALE))
_SOLARIZE = tl.constexpr(int(Column.SOLARIZE))
_CONTRAST = tl.constexpr(int(Jitter.CONTRAST))
_SATURATION = tl.constexpr(int(Jitter.SATURATION))
_HUE = tl.constexpr(int(Jitter.HUE))
_LUMA_R, _LUMA_G, _LUMA_B = (tl.constexpr(weight) for weight in LUMA)
_BYTE = tl.constexpr(1.0 / 255.0)


@triton.jit
def _luma(red, green, blue):
    return _LUMA_R * red + _LUMA_G * green + _LUMA_B * blue


@triton.jit
def _unit(value):
    return tl.minimum(tl.maximum(value, 0.0), 1.0)


@triton.jit
def _turn_hue(red, green, blue, turns):
    """HSV's hue turned without HSV: a channel is low + chroma * f(hue), f a trapezium."""
    high = tl.maximum(tl.maximum(red, green), blue)
    low = tl.minimum(tl.minimum(red, green), blue)
    chroma = high - low
    inverse = 1.0 / tl.where(chroma > 0, chroma, 1.0)
    # Red wins ties over green over blue, as torchvision has it.
    hue = (red - green) * inverse + 4.0
    hue = tl.where(high == green, (blue - red) * inverse + 2.0, hue)
    hue = tl.where(high == red, (green - blue) * inverse, hue)
    hue += turns * 6.0
    hue = tl.where(hue < 0.0, hue + 6.0, hue)
    hue = tl.where(hue >= 6.0, hue - 6.0, hue)
    red = low + chroma * _unit(tl.abs(hue - 3.0) - 1.0)
    green = low + chroma * _unit(2.0 - tl.abs(hue - 2.0))
    blue = low + chroma * _unit(2.0 - tl.abs(hue - 4.0))
    return red, green, blue


@triton.jit
def _jitter(red, green, blue, parameters, steps, gray_mean):
    """The first ``steps`` operations of the image's own order."""
    for step in range(steps):
        code = tl.load(parameters + _JITTER + step).to(tl.int32)
        if code != 0:
            factor = tl.load(parameters + _FACTORS + code)
            if code == _HUE:
                red, green, blue = _turn_hue(red, green, blue, factor)
            else:
                other = tl.zeros_like(red)  # brightness blends with black
                if code == _SATURATION:
                    other = _luma(red, green, blue)
                if code == _CONTRAST:
                    other += gray_mean
                other *= 1.0 - factor
                red = _unit(red * factor + other)
                green = _unit(green * factor + other)
                blue = _unit(blue * factor + other)
    return red, green, blue


@triton.jit
def _load_pixels(pixels, index, inside):
    red = tl.load(pixels + 3 * index, mask=inside, other=0).to(tl.float32) * _BYTE
    green = tl.load(pixels + 3 * index + 1, mask=inside, other=0).to(tl.float32) * _BYTE
    blue = tl.load(pixels + 3 * index + 2, mask=inside, other=0).to(tl.float32) * _BYTE
    return red, green, blue


@triton.jit
def load_coloured(pixels, parameters, index, inside, gray_mean):
    """Jittered and, where drawn, gray."""
    red, green, blue = _load_pixels(pixels, index, inside)
    red, green, blue = _jitter(red, green, blue, parameters, STEPS, gray_mean)
    if tl.load(parameters + _GRAYSCALE) != 0:
        red = _luma(red, green, blue)
        green = red
        blue = red
    return red, green, blue


@triton.jit
def steps_before_contrast(parameters):
    """Operations of the jitter before contrast; all of them where it has none."""
    split = STEPS
    for step in tl.static_range(STEPS):
        split = tl.where(tl.load(parameters + _JITTER + step) == _CONTRAST, step, split)
    return split


@triton.jit
def mean_luma(pixels, parameters, steps, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Mean luma of the image as ``steps`` operations leave it, added in an order SIZE fixes."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, SIZE, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < SIZE
        red, green, blue = _load_pixels(pixels, index, inside)
        red, green, blue = _jitter(red, green, blue, parameters, steps, 0.0)
        total += tl.where(inside, _luma(red, green, blue), 0.0)
    return tl.sum(total, 0) / SIZE


@triton.jit
def write_finished(out, parameters, normal, index, inside, red, green, blue, W: tl.constexpr):
    """Solarise, normalise, flip, write; ``normal`` holds three scales and three shifts."""
    threshold = tl.load(parameters + _SOLARIZE)
    red = tl.where(red >= threshold, 1.0 - red, red)
    green = tl.where(green >= threshold, 1.0 - green, green)
    blue = tl.where(blue >= threshold, 1.0 - blue, blue)
    if tl.load(parameters + _FLIP) != 0:
        index += W - 1 - 2 * (index % W)
    tl.store(out + 3 * index, red * normal[0] + normal[3], mask=inside)
    tl.store(out + 3 * index + 1, green * normal[1] + normal[4], mask=inside)
    tl.store(out + 3 * index + 2, blue * normal[2] + normal[5], mask=inside)
