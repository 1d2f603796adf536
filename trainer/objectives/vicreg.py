"""VICReg: views agree, every dimension varies over images, and no two vary together.

Bardes, Ponce & LeCun 2022, arXiv 2105.04906, algorithm 1. Variances and covariances are those over
the global batch, and their gradient reaches the images of all processes. Shapes: N images of this
process, V = 2 views, D projection dimensions.
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
from trainer.objectives.barlowtwins import BarlowTwins
from trainer.objectives.base import Given, Loss, ObjectiveConfig, Outputs
from trainer.objectives.cost import LossCost, StepSizes, correlation_cost
from trainer.objectives.parts.global_mean import global_mean
from trainer.objectives.parts.global_sum import global_sum

_EPSILON = 1e-4  # added to variances before their root


@dataclass(frozen=True, kw_only=True)
class VICRegConfig(ObjectiveConfig):
    """Invariance, variance and covariance over the global batch."""

    name: tyro.conf.Suppress[Literal["vicreg"]] = "vicreg"
    """Which objective a saved configuration describes."""
    invariance: float = 25.0
    """Weight of the views' mean squared distance."""
    variance: float = 25.0
    """Weight of what deviations lack to 1."""
    covariance: float = 1.0
    """Weight of the squared covariances of different dimensions."""

    def __post_init__(self) -> None:
        weights = dict.fromkeys(("invariance", "variance", "covariance"), "[0, inf)")
        check_bounds(self, "--objective.", **weights)

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "VICReg":
        """Encoder and projector."""
        return VICReg(encoder, ProjectionHead(encoder.feature_dim, head), self)

    def cost(self, step: StepSizes) -> LossCost:
        """Two matrices of D x D, one a view."""
        return correlation_cost(step)._replace(times=2)

    def compares(self, batch: int, num_samples: int) -> str:
        """Dimensions, not images."""
        return "dimensions of the projection compared"


class VICReg(BarlowTwins):
    """Encoder and projector, which both views pass one after the other."""

    config: VICRegConfig  # type: ignore[assignment]

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """The weighted sum of three (equation 6; variance is the mean of both views', half of what
        stands there, as in the authors' code). Where nothing is told apart variances are all. See
        :meth:`Objective.loss`."""
        config, z_NVD = self.config, outputs.rows["projections"]
        z_NVD = z_NVD.to(statistics_dtype(z_NVD.dtype))
        images = len(z_NVD) * rank_and_size()[1]
        one_ND, other_ND = z_NVD.unbind(1)
        apart = global_mean((one_ND - other_ND).square().mean(1, keepdim=True))[0]
        # The mean is a constant: centred rows sum to 0, and so does what its change would change.
        centred_NVD = z_NVD - global_sum(z_NVD.detach().sum(0)) / images
        covariance_VDD = torch.einsum("nvd,nve->vde", centred_NVD, centred_NVD)
        covariance_VDD = global_sum(covariance_VDD) / (images - 1)
        variance_VD = covariance_VDD.diagonal(dim1=1, dim2=2)
        deviation_VD = (variance_VD + _EPSILON).sqrt()
        lacking = (1 - deviation_VD).relu().mean()
        together = (covariance_VDD.square().sum() - variance_VD.square().sum()) / z_NVD.shape[2]
        value = config.invariance * apart + config.variance * lacking
        value = value + config.covariance * together
        return Loss(value, {"deviation": deviation_VD.detach().mean()})
