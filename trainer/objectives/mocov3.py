"""MoCo v3: each view predicts the other's key, the other keys of the batch repel; no queue.

Chen, Xie & He 2021, arXiv 2104.02057, algorithm 1. Shapes: N images of this process, V = 2 views,
D projection dimensions.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
import tyro

from common.bounds import check_bounds
from common.errors import ConfigError
from kernels.ntxent import Implementation, info_nce
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig, ProjectionHead
from trainer.objectives.base import Given, Inputs, Loss, Objective, ObjectiveConfig, Outputs
from trainer.objectives.cost import LossCost, StepSizes, info_nce_cost
from trainer.objectives.parts.key_encoder import KeyEncoder, MomentumSchedule, momentum_at


@dataclass(frozen=True, kw_only=True)
class MoCoV3Config(ObjectiveConfig):
    """Symmetric InfoNCE over the keys of the global batch."""

    name: tyro.conf.Suppress[Literal["mocov3"]] = "mocov3"
    """Which objective a saved configuration describes."""
    temperature: float = 1.0
    """Divides the cosine similarities; the loss is multiplied by twice this."""
    momentum: float = 0.99
    """Of the key encoder: the share of its weights that a step keeps, in [0, 1]."""
    momentum_schedule: MomentumSchedule = "cosine"
    """cosine: from `momentum` at the first step to 1 at the end."""
    predictor: HeadConfig = field(
        default_factory=lambda: HeadConfig(
            layers=2, hidden_dim=4096, out_dim=256, last_norm="none", linear_bias="never"
        )
    )
    """Behind the projector, for queries alone; as many output dimensions as the projector."""
    loss_implementation: Implementation = "auto"
    """reference holds all logits of a process; blocked and triton never do."""

    def __post_init__(self) -> None:
        check_bounds(self, "--objective.", temperature="(0, inf)", momentum="[0, 1]")

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


class MoCoV3(Objective):
    """Encoder, projector and predictor, and moving averages of the first two.

    The encoder of the queries is handed on; ``head`` is the projector.

    Raises:
        ConfigError: predictor and projector differ in their output dimensions.
    """

    config: MoCoV3Config

    def __init__(self, encoder: Encoder, head: ProjectionHead, config: MoCoV3Config) -> None:
        super().__init__(encoder, head, config)
        if config.predictor.out_dim != head.out_dim:
            raise ConfigError(
                f"--objective.predictor.out-dim is {config.predictor.out_dim} and --head.out-dim"
                f" {head.out_dim}: predictions are compared with projections; make them equal"
            )
        self.predictor = ProjectionHead(head.out_dim, config.predictor)
        self.key = KeyEncoder(encoder, head)

    def forward(self, inputs: Inputs) -> Outputs:
        """``predictions`` and ``keys``, ``(N, 2, D)``, not normalised."""
        # A view at a time: BatchNorm statistics are a view's own, as the views differ in kind.
        views = inputs.views[0]
        predictions = [self.predictor(self.head(self.encoder(x_NCHW))) for x_NCHW in views]
        keys = [self.key(x_NCHW) for x_NCHW in views]
        rows, fixed = (torch.stack(each).transpose(0, 1) for each in (predictions, keys))
        return Outputs({"predictions": rows}, {"keys": fixed})

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

    def embedding(self, outputs: Outputs) -> torch.Tensor:
        """The predictions of both views, ``(2*N, D)``."""
        return outputs.rows["predictions"].transpose(0, 1).flatten(0, 1)

    @torch.no_grad()
    def after_step(
        self, outputs: Outputs, step: int, total_steps: int, skipped: torch.Tensor
    ) -> None:
        """Move the key encoder."""
        config = self.config
        momentum = momentum_at(config.momentum, config.momentum_schedule, step + 1, total_steps)
        self.key.follow(self.encoder, self.head, momentum, skipped)
