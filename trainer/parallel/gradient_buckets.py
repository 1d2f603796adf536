"""DDP's gradient buckets, laid out before the first step as they stay."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.objectives.base import Inputs, Objective
from trainer.run import Run


def has_gradient_buckets(model: nn.Module) -> bool:
    """Whether DDP averages the model's gradients."""
    return any(isinstance(part, DistributedDataParallel) for part in model.modules())


def settle_gradient_buckets(run: Run) -> None:
    """Make DDP lay out its gradient buckets before the first step counts.

    DDP rebuilds its buckets once, after its first backward pass, in the order in which gradients
    arrived. The place of a gradient in a bucket decides in which order ranks' values are added, so
    without this a resumed run's first step would round differently from the same step of a run
    that was never stopped. One pass over zeros, whose gradients are dropped, moves that rebuild to
    before step 1 in both.
    """
    if not has_gradient_buckets(run.model):
        return
    buffers = {name: buffer.clone() for name, buffer in run.objective.named_buffers()}
    side = run.config.crop.size
    shape = (Objective.views * run.plan.local_batch, 3, side, side)
    blank = torch.zeros(shape, dtype=run.augment.dtype, device=run.fabric.device)
    blank = blank.to(memory_format=torch.channels_last).unflatten(0, (Objective.views, -1))
    for _ in range(2):  # the rebuild happens at the forward pass after the first backward pass
        rows = run.model(Inputs((blank,))).rows.values()
        run.fabric.backward(torch.stack([each.sum() for each in rows]).sum())
        run.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, buffer in run.objective.named_buffers():
            buffer.copy_(buffers[name])
