"""DINO: every view of an image predicts what an average of the networks says of its large views.

Caron et al. 2021, arXiv 2104.14294, algorithm 1. What the average says is a distribution over K
directions: centred by what it says of all images, so that no direction takes all, and sharpened,
so that not all take the same. Nothing repels.

Shapes: N images of this process, V views of all sizes, K directions, D dimensions.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import tyro

from common.bounds import check_bounds
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig
from trainer.objectives.base import Given, Inputs, Loss, Objective, Outputs
from trainer.objectives.cost import LossCost, StepSizes, softmax_cost
from trainer.objectives.parts.centre import move_centre
from trainer.objectives.parts.dino_head import DinoHead
from trainer.objectives.parts.global_mean import global_mean
from trainer.objectives.parts.key_encoder import KeyEncoder, MomentumSchedule, momentum_at
from trainer.objectives.parts.multi_crop import LARGE, MultiCropConfig, project_all


@dataclass(frozen=True, kw_only=True)
class TaughtConfig(MultiCropConfig):
    """Cross-entropy of sharpened and centred distributions; the defaults are the paper's."""

    directions: int = 65536
    """K, of the last layer, behind --head.*."""
    temperature: float = 0.1
    """Of the predictions."""
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    """Of what they are to predict: at first, and after a warm-up, which higher ones need."""
    teacher_warmup_steps: int = 37500
    """First steps of a run, in which that temperature goes from one to the other: 30 epochs of
    ImageNet in batches of 1024."""
    momentum: float = 0.996
    """Of the averages: the share that a step keeps, in [0, 1]."""
    momentum_schedule: MomentumSchedule = "cosine"
    """cosine: from `momentum` at the first step to 1 at the end."""
    centre_momentum: float = 0.9
    """Of the mean that is taken off what is to be predicted."""
    frozen_steps: int = 1251
    """First steps of a run, in which the last layer stays as it is: about one epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        shares, steps = dict.fromkeys(("momentum", "centre_momentum"), "[0, 1]"), "[0, 1e15]"
        check_bounds(
            self,
            "--objective.",
            directions="[2, 1e7]",
            temperature="(0, inf)",
            teacher_temperature="(0, inf)",
            teacher_warmup_steps=steps,
            frozen_steps=steps,
            **shares,
        )

    def cost(self, step: StepSizes) -> LossCost:
        """Cross-entropy of every view with that of both large ones."""
        rows = (LARGE + self.small_views) * step.local_batch
        return softmax_cost(rows, self.directions, 1)

    def compares(self, batch: int, num_samples: int) -> str:
        """Every view with the directions."""
        return f"{(LARGE + self.small_views) * self.directions} logits per image"


@dataclass(frozen=True, kw_only=True)
class DINOConfig(TaughtConfig):
    """What views say of an image."""

    name: tyro.conf.Suppress[Literal["dino"]] = "dino"
    """Which objective a saved configuration describes."""

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "DINO":
        """Encoder, head and last layer, and averages of them."""
        return DINO(encoder, DinoHead(encoder.feature_dim, head, self.directions), self)


class DINO(Objective):
    """Encoder and head, and moving averages of them.

    What learns is handed on, as everywhere here; the authors hand on the average.
    """

    config: TaughtConfig
    centre: torch.Tensor

    def __init__(self, encoder: Encoder, head: DinoHead, config: TaughtConfig) -> None:
        super().__init__(encoder, None, config)
        self.student = head
        self.key = KeyEncoder(encoder, head)
        self.register_buffer("centre", torch.zeros(config.directions))

    def forward(self, inputs: Inputs) -> Outputs:
        """``cosines`` of all views with the directions, ``(N, V, K)``, and ``taught``, what the
        averages give for the large ones, ``(N, 2, K)``."""
        frozen = inputs.step < self.config.frozen_steps
        head = partial(self.student, frozen=frozen)
        cosines_NVK = project_all(self.encoder, head, inputs.views)
        # A pass for both: BatchNorm, where there is any, takes them together here as there.
        taught_RK = self.key(inputs.views[0].flatten(0, 1))
        taught_NLK = taught_RK.unflatten(0, (LARGE, -1)).transpose(0, 1)
        return Outputs({"cosines": cosines_NVK}, {"taught": taught_NLK})

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """Mean cross-entropy of what both large views are taught with all other views' predictions,
        ln K by chance; see :meth:`Objective.loss`."""
        cosines_NVK, taught_NLK = outputs.rows["cosines"], outputs.fixed["taught"]
        logs_NVK = (cosines_NVK / self.config.temperature).log_softmax(2)
        taught_NLK = taught_NLK.to(logs_NVK.dtype) - self.centre.to(logs_NVK.dtype)
        target_NLK = (taught_NLK / self._sharpness(step)).softmax(2)
        losses = [
            -(target_NLK[:, large] * logs_NVK[:, view]).sum(1)
            for large in range(LARGE)
            for view in range(logs_NVK.shape[1])
            if view != large
        ]
        entropy_N = -(target_NLK * target_NLK.clamp(min=1e-30).log()).sum(2).mean(1)
        value, entropy = global_mean(torch.stack([torch.stack(losses).mean(0), entropy_N], 1))
        return Loss(value, {"entropy": entropy.detach()})

    def _sharpness(self, step: int) -> float:
        first, last = self.config.teacher_temperature
        return first + (last - first) * min(1.0, step / max(1, self.config.teacher_warmup_steps))

    def embedding(self, outputs: Outputs) -> torch.Tensor:
        """What the large views are taught, ``(2*N, K)``."""
        return outputs.fixed["taught"].transpose(0, 1).flatten(0, 1)

    @torch.no_grad()
    def after_step(
        self, outputs: Outputs, step: int, total_steps: int, skipped: torch.Tensor
    ) -> None:
        """Move the averages and the centre."""
        config = self.config
        momentum = momentum_at(config.momentum, config.momentum_schedule, step + 1, total_steps)
        self.key.follow(self.encoder, self.student, momentum, skipped)
        move_centre(self.centre, outputs.fixed["taught"], config.centre_momentum, skipped)
