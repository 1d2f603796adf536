"""Which pixels of an image are hidden: True there. Shapes: N images, S pixels of a side."""

import torch


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
