"""MoCo v3: each view predicts the other's key, the other keys of the batch repel; no queue.

Chen, Xie & He 2021, arXiv 2104.02057, algorithm 1. Shapes: N images of this process, V = 2 views,
D projection dimensions.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import tyro

from common.bounds import check_bounds
from kernels.ntxent import Implementation, info_nce
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig, ProjectionHead
from trainer.objectives.base import Given, Loss, Outputs
from trainer.objectives.cost import LossCost, StepSizes, info_nce_cost
from trainer.objectives.parts.predicting import PredictingConfig, PredictingObjective


@dataclass(frozen=True, kw_only=True)
class MoCoV3Config(PredictingConfig):
    """Symmetric InfoNCE over the keys of the global batch."""

    name: tyro.conf.Suppress[Literal["mocov3"]] = "mocov3"
    """Which objective a saved configuration describes."""
    temperature: float = 1.0
    """Divides the cosine similarities; the loss is multiplied by twice this."""
    loss_implementation: Implementation = "auto"
    """reference holds all logits of a process; blocked and triton never do."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, "--objective.", temperature="(0, inf)")

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "MoCoV3":
        """Encoder, projector and predictor, and averages of the first two."""
        return MoCoV3(encoder, ProjectionHead(encoder.feature_dim, head), self)

    def cost(self, step: StepSizes) -> LossCost:
        """InfoNCE, once for each view."""
        columns = step.local_batch * step.world_size
        cost = info_nce_cost(step.local_batch, columns, step.dim, self.loss_implementation)
        return cost._replace(times=2)

    def compares(self, batch: int, num_samples: int) -> str:
        """Two queries with a batch of keys."""
        return f"{2 * batch} logits per image"


class MoCoV3(PredictingObjective):
    """Encoder, projector and predictor, and moving averages of the first two."""

    config: MoCoV3Config

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """``2 T (ctr(q1, k2) + ctr(q2, k1))``; see :meth:`Objective.loss`."""
        query1_ND, query2_ND = outputs.rows["predictions"].unbind(1)
        key1_ND, key2_ND = outputs.fixed["keys"].unbind(1)
        contrast = partial(
            info_nce,
            temperature=self.config.temperature,
            implementation=self.config.loss_implementation,
        )
        one, top1 = contrast(query1_ND, key2_ND)
        other, other_top1 = contrast(query2_ND, key1_ND)
        # 2 T keeps the gradient's size when T changes (the paper's algorithm 1).
        value = 2 * self.config.temperature * (one + other)
        return Loss(value, {"contrastive_top1": (top1 + other_top1) / 2})
