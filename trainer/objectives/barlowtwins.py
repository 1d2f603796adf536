"""Barlow Twins: each dimension of two views' projections correlates with itself and no other.

Zbontar et al. 2021, arXiv 2103.03230, algorithm 1. Correlations are those over the global batch.
Nothing repels, so there are no negatives, and no view has a network of its own.

Shapes: N images of this process, V = 2 views, D projection dimensions.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import tyro

from common.bounds import check_bounds
from common.collectives import rank_and_size
from kernels.ntxent.reference import statistics_dtype
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig, ProjectionHead
from trainer.objectives.base import Given, Inputs, Loss, Objective, ObjectiveConfig, Outputs
from trainer.objectives.cost import LossCost, StepSizes, correlation_cost
from trainer.objectives.parts.global_sum import global_sum

_EPSILON = 1e-5  # added to variances, as in BatchNorm


@dataclass(frozen=True, kw_only=True)
class BarlowTwinsConfig(ObjectiveConfig):
    """Cross-correlation over the global batch."""

    name: tyro.conf.Suppress[Literal["barlowtwins"]] = "barlowtwins"
    """Which objective a saved configuration describes."""
    redundancy_weight: float = 0.0051
    """Lambda, of the correlations of different dimensions."""
    scale: float = 1.0
    """Multiplies the loss. LARS makes the matrices' steps independent of it; those of biases and
    BatchNorm parameters grow with it."""

    def __post_init__(self) -> None:
        check_bounds(self, "--objective.", redundancy_weight="[0, inf)", scale="(0, inf)")

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "BarlowTwins":
        """Encoder and projector."""
        return BarlowTwins(encoder, ProjectionHead(encoder.feature_dim, head), self)

    def cost(self, step: StepSizes) -> LossCost:
        """A matrix of D x D, whose parts the processes add up."""
        return correlation_cost(step)

    def compares(self, batch: int, num_samples: int) -> str:
        """Dimensions, not images."""
        return "dimensions of the projection compared"


class BarlowTwins(Objective):
    """Encoder and projector, which both views pass."""

    config: BarlowTwinsConfig

    def forward(self, inputs: Inputs) -> Outputs:
        """``projections``, ``(N, V, D)``, not normalised."""
        # A view at a time: BatchNorm statistics are a view's own, as the views differ in kind.
        z_VND = torch.stack([self.head(self.encoder(x_NCHW)) for x_NCHW in inputs.views[0]])
        return Outputs({"projections": z_VND.transpose(0, 1)})

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """``sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2`` (equation 1), scaled; D or so by
        chance. See :meth:`Objective.loss`."""
        z_NVD = outputs.rows["projections"]
        z_NVD = z_NVD.to(statistics_dtype(z_NVD.dtype))
        images = len(z_NVD) * rank_and_size()[1]
        # The mean is taken as a constant: centred rows sum to 0, and what a change of the mean
        # changes in variances and products is a multiple of that sum.
        centred_NVD = z_NVD - global_sum(z_NVD.detach().sum(0)) / images
        variance_VD = global_sum(centred_NVD.square().sum(0)) / images
        one_ND, other_ND = centred_NVD.unbind(1)
        covariance_DD = global_sum(one_ND.T @ other_ND) / images
        # Divided after the sum, so that all processes have one gradient of it.
        one_D, other_D = (variance_VD + _EPSILON).rsqrt()
        correlation_DD = one_D[:, None] * covariance_DD * other_D
        itself_D = correlation_DD.diagonal()
        others = correlation_DD.square().fill_diagonal_(0).sum()
        value = (1 - itself_D).square().sum() + self.config.redundancy_weight * others
        return Loss(self.config.scale * value, {"correlation": itself_D.detach().mean()})

    def embedding(self, outputs: Outputs) -> torch.Tensor:
        """The projections of both views, ``(2*N, D)``."""
        return outputs.rows["projections"].transpose(0, 1).flatten(0, 1)
