"""Supervised cross-entropy: what labels would give, the row beside which all others are read.

Shapes: N images of this process, K classes.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import tyro
from torch import nn
from torch.nn.functional import cross_entropy

from kernels.ntxent.reference import statistics_dtype
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig
from trainer.objectives.base import Given, Inputs, Loss, Objective, ObjectiveConfig, Outputs
from trainer.objectives.cost import LossCost, StepSizes, softmax_cost
from trainer.objectives.parts.classification import check_labels
from trainer.objectives.parts.global_mean import global_mean

_NONE = -1  # the label of an image without one


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(ObjectiveConfig):
    """Cross-entropy with the training file's labels; there is nothing to set."""

    looks: ClassVar[int] = 1

    name: tyro.conf.Suppress[Literal["supervised"]] = "supervised"
    """Which objective a saved configuration describes."""

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "Supervised":
        """The encoder and a linear classifier; there is no projection head.

        Raises:
            ConfigError: the data has no labels.
        """
        check_labels(given.num_classes)
        return Supervised(encoder, self, given.num_classes)

    def cost(self, step: StepSizes) -> LossCost:
        """A linear classifier, counted with the networks."""
        return softmax_cost(step.local_batch, 1, 1)


class Supervised(Objective):
    """An encoder and a linear classifier."""

    def __init__(self, encoder: Encoder, config: SupervisedConfig, classes: int) -> None:
        super().__init__(encoder, None, config)
        self.classifier = nn.Linear(encoder.feature_dim, classes)

    def forward(self, inputs: Inputs) -> Outputs:
        """``logits``, ``(N, K)``, and the labels."""
        logits_NK = self.classifier(self.encoder(inputs.views[0][0]))
        return Outputs({"logits": logits_NK}, {"labels": inputs.labels_N})

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """Mean cross-entropy over the images that have labels; ln K by chance."""
        logits_NK, labels_N = outputs.rows["logits"], outputs.fixed["labels"]
        logits_NK = logits_NK.to(statistics_dtype(logits_NK.dtype))
        losses_N = cross_entropy(logits_NK, labels_N, ignore_index=_NONE, reduction="none")
        hits_N = logits_NK.detach().argmax(1) == labels_N
        numbers = (losses_N, hits_N.to(losses_N.dtype), (labels_N != _NONE).to(losses_N.dtype))
        value, top1, labelled = global_mean(torch.stack(numbers, 1))
        return Loss(value / labelled, {"supervised_top1": (top1 / labelled).detach()})
