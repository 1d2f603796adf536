"""One view predicts the other as a slowly moving copy of the networks sees it.

Grill et al. 2020 (BYOL, arXiv 2006.07733); MoCo v3 (arXiv 2104.02057) is built alike. Shapes: N
images of this process, V = 2 views, D projection dimensions.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from common.bounds import check_bounds
from common.errors import ConfigError
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig, ProjectionHead
from trainer.objectives.base import Inputs, Objective, ObjectiveConfig, Outputs
from trainer.objectives.parts.key_encoder import KeyEncoder, MomentumSchedule, momentum_at


@dataclass(frozen=True, kw_only=True)
class PredictingConfig(ObjectiveConfig):
    """Settings of the predictor and of the copy."""

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

    def __post_init__(self) -> None:
        check_bounds(self, "--objective.", momentum="[0, 1]")


def make_predictor(head: ProjectionHead, config: HeadConfig) -> ProjectionHead:
    """From projections to predictions of projections.

    Raises:
        ConfigError: it has another number of output dimensions.
    """
    if config.out_dim != head.out_dim:
        raise ConfigError(
            f"--objective.predictor.out-dim is {config.out_dim} and --head.out-dim"
            f" {head.out_dim}: predictions are compared with projections; make them equal"
        )
    return ProjectionHead(head.out_dim, config)


def predict_views(
    encoder: nn.Module, head: nn.Module, predictor: nn.Module, views_VNCHW: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions and, without gradient, projections of all views, ``(N, V, D)`` each. A view at a
    time: BatchNorm statistics are a view's own."""
    z_VND = torch.stack([head(encoder(x_NCHW)) for x_NCHW in views_VNCHW])
    p_VND = torch.stack([predictor(z_ND) for z_ND in z_VND])
    return p_VND.transpose(0, 1), z_VND.detach().transpose(0, 1)


class PredictingObjective(Objective):
    """Encoder, projector and predictor, and moving averages of the first two.

    The encoder of the queries is handed on; ``head`` is the projector.

    Raises:
        ConfigError: predictor and projector differ in their output dimensions.
    """

    config: PredictingConfig

    def __init__(self, encoder: Encoder, head: ProjectionHead, config: PredictingConfig) -> None:
        super().__init__(encoder, head, config)
        self.predictor = make_predictor(head, config.predictor)
        self.key = KeyEncoder(encoder, head)

    def forward(self, inputs: Inputs) -> Outputs:
        """``predictions`` and ``keys``, ``(N, 2, D)``, not normalised."""
        # A view at a time: BatchNorm statistics are a view's own, as the views differ in kind.
        views = inputs.views[0]
        predictions = [self.predictor(self.head(self.encoder(x_NCHW))) for x_NCHW in views]
        keys = [self.key(x_NCHW) for x_NCHW in views]
        rows, fixed = (torch.stack(each).transpose(0, 1) for each in (predictions, keys))
        return Outputs({"predictions": rows}, {"keys": fixed})

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
