"""What the training loop asks of an objective: SimCLR, MoCo v1 and v2, MoCo v3.

One step is::

    outputs = objective(views, step)
    loss, top1 = objective.loss(outputs)
    ...                                     # backward pass, optimizer
    objective.after_step(outputs, step, total_steps, skipped)

Shapes: N images of this process, V = 2 views, D projection dimensions.
"""

from typing import ClassVar, NamedTuple

import torch
from torch import nn

from trainer.models.encoders import Encoder


class Projections(NamedTuple):
    """What a forward pass hands to the loss, view by view and not normalised."""

    queries: torch.Tensor
    """``(rows, D)``: the loss is differentiated by these and nothing else."""
    keys: torch.Tensor | None = None
    """``(rows, D)``, the key encoder's, without gradient; none where there is no key encoder."""


class Loss(NamedTuple):
    """What the projections of a step are worth; both 0-d and equal on all processes."""

    value: torch.Tensor
    """What the gradient is of."""
    top1: torch.Tensor
    """Share of anchors or queries that are nearer to their positive than to anything else: the
    accuracy of the contrastive task, 0 to 1, without gradient."""


class Objective(nn.Module):
    """Networks and a loss. ``encoder`` is what is handed on; all else may be its own."""

    views: ClassVar[int] = 2
    """V: views of each image that a step takes."""
    encoder: Encoder

    def forward(self, views_VNCHW: torch.Tensor, step: int = 0) -> Projections:
        """Project images.

        Args:
            views_VNCHW: ``(V*N, 3, H, W)``, all images of the first view first.
            step: optimizer steps done before this one: what randomness of a step is keyed by.
        """
        raise NotImplementedError

    def loss(self, outputs: Projections) -> Loss:
        """The loss of the whole process group.

        Called outside autocast: rows are normalised and the loss reduced in float32 or better. The
        gradient is scaled so that DDP's mean over processes is that of the global mean loss. A
        collective.
        """
        raise NotImplementedError

    def after_step(
        self, outputs: Projections, step: int, total_steps: int, skipped: torch.Tensor
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
        """Parts whose BatchNorm takes its statistics from the global batch.

        Args:
            sync_batch_norm: the run's setting of that name.
        """
        return [self] if sync_batch_norm else []

    def caveats(self, sync_batch_norm: bool) -> list[str]:
        """What a user should know before the first step, a line each."""
        if sync_batch_norm:
            return []
        return [
            "BatchNorm statistics are those of one process: another number of processes gives"
            " another run (--sync-batch-norm)"
        ]
