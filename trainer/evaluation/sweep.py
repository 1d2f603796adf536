"""Many linear probes at once: every learning rate with every weight decay, on cached features.

The best one is chosen on held-out training samples, never on the test set, and then trained again
on all of them.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import nn

from common.errors import ConfigError
from trainer.evaluation.supervised import (
    Heads,
    LinearResult,
    Recipe,
    cached_batches,
    fit,
    linear_probe,
    zero_linear,
)
from trainer.features.extraction import Features
from trainer.features.labels import accuracy_of, class_count, hold_out

_HELD_OUT = 0.1  # of the training samples

LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Per 256 samples of the batch, where none are named."""
WEIGHT_DECAYS = (0.0, 1e-6, 1e-5, 1e-4)


@dataclass(frozen=True)
class Trial:
    """One classifier of a sweep."""

    base_lr: float
    weight_decay: float
    top1: float
    """On the held-out samples, a fraction; 0 where training diverged."""
    loss: float | None
    """Mean cross-entropy there, nats; None where training diverged."""

    @property
    def merit(self) -> tuple[float, float]:
        """What the best one has most of; of equal accuracies the lower loss wins, even one of 0."""
        return self.top1, -math.inf if self.loss is None else -self.loss


def sweep_probe(
    train: Features,
    test: Features,
    recipe: Recipe,
    base_lrs: tuple[float, ...],
    weight_decays: tuple[float, ...],
    *,
    device: torch.device | str = "cpu",
) -> tuple[LinearResult, int, list[Trial]]:
    """Choose among ``base_lrs`` with ``weight_decays``, then train on everything. One process.

    Returns:
        The best classifier, how many held-out samples it was chosen on, and all that were tried.

    Raises:
        ConfigError: a value is out of range, every classifier diverged, or no class has a sample
            to hold out.
        DataError: a set is empty or not labelled.
    """
    device, num_classes = torch.device(device), class_count(train.labels_N, test.labels_N)
    kept, held = (train.take(part) for part in hold_out(train.labels_N, _HELD_OUT, recipe.seed))
    if len(held.ids_N) == 0:
        raise ConfigError(
            "a sweep chooses on held-out training samples, and with one per class there are none: "
            "use --protocol cached"
        )
    recipes = [
        dataclasses.replace(recipe, base_lr=lr, weight_decay=decay)
        for lr in base_lrs
        for decay in weight_decays
    ]
    fewer = [each.for_samples(len(kept.ids_N)) for each in recipes]
    heads = [zero_linear(train.features_NF.shape[1], num_classes).to(device) for _ in fewer]
    steps = len(kept.ids_N) // fewer[0].batch_size
    fit(Heads(heads), fewer, cached_batches(kept, fewer[0], device), steps, progress=True)
    trials = [_judge(head, held, each, device) for head, each in zip(heads, recipes)]
    best = max(range(len(trials)), key=lambda i: trials[i].merit)
    if trials[best].loss is None:
        raise ConfigError("every classifier of the sweep diverged: give lower --base-lr values")
    result = linear_probe(train, test, recipes[best], device=device)
    return result, len(held.ids_N), trials


@torch.no_grad()
def _judge(head: nn.Linear, held: Features, recipe: Recipe, device: torch.device) -> Trial:
    losses = [
        nn.functional.cross_entropy(head(features_BF), labels_B, reduction="sum").double()
        for features_BF, labels_B in held.blocks(8192, device)
    ]
    loss = float(sum(losses)) / len(held.ids_N)
    if not math.isfinite(loss):
        return Trial(recipe.base_lr, recipe.weight_decay, 0.0, None)
    top1 = accuracy_of(head, held, device).top1
    return Trial(recipe.base_lr, recipe.weight_decay, top1, loss)
