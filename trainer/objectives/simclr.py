"""SimCLR: two views of an image attract, all other views of the batch repel.

Chen et al. 2020, arXiv 2002.05709, algorithm 1. Shapes: N images of this process, V = 2 views,
F encoder features, D projection dimensions.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from kernels.ntxent import nt_xent
from trainer.encoders import Encoder
from trainer.heads import ProjectionHead


@dataclass(frozen=True, kw_only=True)
class SimCLRConfig:
    """NT-Xent over the global batch."""

    temperature: float = 0.1
    """Divides the cosine similarities; the paper uses 0.1 on ImageNet and 0.5 on CIFAR-10."""
    loss_implementation: Literal["auto", "reference", "blocked"] = "auto"
    """reference holds the whole logit matrix; blocked never does."""


class SimCLR(nn.Module):
    """Encoder and projection head; the forward pass makes projections, :meth:`loss` the loss."""

    views = 2

    def __init__(self, encoder: Encoder, head: ProjectionHead, config: SimCLRConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.config = config

    def forward(self, views_VNCHW: torch.Tensor) -> torch.Tensor:
        """Project ``(V*N, 3, H, W)`` view-major images to ``(V*N, D)``, not yet normalised."""
        projections: torch.Tensor = self.head(self.encoder(views_VNCHW))
        return projections

    def loss(self, projections: torch.Tensor) -> torch.Tensor:
        """NT-Xent of the whole process group (SimCLR eq. 1), a scalar equal on all ranks.

        Called outside autocast: similarities are normalised and reduced in fp32 or better. The
        gradient is scaled so that DDP's mean over ranks is that of the global mean loss.
        """
        z_VND = projections.unflatten(0, (self.views, -1))
        return nt_xent(
            z_VND, self.config.temperature, implementation=self.config.loss_implementation
        )
