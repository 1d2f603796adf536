"""Supervised contrastive learning: all views of images with one label attract.

Khosla et al. 2020, arXiv 2004.11362, equation 2. Beside SimCLR it says what labels would give a
contrastive loss.

Shapes: N images of this process, V = 2 views, D projection dimensions, K classes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from torch.nn.functional import one_hot

from common.collectives import rank_and_size
from kernels.ntxent.reference import statistics_dtype, unit_rows
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig, ProjectionHead
from trainer.objectives.base import Given, Inputs, Loss, Outputs
from trainer.objectives.parts.classification import check_labels
from trainer.objectives.parts.global_sum import global_sum
from trainer.objectives.simclr import SimCLR, SimCLRConfig


@dataclass(frozen=True, kw_only=True)
class SupConConfig(SimCLRConfig):
    """NT-Xent over the global batch, with every view of the same label as a positive."""

    name: tyro.conf.Suppress[Literal["supcon"]] = "supcon"  # type: ignore[assignment]
    """Which objective a saved configuration describes."""

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "SupCon":
        """Encoder and projection head.

        Raises:
            ConfigError: the data has no labels.
        """
        check_labels(given.num_classes)
        projection = ProjectionHead(encoder.feature_dim, head)
        return SupCon(encoder, projection, self, given.num_classes)


class SupCon(SimCLR):
    """SimCLR's networks."""

    def __init__(
        self, encoder: Encoder, head: ProjectionHead, config: SupConConfig, classes: int
    ) -> None:
        super().__init__(encoder, head, config)
        self.classes = classes

    def forward(self, inputs: Inputs) -> Outputs:
        """``projections`` as SimCLR has them, and the labels."""
        return super().forward(inputs)._replace(fixed={"labels": inputs.labels_N})

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """Mean over all views of ``log sum_a exp(z a / tau) - mean_p (z p / tau)``, p of the same
        label: NT-Xent, with that mean in the place of the other view's similarity.

        Without a label the other view is the only positive. An image whose label no other has
        costs what it costs SimCLR.
        """
        loss = super().loss(outputs, step)
        return loss._replace(value=loss.value + self._instead(outputs))

    def _instead(self, outputs: Outputs) -> torch.Tensor:
        # The sum over a class of z . (sum of its others) is |sum of all|^2 - their number: classes'
        # sums are all that processes exchange, and no row meets another.
        z_NVD = outputs.rows["projections"]
        z_NVD = unit_rows(z_NVD.to(statistics_dtype(z_NVD.dtype)))
        labels_N = outputs.fixed["labels"]
        is_of_NK = one_hot(labels_N.clamp_min(0), self.classes).to(z_NVD.dtype)
        is_of_NK = is_of_NK * (labels_N >= 0)[:, None]
        sums_KD = global_sum(is_of_NK.T @ z_NVD.sum(1))
        rows_K = global_sum(2 * is_of_NK.sum(0))
        same_view = global_sum(2 * (z_NVD.prod(1).sum(1) * is_of_NK.sum(1)).sum())
        same_class_K = (sums_KD.square().sum(1) - rows_K) / (rows_K - 1).clamp_min(1)
        rows = 2 * len(z_NVD) * rank_and_size()[1]
        return (same_view - same_class_K.sum()) / (rows * self.config.temperature)
