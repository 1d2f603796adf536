"""A grid of patches, what stands above each of them, and what it says of those below.

van den Oord et al. 2018 (arXiv 1807.03748); Henaff et al. 2019 (arXiv 1905.09272).

Shapes: N images, G patches of a grid's side, p pixels of a patch's, C channels, D dimensions.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import one_hot, pad

from common.errors import ConfigError
from kernels.ntxent.reference import unit_rows

_NARROW = 256  # channels inside a residual block


def grid_of(side: int, patch: int) -> int:
    """G, of images of ``side`` pixels and patches that begin half of their own further each."""
    return 2 * side // patch - 1


def check_patches(side: int, patch: int, offsets: Sequence[int]) -> None:
    """Refuse sizes that do not go together.

    Raises:
        ConfigError: half patches do not divide the side; no row has another so far below.
    """
    if not offsets:
        raise ConfigError("--objective.nearest is beyond --objective.furthest")
    furthest = offsets[-1]
    if patch % 2 or 2 * side % patch or grid_of(side, patch) <= furthest:
        raise ConfigError(
            f"--crop.size {side} must be a multiple of half of --objective.patch {patch}, which is"
            f" even, and hold more than --objective.furthest {furthest} rows of them, each half a"
            f" patch below another; --objective.patch {side // 4} makes 7 rows"
        )


def cut_patches(images_N3SS: torch.Tensor, patch: int) -> torch.Tensor:
    """Patches that overlap by half, in reading order, ``(N, G * G, 3, p, p)``."""
    stride = patch // 2
    grid = images_N3SS.unfold(2, patch, stride).unfold(3, patch, stride)
    return grid.flatten(2, 3).transpose(1, 2)


class Context(nn.Module):
    """What each place of a grid knows of its own row and those above, ``(N, C, G, G)`` of such.

    Args:
        channels: C.
        depth: residual blocks; each sees one row more.
    """

    def __init__(self, channels: int, depth: int = 5) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Masked(channels) for _ in range(depth))

    def forward(self, z_NCGG: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        for block in self.blocks:
            z_NCGG = z_NCGG + block(z_NCGG)
        return z_NCGG


class _Masked(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = min(_NARROW, channels)
        self.into = nn.Conv2d(channels, narrow, 1)
        self.beside = nn.Conv2d(narrow, narrow, (1, 3), padding=(0, 1))
        self.above = nn.Conv2d(narrow, narrow, (2, 1))
        self.out = nn.Conv2d(narrow, channels, 1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        z = self.beside(self.into(z).relu()).relu()
        z = self.above(pad(z, (0, 0, 1, 0))).relu()  # a row on top: none below is seen
        out: torch.Tensor = self.out(z)
        return out


class Predictions(nn.Module):
    """From contexts to what stands so many rows below, from each of several sides.

    Args:
        channels: C.
        dim: D.
        grid: G.
        offsets: rows below, one network each.
        sides: of the grid, from which it is read downwards: 1 to 4 quarter turns.
    """

    meant: torch.Tensor
    """Which patch each prediction is of, in reading order; int64, (Q,)."""

    def __init__(
        self, channels: int, dim: int, grid: int, offsets: Sequence[int], sides: int
    ) -> None:
        super().__init__()
        self.offsets, self.sides = offsets, sides
        self.context = Context(channels)
        count = sides * len(offsets)
        self.layers = nn.ModuleList(nn.Conv2d(channels, dim, 1) for _ in range(count))
        places = torch.arange(grid * grid).view(1, grid, grid)
        meant = [
            places.rot90(side, (1, 2))[:, offset:].flatten()
            for side in range(sides)
            for offset in offsets
        ]
        self.register_buffer("meant", torch.cat(meant), persistent=False)

    def forward(self, z_NCGG: torch.Tensor) -> torch.Tensor:
        """``(N, Q, D)``, one for each of :attr:`meant`."""
        layers, found = iter(self.layers), []
        for side in range(self.sides):
            context_NCGG = self.context(z_NCGG.rot90(side, (2, 3)))
            for offset in self.offsets:
                said_NDgG = next(layers)(context_NCGG[:, :, :-offset])
                found.append(said_NDgG.flatten(2).transpose(1, 2))
        return torch.cat(found, 1)

    def cosines(self, predictions_NQD: torch.Tensor, patches_NTD: torch.Tensor) -> torch.Tensor:
        """Of each prediction and the patch that is meant, ``(N, Q)``."""
        units_NTD = unit_rows(patches_NTD)
        # A product, whose gradient has one order where that of an index has none.
        chosen_QT = one_hot(self.meant, units_NTD.shape[1]).to(units_NTD.dtype)
        return (unit_rows(predictions_NQD) * (chosen_QT @ units_NTD)).sum(2)
