"""Augmentation on a GPU: one launch from uint8 pixels to normalised floats.

A program takes one image after another and does the whole of it, so that what it reads again it
reads from the L2 cache: contrast needs the mean of an image that the steps before it have changed,
which is a first pass over 147 KiB at 224 pixels; the second pass goes backwards, from what was read
last to what was read first. There are as many programs as run at once, and a counter hands
out images, since images differ in cost. The order in which they are taken changes no result.

What becomes of a pixel's colour is in ``triton_colour.py``, how an image is blurred in
``triton_blur.py``.

Legend: R rows (views times samples, view-major), B samples, V views, H height, W width, P
parameters of an image.
"""

import torch
import triton
import triton.language as tl

from kernels.augment.plan import Launch, plan_launch
from kernels.augment.table import Column
from kernels.augment.triton_blur import BLUR, write_blurred
from kernels.augment.triton_colour import (
    STEPS,
    load_coloured,
    mean_luma,
    steps_before_contrast,
    write_finished,
)
from kernels.dispatch import on_device_of

Triple = tuple[float, float, float]

# Weights below this do not change a float32 sum of values in [0, 1] that has a weight of 1/46.
_NO_WEIGHT = tl.constexpr(2.0**-26)


# --- device code --------------------------------------------------------------------------------


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
        red, green, blue = load_coloured(pixels, parameters, index, inside, gray_mean)
        write_finished(out, parameters, normal, index, inside, red, green, blue, W)


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
        parameters = table + row * (BLUR + RADIUS + 1)

        gray_mean = 0.0
        steps = steps_before_contrast(parameters)
        if steps < STEPS:
            gray_mean = mean_luma(source, parameters, steps, H * W, BLOCK)
        distance = tl.arange(0, RADIUS_PADDED)
        weights = tl.load(parameters + BLUR + distance, mask=distance <= RADIUS, other=0.0)
        reach = tl.max(tl.where(weights > _NO_WEIGHT, distance, 0), 0)
        if reach == 0:
            _write_sharp(source, parameters, target, gray_mean, normal, H, W, BLOCK)
        else:
            write_blurred(
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

    Arithmetic is float32, rounded once to ``dtype``.
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
