"""The loop that learns from labels: a linear classifier, many at once, or a whole network.

SimCLR's recipes for linear evaluation and fine-tuning (Chen et al. 2020, arXiv 2002.05709, appendix
B, and google-research/simclr) are of one form: SGD with Nesterov momentum, a learning rate in
proportion to the batch, without warm-up, and a cosine to 0 per step.

BatchNorm takes its statistics over the global batch and gradients are means over it, so the result
is the same on any number of processes, up to rounding.

Shape suffixes: B batch of this process, C classes.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common.collectives import release
from common.errors import ConfigError
from trainer.features.extraction import reduced_precision
from trainer.optim.schedule import half_cosine
from trainer.parallel.sync_batch_norm import convert_sync_batch_norm

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]
"""Inputs and int64 labels of this process's equal share of each global batch, on the device."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """SGD as SimCLR has it."""

    name: ClassVar[str]
    """Of the training, for a bar and for errors."""
    base_lr: float
    """Per 256 samples of the batch."""
    batch_size: int
    """Of all processes together."""
    epochs: int | None
    """None: to be settled before training."""
    momentum: float
    weight_decay: float
    seed: int

    def __post_init__(self) -> None:
        """Refuse what cannot train."""
        for name in ("base_lr", "batch_size", "epochs"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{self.name}: {name}={value} must be above 0")
        if not self.weight_decay >= 0:
            raise ConfigError(f"{self.name}: weight_decay={self.weight_decay} must be 0 or more")

    @property
    def peak_lr(self) -> float:
        """Learning rate of the first step."""
        return self.base_lr * self.batch_size / 256

    def report(self, steps: int, final_loss: float) -> dict[str, Any]:
        """What an evaluation says of it: JSON values."""
        return {
            "optimizer": "SGD, Nesterov momentum; cosine to 0 per step, no warm-up",
            **dataclasses.asdict(self),
            "peak_lr": self.peak_lr,
            "steps": steps,
            "final_loss": final_loss,
        }


def pace(
    batches: Batches, steps: int, name: str, progress: bool
) -> Iterator[tuple[float, tuple[torch.Tensor, torch.Tensor]]]:
    """So many batches, each with its step's learning rate as a factor of the peak."""
    # disable=None: no bar where stderr is not a terminal.
    with tqdm(total=steps, desc=name, leave=False, disable=None if progress else True) as bar:
        for step, batch in zip(range(steps), batches):
            yield half_cosine(step / steps), batch
            bar.update()


def fit(
    model: nn.Module,
    recipe: Recipe,
    batches: Batches,
    steps_per_epoch: int,
    *,
    autocast_dtype: torch.dtype | None = None,
    together: bool = False,
    progress: bool = False,
) -> float:
    """Train ``model`` in place; it is left in evaluation mode. A collective if ``together``.

    Args:
        model: inputs to logits (B, C), equal on all processes.
        recipe: its epochs are settled.
        batches: at least as many as there are steps.
        steps_per_epoch: global batches in an epoch.
        autocast_dtype: compute dtype; ``None``: the model's own.
        together: average over the processes.
        progress: show a bar on a terminal.

    Returns:
        Mean cross-entropy of the last epoch, nats.

    Raises:
        ConfigError: training diverged.
    """
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.peak_lr,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
        weight_decay=recipe.weight_decay,
    )
    if recipe.epochs is None:
        raise ValueError("name the number of epochs")
    device, mean = next(model.parameters()).device, math.nan
    loss_sum = torch.zeros((), device=device)
    paced = pace(batches, recipe.epochs * steps_per_epoch, recipe.name, progress)
    with _training(model, together) as wrapped:
        for step, (factor, (inputs, labels_B)) in enumerate(paced, 1):
            optimizer.param_groups[0]["lr"] = recipe.peak_lr * factor
            with reduced_precision(device, autocast_dtype):
                logits_BC = wrapped(inputs)
            loss = nn.functional.cross_entropy(_at_least_float32(logits_BC), labels_B)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach().float()
            if step % steps_per_epoch == 0:
                mean = _over_processes(loss_sum / steps_per_epoch, together)
                loss_sum.zero_()
                if not math.isfinite(mean):
                    raise ConfigError(
                        f"{recipe.name} diverged by step {step}: give a lower --base-lr than "
                        f"{recipe.base_lr:g}"
                    )
    return mean


def _over_processes(loss_mean: torch.Tensor, together: bool) -> float:
    if together:
        dist.all_reduce(loss_mean)
        loss_mean /= dist.get_world_size()
    return loss_mean.item()


def zero_linear(width: int, num_classes: int) -> nn.Linear:
    """A linear classifier as SimCLR starts it: of zeros."""
    linear = nn.Linear(width, num_classes)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear


@contextlib.contextmanager
def _training(model: nn.Module, together: bool) -> Iterator[nn.Module]:
    """``model`` in training mode, its BatchNorm and gradients over all processes."""
    convert_sync_batch_norm(model)
    model.train()
    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if together else model
    try:
        yield wrapped
    finally:
        release(wrapped)
        model.eval()


def _at_least_float32(logits_BC: torch.Tensor) -> torch.Tensor:
    return logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float()
