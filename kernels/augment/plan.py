"""How :mod:`kernels.augment.triton_kernels` cuts up a batch, and the bytes that moves.

Pure arithmetic, no GPU and no Triton: :mod:`kernels.augment.triton_kernels` launches by it.
"""

from dataclasses import dataclass

import torch

from kernels.augment.table import Column

FLOAT = 4  # bytes of a float32
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


def bytes_moved(rows: int, height: int, width: int, dtype: torch.dtype) -> int:
    """Bytes between a GPU and its memory for ``rows`` images in ``dtype``, with SimCLR's blur.

    Every pixel is read once and written once, which is the floor, and so are the parameters; what
    is read again comes from the L2 cache.
    """
    radius = min(height, width) // 20
    pixels = rows * height * width * (3 + 3 * dtype.itemsize)
    return pixels + rows * FLOAT * (Column.BLUR + radius + 1)
