"""SimCLR: two views of an image attract, all other views of the batch repel.

Chen et al. 2020, arXiv 2002.05709, algorithm 1. Shapes: N images of this process, V = 2 views,
F encoder features, D projection dimensions.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import tyro

from common.bounds import check_bounds
from kernels.ntxent import Implementation, nt_xent
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig, ProjectionHead
from trainer.objectives.base import Given, Inputs, Loss, Objective, ObjectiveConfig, Outputs
from trainer.objectives.cost import LossCost, StepSizes, nt_xent_cost


@dataclass(frozen=True, kw_only=True)
class SimCLRConfig(ObjectiveConfig):
    """NT-Xent over the global batch."""

    name: tyro.conf.Suppress[Literal["simclr"]] = "simclr"
    """Which objective a saved configuration describes."""
    temperature: float = 0.1
    """Divides the cosine similarities; the paper uses 0.1 on ImageNet and 0.5 on CIFAR-10."""
    loss_implementation: Implementation = "auto"
    """reference holds the whole logit matrix; blocked and triton never do."""

    def __post_init__(self) -> None:
        check_bounds(self, "--objective.", temperature="(0, inf)")

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "SimCLR":
        """Encoder and projection head."""
        return SimCLR(encoder, ProjectionHead(encoder.feature_dim, head), self)

    def cost(self, step: StepSizes) -> LossCost:
        """NT-Xent."""
        return nt_xent_cost(step, self.loss_implementation)

    def compares(self, batch: int, num_samples: int) -> str:
        """Each view of an image with all views but itself."""
        return f"{2 * (2 * batch - 1)} logits per image"


class SimCLR(Objective):
    """Encoder and projection head; the forward pass makes projections, :meth:`loss` the loss."""

    config: SimCLRConfig

    def forward(self, inputs: Inputs) -> Outputs:
        """Project all views in one pass: ``projections`` are ``(N, V, D)``, not normalised."""
        views_VNCHW = inputs.views[0]
        z_RD = self.head(self.encoder(views_VNCHW.flatten(0, 1)))  # R = V * N rows, view-major
        return Outputs({"projections": z_RD.unflatten(0, (len(views_VNCHW), -1)).transpose(0, 1)})

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """NT-Xent of the whole process group (SimCLR eq. 1); see :meth:`Objective.loss`."""
        value, top1 = nt_xent(
            outputs.rows["projections"].transpose(0, 1),
            self.config.temperature,
            implementation=self.config.loss_implementation,
        )
        return Loss(value, {"contrastive_top1": top1})

    def embedding(self, outputs: Outputs) -> torch.Tensor:
        """The projections of all views, ``(V*N, D)``."""
        return outputs.rows["projections"].transpose(0, 1).flatten(0, 1)
