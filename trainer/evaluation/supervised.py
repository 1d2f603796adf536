"""The loop that learns from labels: a linear classifier, many at once, or a whole network.

SimCLR's recipes for linear evaluation and fine-tuning (Chen et al. 2020, arXiv 2002.05709, appendix
B, and google-research/simclr) are of one form: SGD with Nesterov momentum, a learning rate in
proportion to the batch, without warm-up, and a cosine to 0 per step. Weight decay covers biases, as
there; classifiers start at zero.

BatchNorm takes its statistics over the global batch and gradients are means over it, so the result
is the same on any number of processes, up to rounding.

Shape suffixes: N training samples, B batch of this process, F features, C classes.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common.errors import ConfigError
from common.rendezvous import release
from data_pipeline.reading.order import permute
from trainer.features.extraction import Features, reduced_precision
from trainer.features.labels import Accuracy, accuracy_of, class_count
from trainer.optim.schedule import half_cosine
from trainer.parallel.sync_batch_norm import convert_sync_batch_norm

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]
"""Inputs and int64 labels of this process's equal share of each global batch, on the device."""
Losses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of outputs and labels, or answers, the mean loss of each head (H,)."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """SGD as google-research/simclr has it for the linear evaluation on ImageNet (B.6)."""

    name: str = "the linear probe"  # of the training, for a bar and for errors
    base_lr: float = 0.1  # per 256 samples of the batch
    batch_size: int = 4096  # of all processes together
    epochs: int = 90
    momentum: float = 0.9  # Nesterov's
    weight_decay: float = 1e-6
    seed: int = 0  # of the order of samples, crops and flips

    @property
    def peak_lr(self) -> float:
        """Learning rate of the first step."""
        return self.base_lr * self.batch_size / 256

    def for_samples(self, num_samples: int) -> "Recipe":
        """The same with a batch of all samples where there are fewer."""
        return dataclasses.replace(self, batch_size=min(self.batch_size, num_samples))

    def report(self, steps: int, final_loss: float) -> dict[str, Any]:
        """What an evaluation's settings say of it: JSON values."""
        values = dataclasses.asdict(self)
        del values["name"]
        return {
            "optimizer": "SGD, Nesterov momentum; cosine to 0 per step, no warm-up",
            **values,
            "peak_lr": self.peak_lr,
            "steps": steps,
            "final_loss": final_loss,
        }


@dataclass(frozen=True)
class LinearResult:
    """What the test set says of a trained classifier."""

    reached: Accuracy
    recipe: Recipe
    """With the samples of a step that there were."""
    steps: int
    final_loss: float
    """Mean cross-entropy of the last epoch, nats."""
    classifier: nn.Linear

    def settings(self, features: str) -> dict[str, Any]:
        """What an evaluation says of the training, and of the features that it saw."""
        return {**self.recipe.report(self.steps, self.final_loss), "features": features}


def linear_probe(
    train: Features, test: Features, recipe: Recipe, *, device: torch.device | str = "cpu"
) -> LinearResult:
    """Train on cached features, test on cached features. One process; no collectives.

    Raises:
        ConfigError: training diverged.
        DataError: a set is empty or not labelled.
    """
    device, count = torch.device(device), len(train.labels_N)
    recipe = recipe.for_samples(count)
    return train_linear(
        cached_batches(train, recipe, device),
        count // recipe.batch_size,
        test,
        class_count(train.labels_N, test.labels_N),
        recipe,
        device=device,
        progress=True,
    )


def cached_batches(train: Features, recipe: Recipe, device: torch.device) -> Batches:
    """All batches of a training on cached features, in :mod:`data_pipeline.reading.order`."""
    features_NF, labels_N = _near(train.features_NF, device), train.labels_N
    num_train, size = len(labels_N), recipe.batch_size
    for epoch in range(recipe.epochs):
        for step in range(num_train // size):
            places = np.arange(step * size, (step + 1) * size)
            ids_B = torch.from_numpy(permute(recipe.seed, epoch, places, num_train))
            features_BF = features_NF[ids_B.to(features_NF.device)]
            yield features_BF.to(device), labels_N[ids_B].to(device)


def _near(features_NF: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The features on ``device``, if they take at most half of what is free there."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if features_NF.nbytes > free // 2:
            return features_NF
    return features_NF.to(device)


def train_linear(
    batches: Batches,
    steps_per_epoch: int,
    test: Features,
    num_classes: int,
    recipe: Recipe,
    *,
    device: torch.device | str = "cpu",
    together: bool = False,
    progress: bool = False,
) -> LinearResult:
    """Train a classifier as :func:`fit` does, on batches of features without gradient; test it.

    The features of ``test`` are equal on all processes.
    """
    device = torch.device(device)
    classifier = zero_linear(test.features_NF.shape[1], num_classes).to(device)
    (final_loss,) = fit(
        classifier, [recipe], batches, steps_per_epoch, together=together, progress=progress
    )
    reached = accuracy_of(classifier, test, device)
    return LinearResult(reached, recipe, recipe.epochs * steps_per_epoch, final_loss, classifier)


class Heads(nn.Module):
    """Linear classifiers side by side, (B, F) -> (B, H, C): one matrix product for all."""

    def __init__(self, heads: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, features_BF: torch.Tensor) -> torch.Tensor:
        """Logits of each."""
        weight, bias = (torch.cat(part) for part in zip(*(h.parameters() for h in self.heads)))
        logits = nn.functional.linear(features_BF, weight, bias)
        return logits.view(len(features_BF), len(self.heads), -1)


def fit(
    model: nn.Module,
    recipes: Sequence[Recipe],
    batches: Batches,
    steps_per_epoch: int,
    *,
    losses: Losses | None = None,
    autocast_dtype: torch.dtype | None = None,
    together: bool = False,
    progress: bool = False,
) -> list[float]:
    """Train ``model``, or each of :class:`Heads`, in place. A collective if ``together``.

    Args:
        model: inputs to logits (B, C), equal on all processes; left in evaluation mode.
        recipes: one, or one of each head; they differ in rate and decay only.
        batches: at least as many as there are steps.
        steps_per_epoch: global batches in an epoch.
        losses: what is made small; None: cross-entropy.
        autocast_dtype: compute dtype; ``None``: the model's own.
        together: average over the processes, each of which has a share of every batch.
        progress: show a bar on a terminal.

    Returns:
        Mean loss of the last epoch (of cross-entropy in nats); not finite where training diverged.

    Raises:
        ConfigError: training diverged, of several heads that of all.
    """
    losses = cross_entropies if losses is None else losses
    shared, device = recipes[0], next(model.parameters()).device
    total = shared.epochs * steps_per_epoch
    sums_H, means = torch.zeros(len(recipes), device=device), [math.nan] * len(recipes)
    parts = model.heads if isinstance(model, Heads) else [model]
    optimizer = torch.optim.SGD(
        [
            {"params": list(part.parameters()), "weight_decay": recipe.weight_decay}
            for part, recipe in zip(parts, recipes)
        ],
        lr=shared.peak_lr,
        momentum=shared.momentum,
        nesterov=shared.momentum > 0,
    )
    # disable=None: no bar where stderr is not a terminal.
    bar = tqdm(total=total, desc=shared.name, leave=False, disable=None if progress else True)
    with _training(model, together) as wrapped, bar:
        for step, (inputs, labels_B) in zip(range(total), batches):
            for group, recipe in zip(optimizer.param_groups, recipes):
                group["lr"] = recipe.peak_lr * half_cosine(step / total)
            with reduced_precision(device, autocast_dtype):
                logits = wrapped(inputs)
            loss_H = losses(logits, labels_B)
            optimizer.zero_grad()
            loss_H.sum().backward()
            optimizer.step()
            sums_H += loss_H.detach().float()
            bar.update()
            if (step + 1) % steps_per_epoch == 0:
                means_H = sums_H / steps_per_epoch
                sums_H.zero_()
                if together:
                    dist.all_reduce(means_H)
                    means_H /= dist.get_world_size()
                means = means_H.tolist()
                if not any(map(math.isfinite, means)):
                    raise ConfigError(
                        f"{shared.name} diverged by step {step + 1}: give a lower --base-lr than "
                        f"{min(recipe.base_lr for recipe in recipes):g}"
                    )
    return means


def cross_entropies(logits: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each head (H,), of one without heads (1,), in float32 or better."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if logits.dim() == 2:
        return nn.functional.cross_entropy(logits, labels_B)[None]
    labels_BH = labels_B[:, None].expand(logits.shape[:2])
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels_BH.reshape(-1), reduction="none"
    )
    return losses.view(logits.shape[:2]).mean(dim=0)


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
