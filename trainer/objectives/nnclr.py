"""NNCLR: each view predicts the nearest neighbour of the other, among images of past batches.

Dwibedi et al. 2021, arXiv 2104.14548. Shapes: N images of this process, V = 2 views, Q rows of the
queue, D projection dimensions.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
import tyro

from common.bounds import check_bounds
from common.collectives import gather_rows, own_slice
from kernels.ntxent import two_sided
from kernels.ntxent.reference import unit_rows
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig, ProjectionHead
from trainer.objectives.base import Given, Inputs, Loss, Objective, ObjectiveConfig, Outputs
from trainer.objectives.cost import LossCost, StepSizes, two_sided_cost
from trainer.objectives.parts.global_mean import global_mean
from trainer.objectives.parts.k_means import nearest
from trainer.objectives.parts.key_queue import KeyQueue
from trainer.objectives.parts.predicting import make_predictor, predict_views


@dataclass(frozen=True, kw_only=True)
class NNCLRConfig(ObjectiveConfig):
    """InfoNCE of neighbours with the predictions of the global batch; the defaults are the paper's
    for ImageNet."""

    name: tyro.conf.Suppress[Literal["nnclr"]] = "nnclr"
    """Which objective a saved configuration describes."""
    temperature: float = 0.1
    """Divides the cosine similarities."""
    queue: int = 98304
    """Q: images of past batches, of which one stands for a view."""
    predictor: HeadConfig = field(
        default_factory=lambda: HeadConfig(layers=2, hidden_dim=4096, out_dim=256, last_norm="none")
    )
    """Behind the projector; as many output dimensions as it."""

    def __post_init__(self) -> None:
        check_bounds(self, "--objective.", temperature="(0, inf)", queue="[1, 1e9]")

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "NNCLR":
        """Encoder, projector, predictor and queue."""
        return NNCLR(encoder, ProjectionHead(encoder.feature_dim, head), self)

    def cost(self, step: StepSizes) -> LossCost:
        """InfoNCE with predictions that take a gradient, once for each view."""
        columns = step.local_batch * step.world_size
        return two_sided_cost(step.local_batch, columns, step.dim)._replace(times=2)

    def compares(self, batch: int, num_samples: int) -> str:
        """Two views with the queue, and their neighbours with a batch."""
        return f"{2 * self.queue} neighbours and {2 * batch} logits per image"


class NNCLR(Objective):
    """Encoder, projector, predictor, and a queue of projections.

    Raises:
        ConfigError: predictor and projector differ in their output dimensions.
    """

    config: NNCLRConfig

    def __init__(self, encoder: Encoder, head: ProjectionHead, config: NNCLRConfig) -> None:
        super().__init__(encoder, head, config)
        self.predictor = make_predictor(head, config.predictor)
        self.queue = KeyQueue(config.queue, head.out_dim)

    def forward(self, inputs: Inputs) -> Outputs:
        """``predictions`` and, without gradient, unit ``projections``, ``(N, 2, D)``."""
        networks = self.encoder, self.head, self.predictor
        p_NVD, z_NVD = predict_views(*networks, inputs.views[0])
        return Outputs({"predictions": p_NVD}, {"projections": unit_rows(z_NVD)})

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """Mean of both views of InfoNCE, ln N by chance: which prediction of the batch is that of
        the image whose neighbour this is? See :meth:`Objective.loss`."""
        own = own_slice(len(outputs.rows["predictions"]))
        found = []
        for view in (0, 1):
            unit_ND = outputs.fixed["projections"][:, view].to(self.queue.rows.dtype)
            predicted_ND = outputs.rows["predictions"][:, 1 - view]
            neighbour_ND = self.queue.rows[nearest(unit_ND, self.queue.rows)]
            neighbour_ND = neighbour_ND.to(predicted_ND.dtype)
            place_N = torch.arange(own.start, own.stop, device=unit_ND.device)
            value, top1 = two_sided(neighbour_ND, predicted_ND, place_N, self.config.temperature)
            cosine_N = (unit_rows(neighbour_ND) * unit_rows(predicted_ND)).sum(1)
            (positive,) = global_mean(cosine_N[:, None] / self.config.temperature)
            found.append(torch.stack([value - positive, top1]))
        value, top1 = torch.stack(found).mean(0)
        return Loss(value, {"contrastive_top1": top1.detach()})

    def embedding(self, outputs: Outputs) -> torch.Tensor:
        """The projections of both views, ``(2*N, D)``."""
        return outputs.fixed["projections"].transpose(0, 1).flatten(0, 1)

    def after_step(
        self, outputs: Outputs, step: int, total_steps: int, skipped: torch.Tensor
    ) -> None:
        """Remember the first view's projections."""
        self.queue.push(gather_rows(outputs.fixed["projections"][:, 0].contiguous()), skipped)
