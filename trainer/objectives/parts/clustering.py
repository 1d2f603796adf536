"""Every view is asked in which clusters its image is; they are made anew before each epoch of what
has been remembered of all images.

Caron et al. 2020, arXiv 2006.09882, appendix. Embeddings of the two large views are remembered as
they pass; the first epoch's come from a pass without training.

Shapes: N images of this process, V views of all sizes, L = 2 large ones, S samples of the data set,
H heads, K prototypes, D dimensions, R samples of this process's share.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from common.bounds import check_bounds
from common.collectives import gather_rows, rank_and_size
from common.errors import ConfigError
from kernels.ntxent.reference import unit_rows
from trainer.models.encoders import Encoder
from trainer.models.heads import ProjectionHead
from trainer.objectives.base import Given, Loss, Objective, Outputs
from trainer.objectives.cost import LossCost, StepSizes, softmax_cost
from trainer.objectives.parts.global_mean import global_mean
from trainer.objectives.parts.multi_crop import LARGE, MultiCropConfig
from trainer.objectives.parts.per_sample import Bits, PerSample

UNSEEN = -1
"""The cluster of a sample that has not been embedded."""


@dataclass(frozen=True, kw_only=True)
class ClusteringConfig(MultiCropConfig):
    """Cross-entropy with clusters; the defaults are the paper's for ImageNet."""

    temperature: float = 0.1
    """Divides the cosine similarities with the prototypes."""
    prototypes: int = 3000
    """K: clusters of each head; at most as many as samples of an epoch."""
    heads: int = 3
    """H: clusterings, each with its own beginning; they take turns with the two large views."""
    memory_bits: Bits = 32
    """That a number takes which is remembered of an image; ImageNet's two rows an image of 128
    numbers are 328 MB of 8 bits, on every process."""

    def __post_init__(self) -> None:
        super().__post_init__()
        bounds = {"temperature": "(0, inf)", "prototypes": "[2, 1e7]", "heads": "[1, 100]"}
        check_bounds(self, "--objective.", **bounds)

    def least_samples(self) -> tuple[int, str]:
        """A sample for each cluster."""
        return self.prototypes, "prototypes"

    def cost(self, step: StepSizes) -> LossCost:
        """Cross-entropy of every view, once for each head."""
        rows = (LARGE + self.small_views) * step.local_batch
        return softmax_cost(rows, self.prototypes, step.dim)._replace(times=self.heads)

    def compares(self, batch: int, num_samples: int) -> str:
        """Every view with the prototypes of every head."""
        views = LARGE + self.small_views
        return f"{views * self.heads * self.prototypes} logits per image"


def check_clusters(setting: str, clusters: int, samples: int, which: str = "samples") -> None:
    """Refuse more clusters than there is something to cluster.

    Raises:
        ConfigError: there are.
    """
    if clusters > samples:
        raise ConfigError(f"--objective.{setting} {clusters} is more than the {samples} {which}")


class ClusteringObjective(Objective):
    """Encoder, head, and each sample's embeddings and clusters.

    Raises:
        ConfigError: more clusters than samples.
    """

    config: ClusteringConfig
    clusters: torch.Tensor

    def __init__(
        self, encoder: Encoder, head: ProjectionHead, config: ClusteringConfig, given: Given
    ) -> None:
        check_clusters("prototypes", config.prototypes, given.num_samples)
        super().__init__(encoder, head, config)
        self.seed = given.seed
        zeros = torch.zeros(given.num_samples, LARGE, head.out_dim)
        self.memory = PerSample(zeros, config.memory_bits)
        unseen = torch.full((config.heads, given.num_samples), UNSEEN)
        self.register_buffer("clusters", unseen)

    def large(self, outputs: Outputs) -> torch.Tensor:
        """Unit embeddings of the large views, ``(N, L, D)``."""
        raise NotImplementedError

    def assign(
        self, epoch: int, head: int, rows_SD: torch.Tensor, own_RD: torch.Tensor
    ) -> torch.Tensor:
        """Of a head, the cluster of each sample of this process's share, int64 ``(R,)``. A
        collective.

        Args:
            epoch: from 0.
            head: from 0.
            rows_SD: what is remembered of all that have been seen.
            own_RD: of this process's share of them.
        """
        raise NotImplementedError

    def ask(self, cosines: Sequence[torch.Tensor], ids_N: torch.Tensor) -> Loss:
        """Mean cross-entropy of all views and heads over the images that have clusters.

        Args:
            cosines: of each head, ``(N, V, K)``.
            ids_N: whose they are.
        """
        clusters_HN = self.clusters[:, ids_N]
        losses, hits = [], []
        for cluster_N, cosines_NVK in zip(clusters_HN, cosines):
            logits_NVK = cosines_NVK / self.config.temperature
            target_NV = cluster_N[:, None].expand(logits_NVK.shape[:2])
            found = cross_entropy(
                logits_NVK.transpose(1, 2), target_NV, ignore_index=UNSEEN, reduction="none"
            )
            losses.append(found.mean(1))
            hits.append((logits_NVK.detach().argmax(2) == target_NV).to(found.dtype).mean(1))
        known_N = (clusters_HN[0] != UNSEEN).to(losses[0].dtype)
        numbers = [sum(losses) / len(losses), sum(hits) / len(hits), known_N]
        value, top1, known = global_mean(torch.stack(numbers, 1))
        return Loss(value / known, {"cluster_top1": (top1 / known).detach()})

    def sample_clusters(self) -> torch.Tensor:
        """Of the first head."""
        return self.clusters[0]

    def embedding(self, outputs: Outputs) -> torch.Tensor:
        """The embeddings of the large views, ``(2*N, D)``."""
        return self.large(outputs).transpose(0, 1).flatten(0, 1)

    def after_step(
        self, outputs: Outputs, step: int, total_steps: int, skipped: torch.Tensor
    ) -> None:
        """Remember the embeddings of the large views."""
        self._remember(outputs, skipped)

    @torch.no_grad()
    def _remember(self, outputs: Outputs, skipped: torch.Tensor | None = None) -> None:
        fixed = outputs.fixed
        self.memory.write(fixed["ids"], self.large(outputs), fixed["genuine"], skipped)

    @torch.no_grad()
    def before_epoch(self, epoch: int, whole_epoch: Callable[[], Iterator[Outputs]]) -> None:
        """Cluster what is remembered; of the first epoch, what a pass over it gives.

        Raises:
            ConfigError: fewer samples than clusters have been embedded.
        """
        if epoch == 0:
            for outputs in whole_epoch():
                self._remember(outputs)
        seen = (self.memory.rows[:, 0] != 0).any(1).nonzero()[:, 0]
        count = self.config.prototypes
        check_clusters("prototypes", count, len(seen), "samples of an epoch")
        self.clusters.fill_(UNSEEN)
        rank, size = rank_and_size()
        shares = [len(share) for share in seen.tensor_split(size)]
        for head in range(self.config.heads):
            rows_SD = unit_rows(self.memory.read(seen)[:, head % LARGE])
            found_R = self.assign(epoch, head, rows_SD, rows_SD.split(shares)[rank])
            self.clusters[head, seen] = gather_rows(found_R, shares)
