"""DeepCluster: k-means of all images' features before each epoch, and a classifier of the clusters
that starts anew.

Caron et al. 2018, arXiv 1807.05520. A pass without training gives the features; their whitened
principal components are clustered, and an epoch shows every cluster equally often. Not as there:
features are those of views as in training, and colours are altered where the authors' network saw
edges alone (a Sobel filter's).

Shapes: N images of this process, S samples of the data set, R of them seen by this process, F
features, C components, K clusters.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import tyro

from common.bounds import check_bounds
from common.randomness import Stream
from data_pipeline.reading.order import EpochOrder
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig
from trainer.objectives.base import Given, Inputs, Loss, Objective, ObjectiveConfig, Outputs
from trainer.objectives.cost import LossCost, StepSizes, softmax_cost
from trainer.objectives.parts.classification import classification
from trainer.objectives.parts.clustering import UNSEEN, check_clusters
from trainer.objectives.parts.draws import drawn, normal_draws
from trainer.objectives.parts.fresh_linear import FreshLinear
from trainer.objectives.parts.global_sum import global_sum
from trainer.objectives.parts.k_means import k_means
from trainer.objectives.parts.whitening import whitened

_DEVIATION = 0.01  # of the classifier's first weights


@dataclass(frozen=True, kw_only=True)
class DeepClusterConfig(ObjectiveConfig):
    """Cross-entropy with clusters; the defaults are the paper's for ImageNet."""

    looks: ClassVar[int] = 1

    name: tyro.conf.Suppress[Literal["deepcluster"]] = "deepcluster"
    """Which objective a saved configuration describes."""
    clusters: int = 10000
    """K; at most as many as samples of an epoch."""
    components: int = 256
    """Of features, that are clustered: those of the greatest variance."""
    iterations: int = 20
    """Of k-means, at each epoch's start."""

    def __post_init__(self) -> None:
        whole = "[1, 1e6]"
        bounds = {"clusters": "[2, 1e7]", "components": whole, "iterations": whole}
        check_bounds(self, "--objective.", **bounds)

    def least_samples(self) -> tuple[int, str]:
        """One for each cluster."""
        return self.clusters, "clusters"

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "DeepCluster":
        """The encoder and a classifier; there is no projection head.

        Raises:
            ConfigError: more clusters than samples.
        """
        check_clusters("clusters", self.clusters, given.num_samples)
        return DeepCluster(encoder, self, given)

    def cost(self, step: StepSizes) -> LossCost:
        """A linear classifier, counted with the networks."""
        return softmax_cost(step.local_batch, self.clusters, 1)

    def compares(self, batch: int, num_samples: int) -> str:
        """An image with the clusters."""
        return f"{self.clusters} clusters"


class DeepCluster(Objective):
    """Encoder, classifier and each sample's cluster."""

    config: DeepClusterConfig
    clusters: torch.Tensor

    def __init__(self, encoder: Encoder, config: DeepClusterConfig, given: Given) -> None:
        super().__init__(encoder, None, config)
        self.seed = given.seed
        self.classifier = FreshLinear(encoder.feature_dim, config.clusters)
        self.register_buffer("clusters", torch.full((given.num_samples,), UNSEEN))

    def forward(self, inputs: Inputs) -> Outputs:
        """``logits``, ``(N, K)``, and the features that they are of, ``(N, F)``."""
        features_NF = self.encoder(inputs.views[0][0])
        fixed = {"features": features_NF.detach(), "ids": inputs.ids_N}
        fixed["genuine"] = inputs.genuine_N
        return Outputs({"logits": self.classifier(features_NF)}, fixed)

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """Mean cross-entropy; see :meth:`Objective.loss`."""
        target_N = self.clusters[outputs.fixed["ids"]]
        value, top1 = classification(outputs.rows["logits"][:, None], target_N[:, None])
        return Loss(value, {"cluster_top1": top1})

    def embedding(self, outputs: Outputs) -> torch.Tensor:
        """The features, ``(N, F)``."""
        return outputs.fixed["features"]

    @torch.no_grad()
    def before_epoch(self, epoch: int, whole_epoch: Callable[[], Iterator[Outputs]]) -> None:
        """Cluster all images anew, and give the classifier a new start.

        Raises:
            ConfigError: an epoch shows fewer samples than there are clusters.
        """
        ids_R, rows_RC = self._components(whole_epoch)
        rows_R = torch.arange(len(ids_R), device=ids_R.device)
        place_S = torch.full_like(self.clusters, UNSEEN).index_copy(0, ids_R, rows_R)
        seen = global_sum((place_S != UNSEEN).long()).nonzero()[:, 0]
        clusters = self.config.clusters
        check_clusters("clusters", clusters, len(seen), "samples of an epoch")
        first_K = drawn(self.seed, epoch, seen, Stream.CLUSTER, clusters)
        place_K1 = place_S[first_K, None]
        start_KC = global_sum(torch.where(place_K1 == UNSEEN, 0, rows_RC[place_K1[:, 0]]))
        _, cluster_R = k_means(rows_RC, start_KC, self.config.iterations, spherical=False)
        numbers_S = torch.zeros_like(self.clusters).index_copy(0, ids_R, cluster_R - UNSEEN)
        self.clusters.copy_(global_sum(numbers_S) + UNSEEN)
        outputs_K = torch.arange(clusters, device=ids_R.device)
        features = self.classifier.weight_offset.shape[1]
        draws_KF = normal_draws(self.seed, epoch, outputs_K, Stream.WEIGHT, features)
        self.classifier.start(_DEVIATION * draws_KF)

    def _components(
        self, whole_epoch: Callable[[], Iterator[Outputs]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of the samples that this process has seen, and their rows ``(R, C)``; their
        features, which are many times larger, are no longer held then."""
        ids, features = [], []
        for outputs in whole_epoch():
            genuine_N = outputs.fixed["genuine"]  # no stand-ins'
            ids.append(outputs.fixed["ids"][genuine_N])
            features.append(outputs.fixed["features"][genuine_N])
        return torch.cat(ids), whitened(features, self.config.components)

    def sample_clusters(self) -> torch.Tensor:
        """Of the present epoch."""
        return self.clusters

    def order(self, num_samples: int) -> EpochOrder | None:
        """Every cluster as often as any other."""
        if (self.clusters == UNSEEN).all():
            return None
        return EpochOrder.balanced(self.clusters, num_samples)
