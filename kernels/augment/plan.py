"""How :mod:`kernels.augment.triton_kernels` cuts up a batch, and the bytes that moves.

Pure arithmetic, no GPU and no Triton: :mod:`kernels.augment.triton_kernels` launches by it, and
``docs/kernels.md`` quotes it.
"""

from dataclasses import dataclass

import torch

from kernels.augment.table import Column

_FLOAT = 4  # bytes of a float32
_LARGE_IMAGE = 96 * 96  # pixels from which an image gives 16 warps enough to do


@dataclass(frozen=True)
class Launch:
    """A launch for one size of image."""

    block: int
    """Pixels that a program works on at a time."""
    warps: int
    """Of a program."""
    strip: int
    """Rows blurred at a time."""
    ring: int
    """Coloured rows that are kept: a strip and its neighbours, or the whole image."""

    def scratch_floats(self, width: int) -> int:
        """float32 values that one program needs for its ring and its strip."""
        return 3 * (self.ring + self.strip) * width

    def programs(self, processors: int) -> int:
        """How many run at once: 16 warps on each of the GPU's processors."""
        return processors * 16 // self.warps


def plan_launch(height: int, width: int, radius: int) -> Launch:
    """Four pixels per thread; one program per processor for large images, two for small ones.

    Args:
        height: pixels.
        width: pixels.
        radius: of the widest blur, pixels.
    """
    warps = 16 if height * width >= _LARGE_IMAGE else 8
    block = 128 * warps
    strip = min(height, max(1, 2 * block // width))
    return Launch(block, warps, strip, min(height, strip + 2 * radius))


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes between a GPU and its memory for one call."""

    floor: int
    """Every pixel read once and written once: no implementation moves less."""
    planned: int
    """As the kernel means to: what is read again comes from the L2 cache. Parameters included."""
    uncached: int
    """If the L2 cache kept nothing at all: the bound on the other side."""
    cache: int
    """Bytes in work at once, which the L2 cache has to keep for ``planned`` to hold: the images of
    all running programs and, in the share that blurs, their rings and strips."""


def bytes_moved(
    rows: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    p_blur: float = 0.5,
    p_contrast: float = 0.8,
    *,
    radius: int | None = None,
    processors: int = 132,
) -> Traffic:
    """Expected traffic of ``rows`` augmented images.

    Args:
        rows: images written, views times samples.
        height: pixels.
        width: pixels.
        dtype: of the output.
        p_blur: share of the images that are blurred.
        p_contrast: share whose contrast is changed, which needs their mean first.
        radius: of the blur, pixels; by default SimCLR's, a twentieth of the smaller side.
        processors: of the GPU: 108 (A100), 132 (H100), 148 (B200).
    """
    radius = min(height, width) // 20 if radius is None else radius
    launch = plan_launch(height, width, radius)
    pixels = rows * height * width
    floor = pixels * (3 + 3 * dtype.itemsize)
    table = rows * _FLOAT * (Column.BLUR + radius + 1)
    strips = -(-height // launch.strip)
    # A plane's rows: written to the ring once, read from there by every strip that needs them,
    # written to the strip, read from there.
    ring_rows = 2 * height + 2 * radius * (strips - 1)
    blur = rows * 3 * _FLOAT * width * (ring_rows + 2 * height)
    running = min(rows, launch.programs(processors))
    in_work = running * (3 * height * width + p_blur * _FLOAT * launch.scratch_floats(width))
    return Traffic(
        floor=floor,
        planned=floor + table,
        uncached=floor + table + round(p_contrast * 3 * pixels + p_blur * blur),
        cache=round(in_work),
    )
