"""SimSiam: each view predicts the other's projection by the same networks, without gradient.

Chen & He 2021, arXiv 2011.10566. Shapes: N images of this process, V = 2 views, D projection
dimensions.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
import tyro

from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig, ProjectionHead
from trainer.objectives.base import Given, Inputs, Loss, Objective, ObjectiveConfig, Outputs
from trainer.objectives.byol import crosswise
from trainer.objectives.cost import LossCost, StepSizes, softmax_cost
from trainer.objectives.parts.predicting import make_predictor, predict_views


@dataclass(frozen=True, kw_only=True)
class SimSiamConfig(ObjectiveConfig):
    """Negative cosine of each view's prediction and the other's projection."""

    name: tyro.conf.Suppress[Literal["simsiam"]] = "simsiam"
    """Which objective a saved configuration describes."""
    predictor: HeadConfig = field(
        default_factory=lambda: HeadConfig(layers=2, hidden_dim=512, out_dim=2048, last_norm="none")
    )
    """Behind the projector; as many output dimensions as it, and fewer between."""

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "SimSiam":
        """Encoder, projector and predictor."""
        return SimSiam(encoder, ProjectionHead(encoder.feature_dim, head), self)

    def cost(self, step: StepSizes) -> LossCost:
        """Two similarities an image."""
        return softmax_cost(2 * step.local_batch, 1, step.dim)

    def compares(self, batch: int, num_samples: int) -> str:
        """An image with itself."""
        return "an image's views compared, and no images"


class SimSiam(Objective):
    """Encoder, projector and predictor, which both views pass.

    Raises:
        ConfigError: predictor and projector differ in their output dimensions.
    """

    def __init__(self, encoder: Encoder, head: ProjectionHead, config: SimSiamConfig) -> None:
        super().__init__(encoder, head, config)
        self.predictor = make_predictor(head, config.predictor)

    def forward(self, inputs: Inputs) -> Outputs:
        """``predictions`` and, without gradient, ``projections``, ``(N, 2, D)``."""
        networks = self.encoder, self.head, self.predictor
        p_NVD, z_NVD = predict_views(*networks, inputs.views[0])
        return Outputs({"predictions": p_NVD}, {"projections": z_NVD})

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """``-(cos(p1, z2) + cos(p2, z1)) / 2``: from 0 or so to -1; see :meth:`Objective.loss`."""
        similarity = crosswise(outputs.rows["predictions"], outputs.fixed["projections"])
        return Loss(-similarity, {"similarity": similarity.detach()})

    def embedding(self, outputs: Outputs) -> torch.Tensor:
        """The projections of both views, ``(2*N, D)``: all the same once it has collapsed."""
        return outputs.fixed["projections"].transpose(0, 1).flatten(0, 1)
