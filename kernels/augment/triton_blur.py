"""Device code of :mod:`kernels.augment.triton_kernels`: an image that drew a blur.

Blur is separable and runs only on images that drew it, a strip of rows at a time: coloured rows go
to a ring that holds the strip and its neighbours, the vertical pass from there to a strip, the
horizontal pass from there to the output. Ring and strip belong to a program and are written
over again and again: they stay in the L2 cache, most of the time in the L1.

Legend: H height, W width. A plane is one colour of a ring or strip.
"""

import triton
import triton.language as tl

from kernels.augment.table import Column
from kernels.augment.triton_colour import load_coloured, write_finished

BLUR = tl.constexpr(int(Column.BLUR))


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
        red, green, blue = load_coloured(pixels, parameters, index, inside, gray_mean)
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
def _load_centre(place, parameters, inside, PLANE: tl.constexpr):
    weight = tl.load(parameters + BLUR)
    red, green, blue = _load_planes(place, inside, PLANE)
    return red * weight, green * weight, blue * weight


@triton.jit
def _add_pair(red, green, blue, place_a, place_b, parameters, k, inside, PLANE: tl.constexpr):
    """Add the two pixels that lie ``k`` from the centre, which have one weight."""
    weight = tl.load(parameters + BLUR + k)
    red_a, green_a, blue_a = _load_planes(place_a, inside, PLANE)
    red_b, green_b, blue_b = _load_planes(place_b, inside, PLANE)
    red += (red_a + red_b) * weight
    green += (green_a + green_b) * weight
    blue += (blue_a + blue_b) * weight
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
        red, green, blue = _load_centre(ring + y % RING * W + x, parameters, inside, RING * W)
        for k in range(1, reach + 1):
            above = ring + tl.abs(y - k) % RING * W + x
            below = ring + (H - 1 - tl.abs(H - 1 - y - k)) % RING * W + x
            red, green, blue = _add_pair(
                red, green, blue, above, below, parameters, k, inside, RING * W
            )
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
        red, green, blue = _load_centre(row + x, parameters, inside, STRIP * W)
        for k in range(1, reach + 1):
            left = row + tl.abs(x - k)
            right = row + W - 1 - tl.abs(W - 1 - x - k)
            red, green, blue = _add_pair(
                red, green, blue, left, right, parameters, k, inside, STRIP * W
            )
        write_finished(out, parameters, normal, first * W + index, inside, red, green, blue, W)


@triton.jit
def write_blurred(
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
    """A whole image; ``reach`` is the farthest pixel that has a weight."""
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
