"""Linear probe: a linear classifier on a frozen encoder, trained by SimCLR's recipe.

SimCLR (Chen et al. 2020, arXiv 2002.05709, appendix B.6 and google-research/simclr): SGD with
Nesterov momentum 0.9, learning rate 0.1 x batch / 256 without warm-up, cosine to 0 per step, weight
decay 1e-6, batch 4096, 90 epochs, classifier starting at zero. Weight decay covers the bias, as
there.

Two protocols train the same classifier:

* *cached*: each image has one feature vector, that of its centre crop;
* *canonical*: each image is cropped and flipped anew in every epoch and goes through the encoder,
  as in the paper.

Shape suffixes: N training samples, M test samples, B batch, F features, C classes.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from data_pipeline.order import Position, global_batch_ids
from trainer.errors import ConfigError
from trainer.evaluation.features import Features
from trainer.evaluation.labels import Accuracy, accuracy, class_count, count_hits
from trainer.schedule import half_cosine

_TEST_ROWS = 8192


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """SimCLR's linear evaluation."""

    base_lr: float = 0.1  # per 256 samples of the batch
    batch_size: int = 4096  # all training samples where there are fewer
    epochs: int = 90
    momentum: float = 0.9  # Nesterov's
    weight_decay: float = 1e-6
    seed: int = 0  # of the order of samples, and of the crops in the canonical protocol

    def __post_init__(self) -> None:
        """Refuse what cannot train."""
        for name in ("base_lr", "batch_size", "epochs"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"linear probe: {name}={getattr(self, name)} must be above 0")
        if not self.weight_decay >= 0:
            raise ConfigError(f"linear probe: weight_decay={self.weight_decay} must be 0 or more")

    def peak_lr(self, batch_size: int) -> float:
        """Learning rate of the first step with ``batch_size`` samples in a step."""
        return self.base_lr * batch_size / 256


SIMCLR_IMAGENET = LinearConfig()
"""google-research/simclr's command for the linear evaluation on ImageNet, value by value: rate 0.1
per 256, batch 4096, 90 epochs, weight decay 1e-6, no warm-up. It is for crops of 224 pixels."""
SIMCLR_IMAGENET_CROP = (224, 256)  # side and shorter side before it at the test, pixels


@dataclass(frozen=True)
class LinearResult:
    """Accuracy of the trained classifier, as fractions in [0, 1], and the classifier."""

    top1: float
    top5: float
    """Within the best ``min(5, classes)``."""
    batch_size: int
    """Samples of a step: the configured ones, or all training samples where there are fewer."""
    steps: int
    final_loss: float
    """Mean cross-entropy of the last epoch, nats."""
    classifier: nn.Linear


def linear_probe(
    train: Features,
    test: Features,
    config: LinearConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> LinearResult:
    """Train on cached features, test on cached features. One process; no collectives.

    Raises:
        ConfigError: training diverged.
        DataError: a set is empty or not labelled.
    """
    config = config or LinearConfig()
    device = torch.device(device)
    num_classes = class_count(train.labels_N, test.labels_N)
    num_train = len(train.labels_N)
    batch_size = min(config.batch_size, num_train)
    batches = cached_batches(train, config, batch_size, device)
    probe = _Probe(config, train.features_NF.shape[1], num_classes, batch_size, device)
    probe.fit(batches, num_train // batch_size, progress)
    return probe.result(test)


def cached_batches(
    train: Features, config: LinearConfig, batch_size: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """All batches of a training on cached features, in the order of :mod:`data_pipeline.order`."""
    features_NF, labels_N = _near(train.features_NF, device), train.labels_N
    num_train = len(labels_N)
    for epoch in range(config.epochs):
        for step in range(num_train // batch_size):
            ids = global_batch_ids(config.seed, Position(epoch, step), batch_size, num_train)
            ids_B = torch.from_numpy(ids.astype(np.int64))
            features_BF = features_NF[ids_B.to(features_NF.device)]
            yield features_BF.to(device), labels_N[ids_B].to(device)


def linear_probe_on_crops(
    encode: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
    batches: Iterable,
    steps_per_epoch: int,
    batch_size: int,
    test: Features,
    num_classes: int,
    config: LinearConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    world_size: int = 1,
    progress: bool = False,
) -> LinearResult:
    """Train on features of fresh crops (the canonical protocol), test on cached features.

    Args:
        encode: (uint8 crops (B, 1, H, W, 3), ids (B,), epoch) -> features (B, F), without gradient.
        batches: endless ``data_pipeline.loader.Batch`` of one view: this rank's equal share.
        steps_per_epoch: global batches in an epoch.
        batch_size: the global batch.
        test: features of the test set's centre crops, equal on all ranks.
        num_classes: classes of training and test set.
        config: ``batch_size`` in it is not looked at.
        device: where to train.
        world_size: ranks that share each batch; their gradients are averaged.
        progress: show a bar on a terminal.

    Raises:
        ConfigError: training diverged.
    """
    config = config or LinearConfig()
    device = torch.device(device)

    def features() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _, batch in zip(range(config.epochs * steps_per_epoch), batches):
            crops = batch.crops_BVHWC.to(device, non_blocking=True)
            features_BF = encode(crops, batch.ids_B, batch.position.epoch)
            yield features_BF, batch.labels_B.to(device)

    width = test.features_NF.shape[1]
    probe = _Probe(config, width, num_classes, batch_size, device, world_size)
    probe.fit(features(), steps_per_epoch, progress)
    return probe.result(test)


class _Probe:
    """The classifier and its training, whatever the batches come from."""

    def __init__(
        self,
        config: LinearConfig,
        width: int,
        num_classes: int,
        batch_size: int,
        device: torch.device,
        world_size: int = 1,
    ) -> None:
        self.config, self.batch_size, self.world_size = config, batch_size, world_size
        self.device, self.steps, self.final_loss = device, 0, math.nan
        self.classifier = nn.Linear(width, num_classes, device=device)
        for parameter in self.classifier.parameters():
            nn.init.zeros_(parameter)
        self.optimizer = torch.optim.SGD(
            self.classifier.parameters(),
            lr=config.peak_lr(batch_size),
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=config.weight_decay,
        )

    def fit(
        self,
        batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
        steps_per_epoch: int,
        progress: bool,
    ) -> None:
        total = self.config.epochs * steps_per_epoch
        with tqdm(
            total=total, desc="linear probe", leave=False, disable=None if progress else True
        ) as bar:
            for _ in range(self.config.epochs):
                loss_sum = torch.zeros((), device=self.device)
                for _ in range(steps_per_epoch):
                    self._set_lr(total)
                    loss_sum += self._step(*next(batches))
                    bar.update()
                self.final_loss = self._mean_over_ranks(loss_sum / steps_per_epoch).item()
                if not math.isfinite(self.final_loss):
                    raise ConfigError(
                        f"the linear probe diverged in step {self.steps}: give a lower base LR "
                        f"than {self.config.base_lr:g}, or use logistic regression"
                    )

    def _set_lr(self, total: int) -> None:
        factor = half_cosine(self.steps / total)
        self.optimizer.param_groups[0]["lr"] = self.config.peak_lr(self.batch_size) * factor

    def _step(self, features_BF: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.classifier(features_BF.float()), labels_B)
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.classifier.parameters():
            if parameter.grad is not None:
                self._mean_over_ranks(parameter.grad)
        self.optimizer.step()
        self.steps += 1
        return loss.detach()

    def _mean_over_ranks(self, x: torch.Tensor) -> torch.Tensor:
        if self.world_size > 1:
            dist.all_reduce(x)
            x /= self.world_size
        return x

    @torch.no_grad()
    def result(self, test: Features) -> LinearResult:
        reached = self.test(test)
        return LinearResult(
            reached.top1,
            reached.top5,
            self.batch_size,
            self.steps,
            self.final_loss,
            self.classifier,
        )

    def test(self, test: Features) -> Accuracy:
        hits = torch.zeros(2, dtype=torch.int64, device=self.device)
        for features_BF, labels_B in zip(
            test.features_NF.split(_TEST_ROWS), test.labels_N.split(_TEST_ROWS)
        ):
            hits += count_hits(self.classifier(features_BF.to(self.device)), labels_B.to(hits))
        return accuracy(hits, len(test.labels_N))


def _near(features_NF: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The features on ``device``, if they take at most half of what is free there."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if features_NF.numel() * features_NF.element_size() > free // 2:
            return features_NF
    return features_NF.to(device)
