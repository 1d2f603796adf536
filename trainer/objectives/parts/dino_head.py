"""DINO's head: a projection, and its cosines with many directions.

Caron et al. 2021, arXiv 2104.14294, appendix C; the last layer is normalised by rows. Shapes: R
rows, F features, K directions, D dimensions.
"""

import torch
from torch import nn

from kernels.ntxent.reference import unit_rows
from trainer.models.heads import HeadConfig, ProjectionHead


class DinoHead(nn.Module):
    """A projection head, and cosines with K directions.

    Args:
        features: of the encoder.
        config: of the projection head.
        directions: K.
    """

    def __init__(self, features: int, config: HeadConfig, directions: int) -> None:
        super().__init__()
        self.projector = ProjectionHead(features, config)
        self.directions = nn.Parameter(torch.empty(directions, config.out_dim))
        nn.init.trunc_normal_(self.directions, std=0.02)

    def forward(self, features_RF: torch.Tensor, frozen: bool = False) -> torch.Tensor:
        """``(R, K)`` in float32 or better. Frozen, the directions get a gradient of zero."""
        directions_KD: torch.Tensor = self.directions
        if frozen:  # DDP waits for a gradient of every parameter
            directions_KD = directions_KD.detach() + 0 * directions_KD
        unit_RD = unit_rows(self.projector(features_RF))
        with torch.autocast(unit_RD.device.type, enabled=False):
            return unit_RD @ unit_rows(directions_KD).T
