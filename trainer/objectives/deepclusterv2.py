"""DeepCluster-v2: predict an image's cluster from every view; k-means makes them anew each epoch.

Caron et al. 2020, arXiv 2006.09882, appendix. A head's prototypes are the centres of its clusters,
and stay fixed for an epoch.

Shapes: N images of this process, V views of all sizes, S samples that have been seen, R of them
this process's share, H heads, K prototypes, D dimensions.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import tyro

from common.bounds import check_bounds
from common.randomness import Stream
from kernels.ntxent.reference import unit_rows
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig, ProjectionHead
from trainer.objectives.base import Given, Inputs, Loss, Outputs
from trainer.objectives.parts.clustering import ClusteringConfig, ClusteringObjective
from trainer.objectives.parts.draws import drawn
from trainer.objectives.parts.k_means import k_means
from trainer.objectives.parts.multi_crop import LARGE, project_all


@dataclass(frozen=True, kw_only=True)
class DeepClusterV2Config(ClusteringConfig):
    """Cross-entropy with clusters; the defaults are the paper's for ImageNet."""

    name: tyro.conf.Suppress[Literal["deepclusterv2"]] = "deepclusterv2"
    """Which objective a saved configuration describes."""
    iterations: int = 10
    """Of k-means, at each epoch's start."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, "--objective.", iterations="[1, 1e6]")

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "DeepClusterV2":
        """Encoder, head, and empty tables.

        Raises:
            ConfigError: more clusters than samples.
        """
        return DeepClusterV2(encoder, ProjectionHead(encoder.feature_dim, head), self, given)


class DeepClusterV2(ClusteringObjective):
    """Encoder, head, each sample's embeddings and clusters, and their centres."""

    config: DeepClusterV2Config
    prototypes: torch.Tensor

    def __init__(
        self, encoder: Encoder, head: ProjectionHead, config: DeepClusterV2Config, given: Given
    ) -> None:
        super().__init__(encoder, head, config, given)
        shape = (config.heads, config.prototypes, head.out_dim)
        self.register_buffer("prototypes", torch.zeros(shape))

    def forward(self, inputs: Inputs) -> Outputs:
        """``projections`` of all views, ``(N, V, D)``, the large ones first, and whose they are."""
        rows = {"projections": project_all(self.encoder, self.head, inputs.views)}
        return Outputs(rows, {"ids": inputs.ids_N, "genuine": inputs.genuine_N})

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """Mean cross-entropy of all views and heads; see :meth:`Objective.loss`."""
        unit_NVD = unit_rows(outputs.rows["projections"])
        cosines = [unit_NVD @ centres_KD.to(unit_NVD.dtype).T for centres_KD in self.prototypes]
        return self.ask(cosines, outputs.fixed["ids"])

    def large(self, outputs: Outputs) -> torch.Tensor:
        """Unit embeddings of the large views, ``(N, 2, D)``."""
        return unit_rows(outputs.rows["projections"][:, :LARGE])

    def assign(
        self, epoch: int, head: int, rows_SD: torch.Tensor, own_RD: torch.Tensor
    ) -> torch.Tensor:
        """By k-means, from rows drawn by (seed, epoch, head)."""
        places_S = torch.arange(len(rows_SD), device=rows_SD.device)
        first_K = drawn(self.seed, epoch, places_S, Stream.CLUSTER, self.config.prototypes, head)
        start_KD = rows_SD[first_K]
        self.prototypes[head], found_R = k_means(
            own_RD, start_KD, self.config.iterations, spherical=True
        )
        return found_R
