"""DINO's head: a projection, and its cosines with many directions.

Caron et al. 2021, arXiv 2104.14294, appendix C. Shapes: R rows, F features, K directions.
"""

import torch
from torch import nn

from kernels.ntxent.reference import unit_rows
from trainer.models.heads import HeadConfig, ProjectionHead
from trainer.objectives.parts.prototypes import Prototypes


class DinoHead(nn.Module):
    """A projection head, and cosines with K directions.

    Args:
        features: F, of the encoder.
        config: of the projection head.
        directions: K.
    """

    def __init__(self, features: int, config: HeadConfig, directions: int) -> None:
        super().__init__()
        self.projector = ProjectionHead(features, config)
        self.directions = Prototypes(directions, config.out_dim)

    def forward(self, features_RF: torch.Tensor, frozen: bool = False) -> torch.Tensor:
        """``(R, K)``. Frozen, the directions get a gradient of zero."""
        cosines: torch.Tensor = self.directions(unit_rows(self.projector(features_RF)), frozen)
        return cosines
