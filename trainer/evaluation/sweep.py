"""Many linear probes at once: every learning rate with every weight decay, on cached features.

All classifiers see the same batches, so a step is one matrix product for the logits of all and one
for their gradients. Each learns what :func:`trainer.evaluation.supervised.linear_probe` would have
taught it alone. The best one is chosen on held-out training samples, never on the test set, and
then trained again on all of them.

Shape suffixes: H classifiers, C classes, P = H * C, N samples, B batch, F features.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import nn

from common.errors import ConfigError
from trainer.evaluation.supervised import LinearResult, Recipe, cached_batches, linear_probe, pace
from trainer.features.extraction import Features
from trainer.features.labels import class_count, hold_out

_HELD_OUT = 0.1  # of the training samples
_TEST_BYTES = 256 << 20  # of logits at once

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
    """Choose learning rate and weight decay, then train on everything. One process.

    Args:
        train: labelled features.
        test: labelled features, seen only by the classifier that was chosen.
        recipe: everything but learning rate and weight decay.
        base_lrs: to try, per 256 samples.
        weight_decays: to try with each.
        device: where to train.

    Returns:
        The best classifier, how many held-out samples it was chosen on, and all that were tried.

    Raises:
        ConfigError: a value is out of range, every classifier diverged, or no class has a sample
            to hold out.
        DataError: a set is empty or not labelled.
    """
    num_classes = class_count(train.labels_N, test.labels_N)
    kept, held = hold_out(train.labels_N, _HELD_OUT, recipe.seed)
    if len(held) == 0:
        raise ConfigError(
            "a sweep chooses on held-out training samples, and with one per class there are none: "
            "use --protocol cached"
        )
    pairs = [(lr, decay) for lr in base_lrs for decay in weight_decays]
    recipes = [dataclasses.replace(recipe, base_lr=lr, weight_decay=wd) for lr, wd in pairs]
    heads = train_heads(train.take(kept), num_classes, recipes, device=device)
    trials = _judge(heads, train.take(held), recipes)
    best = max(range(len(trials)), key=lambda i: trials[i].merit)
    if trials[best].loss is None:
        raise ConfigError("every classifier of the sweep diverged: give lower --base-lr values")
    result = linear_probe(train, test, recipes[best], device=device)
    return result, len(held), trials


@dataclass(frozen=True)
class Heads:
    """Trained classifiers: logits of head h are ``features @ weight[h].T + bias[h]``."""

    weight_HCF: torch.Tensor  # noqa: N815
    bias_HC: torch.Tensor  # noqa: N815

    def logits(self, features_BF: torch.Tensor) -> torch.Tensor:
        """Float32 (B, H, C): one product for all heads."""
        heads, classes, width = self.weight_HCF.shape
        logits_BP = features_BF @ self.weight_HCF.view(heads * classes, width).T
        return logits_BP.view(-1, heads, classes) + self.bias_HC


@torch.no_grad()
def train_heads(
    train: Features,
    num_classes: int,
    recipes: list[Recipe],
    *,
    device: torch.device | str = "cpu",
) -> Heads:
    """Train a classifier for each of ``recipes``, which differ in rate and decay only."""
    recipes = [recipe.for_samples(len(train.labels_N)) for recipe in recipes]
    device, shared = torch.device(device), recipes[0]
    heads, width = len(recipes), train.features_NF.shape[1]
    weight_HCF = torch.zeros(heads, num_classes, width, device=device)
    trained = Heads(weight_HCF, torch.zeros(heads, num_classes, device=device))
    parameters = (trained.weight_HCF, trained.bias_HC)
    velocities = [torch.zeros_like(parameter) for parameter in parameters]
    rate_H = torch.tensor([each.peak_lr for each in recipes], device=device)
    decay_H = torch.tensor([each.weight_decay for each in recipes], device=device)
    total = shared.epochs * (len(train.labels_N) // shared.batch_size)
    paced = pace(cached_batches(train, shared, device), total, "sweep", progress=True)
    for cosine, (features_BF, labels_B) in paced:
        gradients = _gradients(trained, features_BF.float(), labels_B)
        for parameter, velocity, gradient in zip(parameters, velocities, gradients):
            ones = (1,) * (parameter.dim() - 1)
            gradient += decay_H.view(-1, *ones) * parameter
            velocity.mul_(shared.momentum).add_(gradient)
            update = gradient.add_(velocity, alpha=shared.momentum)  # Nesterov
            parameter -= (cosine * rate_H).view(-1, *ones) * update
    return trained


def _gradients(
    heads: Heads, features_BF: torch.Tensor, labels_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each head's mean cross-entropy, for weights (H, C, F) and biases (H, C)."""
    residual_BHC = heads.logits(features_BF).softmax(dim=2)
    residual_BHC[torch.arange(len(labels_B), device=labels_B.device), :, labels_B] -= 1
    residual_BHC /= len(labels_B)
    weight_PF = residual_BHC.flatten(1).T @ features_BF
    return weight_PF.view_as(heads.weight_HCF), residual_BHC.sum(dim=0)


@torch.no_grad()
def _judge(heads: Heads, held: Features, recipes: list[Recipe]) -> list[Trial]:
    count, device = len(recipes), heads.bias_HC.device
    hits_H = torch.zeros(count, dtype=torch.int64, device=device)
    loss_H = torch.zeros(count, dtype=torch.float64, device=device)
    rows = max(1, _TEST_BYTES // (4 * heads.bias_HC.numel()))  # so many that their logits fit
    for features_BF, labels_B in held.blocks(rows, device):
        logits_BHC = heads.logits(features_BF.float())
        hits_H += (logits_BHC.argmax(dim=2) == labels_B[:, None]).sum(dim=0)
        labels_BH = labels_B[:, None].expand(-1, count)
        loss_BH = nn.functional.cross_entropy(
            logits_BHC.flatten(0, 1), labels_BH.reshape(-1), reduction="none"
        ).view(-1, count)
        loss_H += loss_BH.double().sum(dim=0)
    trials = []
    for recipe, hits, loss in zip(recipes, hits_H.tolist(), (loss_H / len(held.ids_N)).tolist()):
        sound = math.isfinite(loss)
        top1 = hits / len(held.ids_N) if sound else 0.0
        trials.append(Trial(recipe.base_lr, recipe.weight_decay, top1, loss if sound else None))
    return trials
