"""DeepCluster-v2: predict an image's cluster from every view; clusters are made anew each epoch.

Caron et al. 2020, arXiv 2006.09882, appendix. Embeddings of the two large views are remembered as
they pass; at the start of an epoch spherical k-means of them gives each head its prototypes, which
stay fixed, and each sample its clusters. The first epoch's come from a pass without training.

Shapes: N images of this process, V views of all sizes, S samples of the data set, H heads, K
prototypes, D dimensions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import tyro
from torch.nn.functional import cross_entropy

from common.bounds import check_bounds
from common.errors import ConfigError
from common.randomness import Stream, sample_keys, uniforms
from kernels.ntxent.reference import unit_rows
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig, ProjectionHead
from trainer.objectives.base import Given, Inputs, Loss, Objective, Outputs
from trainer.objectives.cost import LossCost, StepSizes, softmax_cost
from trainer.objectives.parts.global_mean import global_mean
from trainer.objectives.parts.multi_crop import LARGE, MultiCropConfig, project_all
from trainer.objectives.parts.per_sample import PerSample
from trainer.objectives.parts.spherical_k_means import spherical_k_means

_UNSEEN = -1  # the cluster of a sample that has not been embedded


@dataclass(frozen=True, kw_only=True)
class DeepClusterV2Config(MultiCropConfig):
    """Cross-entropy with clusters; the defaults are the paper's for ImageNet."""

    name: tyro.conf.Suppress[Literal["deepclusterv2"]] = "deepclusterv2"
    """Which objective a saved configuration describes."""
    temperature: float = 0.1
    """Divides the cosine similarities with the prototypes."""
    prototypes: int = 3000
    """K: clusters of each head; at most as many as samples of an epoch."""
    heads: int = 3
    """H: clusterings, each with its own beginning; they take turns with the two large views."""
    iterations: int = 10
    """Of k-means, at each epoch's start."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(
            self,
            "--objective.",
            temperature="(0, inf)",
            prototypes="[2, 1e7]",
            heads="[1, 100]",
            iterations="[1, 1e6]",
        )

    def least_samples(self) -> tuple[int, str]:
        """A sample for each cluster."""
        return self.prototypes, "prototypes"

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "DeepClusterV2":
        """Encoder, head, and empty tables.

        Raises:
            ConfigError: more clusters than samples.
        """
        if self.prototypes > given.num_samples:
            raise ConfigError(
                f"--objective.prototypes {self.prototypes} is more than the {given.num_samples}"
                " samples"
            )
        built = ProjectionHead(encoder.feature_dim, head)
        return DeepClusterV2(encoder, built, self, given.seed, given.num_samples)

    def cost(self, step: StepSizes) -> LossCost:
        """Cross-entropy of every view, once for each head."""
        rows = (LARGE + self.small_views) * step.local_batch
        return softmax_cost(rows, self.prototypes, step.dim)._replace(times=self.heads)

    def compares(self, batch: int, num_samples: int) -> str:
        """Every view with the prototypes of every head."""
        views = LARGE + self.small_views
        return f"{views * self.heads * self.prototypes} logits per image"


class DeepClusterV2(Objective):
    """Encoder, head, each sample's embeddings and clusters, and the prototypes."""

    config: DeepClusterV2Config
    prototypes: torch.Tensor
    clusters: torch.Tensor

    def __init__(
        self,
        encoder: Encoder,
        head: ProjectionHead,
        config: DeepClusterV2Config,
        seed: int,
        num_samples: int,
    ) -> None:
        super().__init__(encoder, head, config)
        self.seed = seed
        self.memory = PerSample(torch.zeros(num_samples, LARGE, head.out_dim))
        shape = (config.heads, config.prototypes, head.out_dim)
        self.register_buffer("prototypes", torch.zeros(shape))
        unseen = torch.full((config.heads, num_samples), _UNSEEN)
        self.register_buffer("clusters", unseen)

    def forward(self, inputs: Inputs) -> Outputs:
        """``projections`` of all views, ``(N, V, D)``, the large ones first, and whose they are."""
        rows = {"projections": project_all(self.encoder, self.head, inputs.views)}
        return Outputs(rows, {"ids": inputs.ids_N, "genuine": inputs.genuine_N})

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """Mean cross-entropy of all views and heads over the images that have clusters."""
        unit_NVD = unit_rows(outputs.rows["projections"])
        clusters_HN = self.clusters[:, outputs.fixed["ids"]]
        losses, hits = [], []
        for cluster_N, prototypes_KD in zip(clusters_HN, self.prototypes):
            logits_NVK = unit_NVD @ prototypes_KD.to(unit_NVD.dtype).T / self.config.temperature
            target_NV = cluster_N[:, None].expand(logits_NVK.shape[:2])
            found = cross_entropy(
                logits_NVK.transpose(1, 2), target_NV, ignore_index=_UNSEEN, reduction="none"
            )
            losses.append(found.mean(1))
            hits.append((logits_NVK.detach().argmax(2) == target_NV).to(found.dtype).mean(1))
        known_N = (clusters_HN[0] != _UNSEEN).to(unit_NVD.dtype)
        numbers = [sum(losses) / len(losses), sum(hits) / len(hits), known_N]
        value, top1, known = global_mean(torch.stack(numbers, 1))
        return Loss(value / known, {"cluster_top1": (top1 / known).detach()})

    def embedding(self, outputs: Outputs) -> torch.Tensor:
        """The projections of the large views, ``(2*N, D)``."""
        return outputs.rows["projections"][:, :LARGE].transpose(0, 1).flatten(0, 1)

    def after_step(
        self, outputs: Outputs, step: int, total_steps: int, skipped: torch.Tensor
    ) -> None:
        """Remember the embeddings of the large views."""
        self._remember(outputs, skipped)

    @torch.no_grad()
    def _remember(self, outputs: Outputs, skipped: torch.Tensor | None = None) -> None:
        unit_NLD = unit_rows(outputs.rows["projections"][:, :LARGE])
        self.memory.write(outputs.fixed["ids"], unit_NLD, outputs.fixed["genuine"], skipped)

    @torch.no_grad()
    def before_epoch(self, epoch: int, whole_epoch: Callable[[], Iterator[Outputs]]) -> None:
        """Cluster what is remembered; of the first epoch, what a pass over it gives.

        Raises:
            ConfigError: fewer samples than clusters have been embedded.
        """
        if epoch == 0:
            for outputs in whole_epoch():
                self._remember(outputs)
        embedded_SLD = self.memory.rows
        seen = embedded_SLD[:, 0].abs().sum(1).nonzero()[:, 0]
        if len(seen) < len(self.prototypes[0]):
            raise ConfigError(
                f"--objective.prototypes {len(self.prototypes[0])} is more than the {len(seen)}"
                " samples of an epoch"
            )
        self.clusters.fill_(_UNSEEN)
        for head in range(len(self.prototypes)):
            rows_SD = embedded_SLD[seen, head % LARGE]
            start = self._beginning(epoch, head, len(seen)).to(rows_SD.device)
            centres_KD, cluster_S = spherical_k_means(
                rows_SD, rows_SD[start], self.config.iterations
            )
            self.prototypes[head] = centres_KD
            self.clusters[head, seen] = cluster_S

    def _beginning(self, epoch: int, head: int, count: int) -> torch.Tensor:
        """Places of K different rows, drawn by (seed, epoch, head)."""
        draws = uniforms(sample_keys(self.seed, epoch, np.arange(count), head, Stream.CLUSTER))
        return torch.from_numpy(np.argsort(draws, kind="stable")[: len(self.prototypes[0])])
