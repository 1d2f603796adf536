"""SeLa: predict labels from every view that are given anew each epoch, to equal shares.

Asano et al. 2020, arXiv 1911.05371, with the views, the head and the cosines that Caron et al. 2020
(arXiv 2006.09882) gave it (SeLa-v2). Labels are those that fit what the classifiers say best, of
all that give every prototype about as many images; prototypes are learnt.

Shapes: N images of this process, V views of all sizes, S samples that have been seen, R of them
this process's share, H heads, K prototypes, D dimensions.
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch
import tyro
from torch import nn

from common.bounds import check_bounds
from common.errors import ConfigError
from kernels.ntxent.reference import unit_rows
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig, ProjectionHead
from trainer.objectives.base import Given, Inputs, Loss, Outputs
from trainer.objectives.parts.clustering import ClusteringConfig, ClusteringObjective
from trainer.objectives.parts.multi_crop import LARGE, project_all
from trainer.objectives.parts.prototypes import Prototypes
from trainer.objectives.parts.shared_out import shared_out
from trainer.optim.sharded_norms import whole

_SHARPEST = 350  # times cosines of -1 to 1: their exponentials must be numbers of float64


@dataclass(frozen=True, kw_only=True)
class SeLaConfig(ClusteringConfig):
    """Cross-entropy with labels of equal shares; the defaults are the papers' for ImageNet."""

    name: tyro.conf.Suppress[Literal["sela"]] = "sela"
    """Which objective a saved configuration describes."""
    sharpness: float = 25.0
    """The power that probabilities are raised to before they are shared out; over the temperature
    at most 350."""
    iterations: int = 100
    """At most, of Sinkhorn's algorithm, at each epoch's start."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, "--objective.", sharpness="(0, inf)", iterations="[1, 1e6]")
        if self.sharpness / self.temperature > _SHARPEST:
            raise ConfigError(
                f"--objective.sharpness {self.sharpness:g} over --objective.temperature"
                f" {self.temperature:g} is more than {_SHARPEST}: lower the one or raise the other"
            )

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "SeLa":
        """Encoder, head, prototypes, and empty tables.

        Raises:
            ConfigError: more prototypes than samples.
        """
        return SeLa(encoder, ProjectionHead(encoder.feature_dim, head), self, given)


class SeLa(ClusteringObjective):
    """Encoder, head, prototypes of each head, and each sample's embeddings and labels."""

    config: SeLaConfig

    def __init__(
        self, encoder: Encoder, head: ProjectionHead, config: SeLaConfig, given: Given
    ) -> None:
        super().__init__(encoder, head, config, given)
        made = (Prototypes(config.prototypes, head.out_dim) for _ in range(config.heads))
        self.prototypes = nn.ModuleList(made)

    def forward(self, inputs: Inputs) -> Outputs:
        """``cosines`` of all views with the prototypes of every head, ``(N, H, V, K)``, and the
        unit projections of the large ones, ``(N, 2, D)``."""
        unit_NVD = unit_rows(project_all(self.encoder, self.head, inputs.views))
        unit_RD = unit_NVD.flatten(0, 1)
        cosines = [each(unit_RD).unflatten(0, unit_NVD.shape[:2]) for each in self.prototypes]
        fixed = {"ids": inputs.ids_N, "genuine": inputs.genuine_N}
        fixed["projections"] = unit_NVD[:, :LARGE].detach()
        return Outputs({"cosines": torch.stack(cosines, 1)}, fixed)

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """Mean cross-entropy of all views and heads; see :meth:`Objective.loss`."""
        return self.ask(outputs.rows["cosines"].unbind(1), outputs.fixed["ids"])

    def large(self, outputs: Outputs) -> torch.Tensor:
        """Unit embeddings of the large views, ``(N, 2, D)``."""
        return outputs.fixed["projections"]

    def assign(
        self, epoch: int, head: int, rows_SD: torch.Tensor, own_RD: torch.Tensor
    ) -> torch.Tensor:
        """Near prototypes, in equal shares."""
        config, learnt = self.config, cast(Prototypes, self.prototypes[head])
        prototypes_KD = unit_rows(whole(learnt.weight)).to(own_RD.dtype)
        sharpness = config.sharpness / config.temperature
        return shared_out(own_RD, prototypes_KD, sharpness, config.iterations)
