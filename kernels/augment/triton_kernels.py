# mypy: disable-error-code="no-untyped-def"
# Arguments of device code have the types of the launch: CompileCase.signature says which.
"""Augmentation on a GPU: one launch from uint8 pixels to normalised floats.

A program takes one image after another and does the whole of it, so that what it reads again it
reads from the L2 cache: contrast needs the mean of an image that the steps before it have changed,
which is a first pass over 147 KiB at 224 pixels; the second pass goes backwards, from what was read
last to what was read first. There are as many programs as run at once, and a counter hands
out images, since images differ in cost. The order in which they are taken changes no result.

Blur is separable and runs only on images that drew it, a strip of rows at a time: coloured rows go
to a ring that holds the strip and its neighbours, the vertical pass from there to a strip, the
horizontal pass from there to the output. Ring and strip belong to a program and are written
over again and again: they stay in the L2 cache, most of the time in the L1.

Legend: R rows (views times samples, view-major), B samples, V views, H height, W width, P
parameters of an image. A plane is one colour of a ring or strip.
"""

import torch
import triton
import triton.language as tl

from kernels.augment.plan import Launch, plan_launch
from kernels.augment.table import JITTER_STEPS, LUMA, Column, Jitter
from kernels.augment.triton_draw import compile_cases as draw_cases
from kernels.compile_case import CompileCase
from kernels.on_device import on_device_of

Triple = tuple[float, float, float]

_FLIP = tl.constexpr(int(Column.FLIP))
_JITTER = tl.constexpr(int(Column.JITTER))
_STEPS = tl.constexpr(JITTER_STEPS)
_FACTORS = tl.constexpr(int(Column.BRIGHTNESS) - int(Jitter.BRIGHTNESS))  # + code: its column
_GRAYSCALE = tl.constexpr(int(Column.GRAYSCALE))
_SOLARIZE = tl.constexpr(int(Column.SOLARIZE))
_BLUR = tl.constexpr(int(Column.BLUR))
_CONTRAST = tl.constexpr(int(Jitter.CONTRAST))
_SATURATION = tl.constexpr(int(Jitter.SATURATION))
_HUE = tl.constexpr(int(Jitter.HUE))
_LUMA_R, _LUMA_G, _LUMA_B = (tl.constexpr(weight) for weight in LUMA)
# Weights below this do not change a float32 sum of values in [0, 1] that has a weight of 1/46.
_NO_WEIGHT = tl.constexpr(2.0**-26)
_BYTE = tl.constexpr(1.0 / 255.0)


# --- device code --------------------------------------------------------------------------------


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
def _colour(pixels, parameters, index, inside, gray_mean):
    """Jittered and, where drawn, gray."""
    red, green, blue = _load_pixels(pixels, index, inside)
    red, green, blue = _jitter(red, green, blue, parameters, _STEPS, gray_mean)
    if tl.load(parameters + _GRAYSCALE) != 0:
        red = _luma(red, green, blue)
        green = red
        blue = red
    return red, green, blue


@triton.jit
def _steps_before_contrast(parameters):
    split = _STEPS
    for step in tl.static_range(_STEPS):
        split = tl.where(tl.load(parameters + _JITTER + step) == _CONTRAST, step, split)
    return split


@triton.jit
def _gray_mean(pixels, parameters, steps, SIZE: tl.constexpr, BLOCK: tl.constexpr):
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
def _finish(out, parameters, normal, index, inside, red, green, blue, W: tl.constexpr):
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


@triton.jit
def _write_sharp(
    pixels,
    parameters,
    out,
    gray_mean,
    normal,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks: tl.constexpr = (H * W + BLOCK - 1) // BLOCK
    for block in range(blocks):
        # Backwards: what the pass for the mean read last is what a cache has kept.
        index = (blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
        inside = index < H * W
        red, green, blue = _colour(pixels, parameters, index, inside, gray_mean)
        _finish(out, parameters, normal, index, inside, red, green, blue, W)


@triton.jit
def _fill_ring(
    pixels,
    parameters,
    ring,
    gray_mean,
    first,
    last,
    W: tl.constexpr,
    RING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Colour the image's rows ``first`` to ``last - 1`` into the planes of the ring."""
    for start in range(first * W, last * W, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < last * W
        red, green, blue = _colour(pixels, parameters, index, inside, gray_mean)
        place = ring + index % (RING * W)
        tl.store(place, red, mask=inside)
        tl.store(place + RING * W, green, mask=inside)
        tl.store(place + 2 * RING * W, blue, mask=inside)


@triton.jit
def _load_planes(place, inside, PLANE: tl.constexpr):
    red = tl.load(place, mask=inside, other=0.0)
    green = tl.load(place + PLANE, mask=inside, other=0.0)
    blue = tl.load(place + 2 * PLANE, mask=inside, other=0.0)
    return red, green, blue


@triton.jit
def _blur_down(
    ring,
    strip,
    parameters,
    reach,
    first,
    last,
    H: tl.constexpr,
    W: tl.constexpr,
    RING: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Vertically, rows ``first`` to ``last - 1``: ring to strip, reflected without the edge."""
    for start in range(0, (last - first) * W, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < (last - first) * W
        y = first + index // W
        x = index % W
        weight = tl.load(parameters + _BLUR)
        red, green, blue = _load_planes(ring + y % RING * W + x, inside, RING * W)
        red *= weight
        green *= weight
        blue *= weight
        for k in range(1, reach + 1):
            weight = tl.load(parameters + _BLUR + k)
            above = tl.abs(y - k)
            below = H - 1 - tl.abs(H - 1 - y - k)
            red_a, green_a, blue_a = _load_planes(ring + above % RING * W + x, inside, RING * W)
            red_b, green_b, blue_b = _load_planes(ring + below % RING * W + x, inside, RING * W)
            red += (red_a + red_b) * weight
            green += (green_a + green_b) * weight
            blue += (blue_a + blue_b) * weight
        place = strip + index
        tl.store(place, red, mask=inside)
        tl.store(place + STRIP * W, green, mask=inside)
        tl.store(place + 2 * STRIP * W, blue, mask=inside)


@triton.jit
def _blur_across(
    strip,
    out,
    parameters,
    normal,
    reach,
    first,
    last,
    W: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Horizontally, rows ``first`` to ``last - 1``: strip to output."""
    for start in range(0, (last - first) * W, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < (last - first) * W
        x = index % W
        row = strip + index - x
        weight = tl.load(parameters + _BLUR)
        red, green, blue = _load_planes(row + x, inside, STRIP * W)
        red *= weight
        green *= weight
        blue *= weight
        for k in range(1, reach + 1):
            weight = tl.load(parameters + _BLUR + k)
            left = tl.abs(x - k)
            right = W - 1 - tl.abs(W - 1 - x - k)
            red_a, green_a, blue_a = _load_planes(row + left, inside, STRIP * W)
            red_b, green_b, blue_b = _load_planes(row + right, inside, STRIP * W)
            red += (red_a + red_b) * weight
            green += (green_a + green_b) * weight
            blue += (blue_a + blue_b) * weight
        _finish(out, parameters, normal, first * W + index, inside, red, green, blue, W)


@triton.jit
def _write_blurred(
    pixels,
    parameters,
    out,
    ring,
    gray_mean,
    normal,
    reach,
    H: tl.constexpr,
    W: tl.constexpr,
    RING: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    strip = ring + 3 * RING * W
    coloured = 0  # rows
    for first in range(0, H, STRIP):
        last = tl.minimum(first + STRIP, H)
        ahead = tl.minimum(last + reach, H)
        _fill_ring(pixels, parameters, ring, gray_mean, coloured, ahead, W, RING, BLOCK)
        coloured = ahead
        # Threads of one program meet in its ring and strip. Two barriers suffice: the ring is
        # filled again only after the second, the strip only after the next strip's first.
        tl.debug_barrier()
        _blur_down(ring, strip, parameters, reach, first, last, H, W, RING, STRIP, BLOCK)
        tl.debug_barrier()
        _blur_across(strip, out, parameters, normal, reach, first, last, W, STRIP, BLOCK)


@triton.jit(do_not_specialize=["rows", "samples", "views"])
def augment_kernel(
    pixels,
    table,
    out,
    scratch,
    ticket,
    rows,
    samples,
    views,
    scale_r,
    scale_g,
    scale_b,
    shift_r,
    shift_g,
    shift_b,
    H: tl.constexpr,
    W: tl.constexpr,
    RADIUS: tl.constexpr,
    RADIUS_PADDED: tl.constexpr,
    RING: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """uint8 ``(B, V, H, W, 3)`` to ``(V * B, H, W, 3)``; ``ticket`` is zero at the start."""
    normal = (scale_r, scale_g, scale_b, shift_r, shift_g, shift_b)
    ring = scratch + tl.program_id(0).to(tl.int64) * (3 * (RING + STRIP) * W)
    row = tl.atomic_add(ticket, 1)
    while row < rows:
        image = (row % samples).to(tl.int64) * views + row // samples
        source = pixels + image * (3 * H * W)
        target = out + row.to(tl.int64) * (3 * H * W)
        parameters = table + row * (_BLUR + RADIUS + 1)

        gray_mean = 0.0
        steps = _steps_before_contrast(parameters)
        if steps < _STEPS:
            gray_mean = _gray_mean(source, parameters, steps, H * W, BLOCK)
        distance = tl.arange(0, RADIUS_PADDED)
        weights = tl.load(parameters + _BLUR + distance, mask=distance <= RADIUS, other=0.0)
        reach = tl.max(tl.where(weights > _NO_WEIGHT, distance, 0), 0)
        if reach == 0:
            _write_sharp(source, parameters, target, gray_mean, normal, H, W, BLOCK)
        else:
            _write_blurred(
                source,
                parameters,
                target,
                ring,
                gray_mean,
                normal,
                reach,
                H,
                W,
                RING,
                STRIP,
                BLOCK,
            )
        row = tl.atomic_add(ticket, 1)


# --- host code ----------------------------------------------------------------------------------


def augment_triton(
    crops_BVHWC: torch.Tensor,
    table_RP: torch.Tensor,
    mean: Triple,
    std: Triple,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As :func:`kernels.augment.augment`, with the table on the device of the crops.

    Args:
        crops_BVHWC: uint8 ``(B, V, H, W, 3)``.
        table_RP: float32 ``(V * B, P)``, contiguous.
        mean: as there.
        std: as there.
        dtype: float32, bfloat16 or float16.

    Returns:
        As there. Arithmetic is float32, rounded once to ``dtype``.
    """
    samples, views, height, width, _ = crops_BVHWC.shape
    rows = samples * views
    out_RHWC = crops_BVHWC.new_empty((rows, height, width, 3), dtype=dtype)
    if out_RHWC.numel() == 0:
        return out_RHWC.permute(0, 3, 1, 2)
    radius = table_RP.shape[1] - int(Column.BLUR) - 1
    launch = plan_launch(height, width, radius)
    programs = min(rows, launch.programs(_processors(crops_BVHWC.device)))
    scratch = crops_BVHWC.new_empty(
        programs * launch.scratch_floats(width) if radius else 1, dtype=torch.float32
    )
    scales = [1.0 / s for s in std]
    shifts = [-m / s for m, s in zip(mean, std)]
    with on_device_of(crops_BVHWC):
        augment_kernel[(programs,)](
            crops_BVHWC.contiguous(),
            table_RP,
            out_RHWC,
            scratch,
            torch.zeros(1, dtype=torch.int32, device=crops_BVHWC.device),
            rows,
            samples,
            views,
            *scales,
            *shifts,
            **_constants(height, width, radius, launch),
            num_warps=launch.warps,
        )
    return out_RHWC.permute(0, 3, 1, 2)


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter's
    return torch.cuda.get_device_properties(device).multi_processor_count


def _constants(height: int, width: int, radius: int, launch: Launch) -> dict[str, int]:
    return {
        "H": height,
        "W": width,
        "RADIUS": radius,
        "RADIUS_PADDED": triton.next_power_of_2(radius + 1),
        "RING": launch.ring,
        "STRIP": launch.strip,
        "BLOCK": launch.block,
    }


def compile_cases() -> list[CompileCase]:
    """ImageNet's and CIFAR's crops, in every output type; and the draws of their parameters."""
    cases = draw_cases()
    for side, radius in ((224, 11), (32, 1)):
        launch = plan_launch(side, side, radius)
        for out in ("bf16", "fp16", "fp32"):
            pointers = {"pixels": "*u8", "table": "*fp32", "out": f"*{out}", "scratch": "*fp32"}
            numbers = dict.fromkeys(("rows", "samples", "views"), "i32")
            normal = {f"{what}_{c}": "fp32" for what in ("scale", "shift") for c in "rgb"}
            cases.append(
                CompileCase(
                    name=f"augment {out} {side}x{side}",
                    kernel=augment_kernel,
                    signature={**pointers, "ticket": "*i32", **numbers, **normal},
                    constants=_constants(side, side, radius, launch),
                    aligned=(*pointers, "ticket"),
                    warps=launch.warps,
                )
            )
    return cases
