"""What the training loop asks of an objective: SimCLR, MoCo v1 and v2, MoCo v3.

A run's configuration has one of their configurations, whose ``build`` makes the objective.

One step is::

    outputs = objective(inputs)
    loss = objective.loss(outputs)
    ...                                     # backward pass, optimizer
    objective.after_step(outputs, step, total_steps, skipped)

Shapes: N images of this process, V views of a group, D dimensions.
"""

from typing import ClassVar, NamedTuple

import torch
from torch import nn

from trainer.models.encoders import Encoder


class Inputs(NamedTuple):
    """What an objective sees of a batch, or of a piece of one; on the device."""

    views: tuple[torch.Tensor, ...]
    """A tensor for each group of views: ``(V, N, 3, H, W)``, every image channels_last."""
    step: int = 0
    """Optimizer steps done before this one: what randomness of a step is keyed by."""


class Outputs(NamedTuple):
    """What a forward pass hands to the loss. The first dimension of every tensor is the image, so
    that the outputs of pieces of a batch join to those of the batch."""

    rows: dict[str, torch.Tensor]
    """``(N, ...)``: the loss is differentiated by these and nothing else."""
    fixed: dict[str, torch.Tensor] = {}  # noqa: RUF012 - nobody writes to it
    """``(N, ...)`` without gradient: keys, targets."""


class Loss(NamedTuple):
    """What the outputs of a step are worth; 0-d and equal on all processes."""

    value: torch.Tensor
    """What the gradient is of."""
    metrics: dict[str, torch.Tensor]
    """What else a person wants to see of the step, by the name it has in metrics.jsonl; without
    gradient. ``contrastive_top1``: share of anchors or queries that are nearer to their positive
    than to anything else, 0 to 1."""


class Objective(nn.Module):
    """Networks and a loss. ``encoder`` is what is handed on; all else may be its own."""

    views: ClassVar[int] = 2
    """V: views of each image that a step takes."""
    encoder: Encoder

    def forward(self, inputs: Inputs) -> Outputs:
        """Everything that the loss takes of this process's images."""
        raise NotImplementedError

    def loss(self, outputs: Outputs) -> Loss:
        """The loss of the whole process group.

        Called outside autocast: rows are normalised and the loss reduced in float32 or better. The
        gradient is scaled so that DDP's mean over processes is that of the global mean loss. A
        collective.
        """
        raise NotImplementedError

    def embedding(self, outputs: Outputs) -> torch.Tensor:
        """``(M, D)``, any number of rows an image: what the collapse alarm looks at."""
        raise NotImplementedError

    def after_step(
        self, outputs: Outputs, step: int, total_steps: int, skipped: torch.Tensor
    ) -> None:
        """What follows the optimizer's step: moving averages, queues. A collective.

        Args:
            outputs: of this step.
            step: optimizer steps done before this one.
            total_steps: of the run.
            skipped: 0-d, 1 where the optimizer left the step out for gradients that were not
                finite. Then nothing changes here either, to the bit; decided on the device.
        """

    def synchronised_parts(self, sync_batch_norm: bool) -> list[nn.Module]:
        """Parts whose BatchNorm takes its statistics from the global batch, by that setting."""
        return [self] if sync_batch_norm else []

    def caveats(self, sync_batch_norm: bool) -> list[str]:
        """What a user should know before the first step, a line each."""
        if sync_batch_norm:
            return []
        return [
            "BatchNorm statistics are those of one process: another number of processes gives"
            " another run (--sync-batch-norm)"
        ]
