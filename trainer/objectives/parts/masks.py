"""Which pixels or patches of an image are hidden.

Shapes: N images, S pixels of a side, P patches.
"""

import torch
from torch.nn.functional import interpolate

_HEIGHTS = 4  # along a side: a block is about a quarter of it
BLOCK_DRAWS = _HEIGHTS**2
"""Of each image, that :func:`block_order` wants."""


def centre_mask(images: int, side: int, device: torch.device) -> torch.Tensor:
    """A square of half the side in the middle, ``(N, S, S)`` (Pathak et al., arXiv 1604.07379)."""
    line = torch.arange(side, device=device)
    inside = (line >= side // 4) & (line < side // 4 + side // 2)
    return (inside[:, None] & inside).expand(images, side, side)


def middle(images_NCSS: torch.Tensor) -> torch.Tensor:
    """What :func:`centre_mask` hides, ``(N, C, S // 2, S // 2)``."""
    side = images_NCSS.shape[-1]
    inside = slice(side // 4, side // 4 + side // 2)
    return images_NCSS[:, :, inside, inside]


def patch_mask(draws_NK: torch.Tensor, side: int, ratio: float) -> torch.Tensor:
    """The same number of each image's square patches, ``(N, S, S)`` (SimMIM, arXiv 2111.09886).

    Args:
        draws_NK: in [0, 1), one for each patch of a square grid; the smallest are hidden.
        side: S, which the grid divides.
        ratio: share of patches that are hidden, in (0, 1); at least one is, and one is not.
    """
    patches = draws_NK.shape[1]
    grid = round(patches**0.5)
    hidden = min(max(round(ratio * patches), 1), patches - 1)
    is_hidden_NK = draws_NK.argsort(1).argsort(1) < hidden
    scale = side // grid
    mask = is_hidden_NK.view(-1, grid, grid)
    return mask.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def block_order(draws_NK: torch.Tensor, side: int) -> torch.Tensor:
    """Numbers of an image's patches in the order in which they are hidden, int64 ``(N, P)``: the
    first ones make a block or a few, as masks of image models do (BEiT, arXiv 2106.08254).

    What is hidden first is where a smooth surface of random heights is lowest, so that any number
    of patches can be.

    Args:
        draws_NK: in [0, 1), :data:`BLOCK_DRAWS` of each image.
        side: of the grid of P patches.
    """
    heights_N1gg = draws_NK.unflatten(1, (1, _HEIGHTS, _HEIGHTS))
    surface = interpolate(heights_N1gg, (side, side), mode="bicubic", align_corners=True)
    return surface.flatten(1).argsort(dim=1, stable=True)
