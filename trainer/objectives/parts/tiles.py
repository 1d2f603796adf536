"""An image as a 3 x 3 puzzle: one tile of each cell, with room between them.

Neighbouring tiles that touched would give themselves away by edges that go on, so a tile is smaller
than its cell and lies anywhere in it. What the networks of Noroozi & Favaro (arXiv 1603.09246) and
Doersch et al. (arXiv 1505.05192) solve.

Shapes: N images, T = 9 tiles in reading order, t pixels of a tile's side.
"""

import torch
from torch import nn

from common.errors import ConfigError

GRID = 3
TILES = GRID * GRID


def check_tiles(side: int, tile: int, setting: str = "--crop.size") -> None:
    """Refuse sizes that do not go together.

    Args:
        side: of the image, pixels.
        tile: of a tile.
        setting: that gives the image's.

    Raises:
        ConfigError: the image has no 3 x 3 cells, or a tile is larger than one.
    """
    if side % GRID:
        raise ConfigError(
            f"{setting} {side} does not divide into {GRID} x {GRID} cells; nearest that do:"
            f" {side - side % GRID} and {side - side % GRID + GRID}"
        )
    if tile > side // GRID:
        raise ConfigError(
            f"--objective.tile {tile} is more than the {side // GRID} pixels of a cell of"
            f" {setting} {side}; about three quarters of a cell leave room between tiles"
        )


def cut_tiles(images_NCHW: torch.Tensor, tile: int, draws_ND: torch.Tensor) -> torch.Tensor:
    """The tiles of every image, ``(N, T, C, t, t)``.

    Args:
        images_NCHW: square, of a side that 3 divides.
        tile: t.
        draws_ND: ``(N, 2 T)`` in [0, 1): where each tile lies in its cell, down and across, in any
            of its ``cell - t + 1`` places.
    """
    images, channels, side, _ = images_NCHW.shape
    cell = side // GRID
    cells = images_NCHW.reshape(images, channels, GRID, cell, GRID, cell)
    cells_NTCHW = cells.permute(0, 2, 4, 1, 3, 5).reshape(images, TILES, channels, cell, cell)
    corners_NT2 = (draws_ND * (cell - tile + 1)).long().unflatten(1, (TILES, 2))
    lines_NT2t = corners_NT2[..., None] + torch.arange(tile, device=images_NCHW.device)
    down, across = lines_NT2t.unbind(2)
    rows = cells_NTCHW.take_along_dim(down[:, :, None, :, None], 3)
    return rows.take_along_dim(across[:, :, None, None, :], 4)


def joined(tiles_NTCHW: torch.Tensor) -> torch.Tensor:
    """Tiles side by side, ``(N, C, 3 t, 3 t)``."""
    rows = tiles_NTCHW.unflatten(1, (GRID, GRID)).permute(0, 3, 1, 4, 2, 5)
    return rows.flatten(4, 5).flatten(2, 3)


def standardised(tiles_NTCHW: torch.Tensor) -> torch.Tensor:
    """Every tile with mean 0 and deviation 1, for neighbours are alike in brightness and contrast.

    A flat tile, whose deviation is 0, becomes 0.
    """
    mean = tiles_NTCHW.mean((2, 3, 4), keepdim=True)
    deviation = tiles_NTCHW.std((2, 3, 4), keepdim=True, correction=0)
    least = tiles_NTCHW[0, 0].numel() ** -0.5
    return (tiles_NTCHW - mean) / deviation.clamp(min=least)


class TileEncoder(nn.Module):
    """Features of each tile by one encoder, then by a layer of their own: ``(N, T, W)``.

    Args:
        features: of the encoder.
        width: W.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(features, width, bias=False)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, encoder: nn.Module, tiles_NTCHW: torch.Tensor) -> torch.Tensor:
        """Tiles of all images pass together: BatchNorm sees no order among them."""
        tiles = tiles_NTCHW.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        found = self.norm(self.layer(encoder(tiles))).relu()
        return found.unflatten(0, (-1, tiles_NTCHW.shape[1]))
