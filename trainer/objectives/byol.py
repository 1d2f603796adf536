"""BYOL: each view predicts the other's projection by a moving average of the networks.

Grill et al. 2020, arXiv 2006.07733. Nothing repels: what keeps all images from becoming one point
is the predictor, and the copy, which moves slowly and takes no gradient. Shapes: N images of this
process, V = 2 views, D projection dimensions.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from torch.nn.functional import cosine_similarity

from kernels.ntxent.reference import statistics_dtype
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig, ProjectionHead
from trainer.objectives.base import Given, Loss, Outputs
from trainer.objectives.cost import LossCost, StepSizes, softmax_cost
from trainer.objectives.parts.global_mean import global_mean
from trainer.objectives.parts.predicting import PredictingConfig, PredictingObjective


@dataclass(frozen=True, kw_only=True)
class BYOLConfig(PredictingConfig):
    """Squared distance of unit vectors, of each view's prediction to the other's key."""

    name: tyro.conf.Suppress[Literal["byol"]] = "byol"
    """Which objective a saved configuration describes."""

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "BYOL":
        """Encoder, projector and predictor, and averages of the first two."""
        return BYOL(encoder, ProjectionHead(encoder.feature_dim, head), self)

    def cost(self, step: StepSizes) -> LossCost:
        """Two similarities an image."""
        return softmax_cost(2 * step.local_batch, 1, step.dim)

    def compares(self, batch: int, num_samples: int) -> str:
        """An image with itself."""
        return "an image's views compared, and no images"


class BYOL(PredictingObjective):
    """Encoder, projector and predictor, and moving averages of the first two."""

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """``2 - 2 cos(p1, k2) + 2 - 2 cos(p2, k1)``, 4 or so by chance; see
        :meth:`Objective.loss`."""
        similarity = crosswise(outputs.rows["predictions"], outputs.fixed["keys"])
        return Loss(4 - 4 * similarity, {"similarity": similarity.detach()})


def crosswise(predictions_NVD: torch.Tensor, targets_NVD: torch.Tensor) -> torch.Tensor:
    """Mean cosine over all images of the global batch of each view's prediction with the other
    view's target, in float32 or better. A collective."""
    dtype = statistics_dtype(predictions_NVD.dtype)
    others_NVD = targets_NVD.flip(1).to(dtype)
    similarities_NV = cosine_similarity(predictions_NVD.to(dtype), others_NVD, dim=2)
    return global_mean(similarities_NV.mean(1, keepdim=True))[0]
