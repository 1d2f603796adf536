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

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from data_pipeline.reading.order import Position, global_batch_ids
from trainer.evaluation.supervised import Batches, Recipe, fit, zero_linear
from trainer.features.extraction import Features
from trainer.features.labels import accuracy_of, class_count


@dataclass(frozen=True, kw_only=True)
class LinearConfig(Recipe):
    """SimCLR's linear evaluation."""

    name = "the linear probe"
    base_lr: float = 0.1  # per 256 samples of the batch
    batch_size: int = 4096  # all training samples where there are fewer
    epochs: int = 90
    momentum: float = 0.9  # Nesterov's
    weight_decay: float = 1e-6
    seed: int = 0  # of the order of samples, and of the crops in the canonical protocol


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
    config: LinearConfig
    """With the samples of a step that there were."""
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
    device, count = torch.device(device), len(train.labels_N)
    config = limited(config or LinearConfig(), count)
    return train_linear(
        cached_batches(train, config, device),
        count // config.batch_size,
        test,
        class_count(train.labels_N, test.labels_N),
        config,
        device=device,
        progress=progress,
    )


def limited(config: LinearConfig, num_samples: int) -> LinearConfig:
    """``config`` with a batch of all samples where there are fewer."""
    return dataclasses.replace(config, batch_size=min(config.batch_size, num_samples))


def cached_batches(train: Features, config: LinearConfig, device: torch.device) -> Batches:
    """All batches of a training on cached features, in :mod:`data_pipeline.reading.order`."""
    features_NF, labels_N = _near(train.features_NF, device), train.labels_N
    num_train, size = len(labels_N), config.batch_size
    for epoch in range(config.epochs):
        for step in range(num_train // size):
            ids = global_batch_ids(config.seed, Position(epoch, step), size, num_train)
            ids_B = torch.from_numpy(ids.astype(np.int64))
            features_BF = features_NF[ids_B.to(features_NF.device)]
            yield features_BF.to(device), labels_N[ids_B].to(device)


def train_linear(
    batches: Batches,
    steps_per_epoch: int,
    test: Features,
    num_classes: int,
    config: LinearConfig,
    *,
    device: torch.device | str = "cpu",
    together: bool = False,
    progress: bool = False,
) -> LinearResult:
    """Train on batches of features, test on cached features. A collective if ``together``.

    Args:
        batches: of features (B, F) without gradient.
        steps_per_epoch: global batches in an epoch.
        test: features of the test set's centre crops, equal on all processes.
        num_classes: classes of training and test set.
        config: the recipe, with the global batch that ``batches`` have.
        device: where to train.
        together: several processes share each batch.
        progress: show a bar on a terminal.

    Raises:
        ConfigError: training diverged.
    """
    device = torch.device(device)
    classifier = zero_linear(test.features_NF.shape[1], num_classes).to(device)
    final_loss = fit(
        classifier, config, batches, steps_per_epoch, together=together, progress=progress
    )
    reached = accuracy_of(classifier, test, device)
    steps = config.epochs * steps_per_epoch
    return LinearResult(*reached, config, steps, final_loss, classifier)


def _near(features_NF: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The features on ``device``, if they take at most half of what is free there."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if features_NF.numel() * features_NF.element_size() > free // 2:
            return features_NF
    return features_NF.to(device)
