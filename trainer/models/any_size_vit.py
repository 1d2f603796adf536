"""torchvision's vision transformer for images of other sizes than the one that it was built for.

Its positions are those of one grid of patches; for another grid they are interpolated, as Caron et
al. 2021 (DINO, arXiv 2104.14294) do for small views. Weights and their names stay the same, and so
does every bit at the size that it was built for.

Shapes: N images, T tokens (the class's first), D dimensions, G x G patches, g x g of another size.
"""

import math

import torch
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import Encoder

from common.errors import ConfigError

POSITIONS = "encoder.pos_embedding"
"""Their name in torchvision's."""

_SHARPNESS = -0.75  # of the bicubic kernel, as torch's interpolate has it


def take_any_size(vit: VisionTransformer) -> None:
    """Let a transformer take square images of any size that its patches divide, in place."""
    vit.__class__ = AnySizeViT
    vit.encoder.__class__ = _AnySizeEncoder


class AnySizeViT(VisionTransformer):
    """Reads the patches of any image that they divide.

    Raises:
        ConfigError: of another.
    """

    def _process_input(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:]
        if height != width or height % self.patch_size:
            raise ConfigError(
                f"images of {height} x {width} pixels: this transformer takes square ones of a side"
                f" that its patches of {self.patch_size} divide"
            )
        return self.conv_proj(x).flatten(2).permute(0, 2, 1)


class _AnySizeEncoder(Encoder):
    def forward(self, tokens_NTD: torch.Tensor) -> torch.Tensor:
        positions_1TD: torch.Tensor = self.pos_embedding
        if tokens_NTD.shape[1] != positions_1TD.shape[1]:
            side = math.isqrt(tokens_NTD.shape[1] - 1)
            positions_1TD = resized_positions(positions_1TD, side)
        encoded: torch.Tensor = self.ln(self.layers(self.dropout(tokens_NTD + positions_1TD)))
        return encoded


def resized_positions(positions_1TD: torch.Tensor, side: int) -> torch.Tensor:
    """Positions ``(1, 1 + g g, D)`` of another grid; the class's stays.

    By products of matrices, for a backward pass of torch's interpolation adds up in another order
    each time on a GPU.

    Args:
        positions_1TD: of the class and of G x G patches.
        side: g.
    """
    of_class, of_patches = positions_1TD[:, :1], positions_1TD[0, 1:]
    before = math.isqrt(len(of_patches))
    with torch.autocast(positions_1TD.device.type, enabled=False):
        weights_gG = _bicubic(before, side, positions_1TD)
        grid_GGD = of_patches.unflatten(0, (before, before))
        rows_gGD = torch.einsum("gG,GHD->gHD", weights_gG, grid_GGD)
        grid_ggD = torch.einsum("hH,gHD->ghD", weights_gG, rows_gGD)
    return torch.cat([of_class, grid_ggD.flatten(0, 1)[None]], 1)


def _bicubic(before: int, after: int, like: torch.Tensor) -> torch.Tensor:
    """``(after, before)``: what a new place takes of each old one; beyond an edge is the edge."""
    places_g = torch.arange(after, device=like.device, dtype=like.dtype)
    centres_g = (places_g + 0.5) * (before / after) - 0.5
    first_g = centres_g.floor()
    near_g4 = first_g[:, None] + torch.arange(-1, 3, device=like.device, dtype=like.dtype)
    far_g4 = (centres_g[:, None] - near_g4).abs()
    a = _SHARPNESS
    within = ((a + 2) * far_g4 - (a + 3)) * far_g4**2 + 1
    beyond = ((far_g4 - 5) * far_g4 + 8) * far_g4 * a - 4 * a
    weights_g4 = torch.where(far_g4 <= 1, within, beyond)
    olds_G = torch.arange(before, device=like.device, dtype=like.dtype)
    is_near_g4G = near_g4.clamp(0, before - 1)[..., None] == olds_G
    return (weights_g4[..., None] * is_near_g4G.to(like.dtype)).sum(1)
