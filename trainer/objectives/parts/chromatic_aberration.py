"""Two remedies of Doersch et al. (arXiv 1505.05192) against a lens that tells where a tile lay.

Lenses shift colours towards an image's edge, green against magenta above all. Shapes: N images, T
tiles.
"""

import torch

from common.constants import constants

# The axis from green to magenta.
_AXIS = (-1.0, 2.0, -1.0)


def drop_colours(tiles_NTCHW: torch.Tensor, draws_NT: torch.Tensor) -> torch.Tensor:
    """Keep one channel of each tile, drawn by numbers in [0, 1); the others become 0, the mean."""
    channels = tiles_NTCHW.shape[2]
    kept_NT = (draws_NT * channels).long()
    is_kept_NTC = kept_NT[..., None] == torch.arange(channels, device=kept_NT.device)
    return tiles_NTCHW * is_kept_NTC[..., None, None].to(tiles_NTCHW.dtype)


def one_colour(frames_FNCHW: torch.Tensor, draws_FN: torch.Tensor) -> torch.Tensor:
    """One channel of each frame, drawn by numbers in [0, 1), in the place of all its channels
    (Lee et al. 2017, arXiv 1708.01246, section 4.1)."""
    channels = frames_FNCHW.shape[2]
    taken_FN = (draws_FN * channels).long()[..., None, None, None]
    return frames_FNCHW.take_along_dim(taken_FN, 2).expand_as(frames_FNCHW)


def project_colours(images_NCHW: torch.Tensor, std: tuple[float, ...]) -> torch.Tensor:
    """Take out of every pixel its part along the axis from green to magenta.

    Args:
        images_NCHW: RGB, normalised.
        std: what the channels were divided by.
    """
    scale_C = constants(std, images_NCHW)[:, None, None]
    axis_C = constants(_AXIS, images_NCHW)[:, None, None]
    axis_C = axis_C / axis_C.norm()
    colours_NCHW = images_NCHW * scale_C
    along_N1HW = (colours_NCHW * axis_C).sum(1, keepdim=True)
    return (colours_NCHW - along_N1HW * axis_C) / scale_C
