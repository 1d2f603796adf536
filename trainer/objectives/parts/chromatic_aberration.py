"""Two remedies of Doersch et al. (arXiv 1505.05192) against a lens that tells where a tile lay.

Lenses shift colours towards an image's edge, green against magenta above all. Shapes: N images, T
tiles.
"""

import torch

# The axis from green to magenta.
_AXIS = (-1.0, 2.0, -1.0)


def drop_colours(tiles_NTCHW: torch.Tensor, draws_NT: torch.Tensor) -> torch.Tensor:
    """Keep one channel of each tile, drawn by numbers in [0, 1); the others become 0, the mean."""
    channels = tiles_NTCHW.shape[2]
    kept_NT = (draws_NT * channels).long()
    is_kept_NTC = kept_NT[..., None] == torch.arange(channels, device=kept_NT.device)
    return tiles_NTCHW * is_kept_NTC[..., None, None].to(tiles_NTCHW.dtype)


def project_colours(images_NCHW: torch.Tensor, std: tuple[float, ...]) -> torch.Tensor:
    """Take out of every pixel its part along the axis from green to magenta.

    Args:
        images_NCHW: RGB, normalised.
        std: what the channels were divided by.
    """
    scale_C = images_NCHW.new_tensor(std)[:, None, None]
    axis_C = images_NCHW.new_tensor(_AXIS)[:, None, None]
    axis_C = axis_C / axis_C.norm()
    colours_NCHW = images_NCHW * scale_C
    along_N1HW = (colours_NCHW * axis_C).sum(1, keepdim=True)
    return (colours_NCHW - along_N1HW * axis_C) / scale_C
