"""Contrastive predictive coding: which patch of all images stands so many rows below?

van den Oord et al. 2018 (arXiv 1807.03748), Henaff et al. 2019 (arXiv 1905.09272). Logits are
cosines over a temperature here, where the papers have plain products.

Shapes: N images of this process, G patches of a grid's side, T = G * G, Q predictions of an image,
C features, D dimensions.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import tyro
from torch import nn

from common.bounds import check_bounds
from common.collectives import rank_and_size
from common.randomness import Stream
from data_pipeline.augment import AugmentConfig
from data_pipeline.crops import CropConfig
from data_pipeline.views import ViewPlan
from kernels.ntxent import two_sided
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig
from trainer.objectives.base import Given, Inputs, Loss, Objective, ObjectiveConfig, Outputs
from trainer.objectives.cost import LossCost, StepSizes, two_sided_cost
from trainer.objectives.parts.alone import check_alone
from trainer.objectives.parts.chromatic_aberration import drop_colours
from trainer.objectives.parts.context import Predictions, check_patches, cut_patches, grid_of
from trainer.objectives.parts.draws import uniform_draws
from trainer.objectives.parts.global_mean import global_mean


@dataclass(frozen=True, kw_only=True)
class CPCConfig(ObjectiveConfig):
    """InfoNCE over all patches of the global batch; defaults for a crop of 256 pixels."""

    looks: ClassVar[int] = 1

    name: tyro.conf.Suppress[Literal["cpc"]] = "cpc"
    """Which objective a saved configuration describes."""
    patch: int = 64
    """Side of a patch in pixels; the next one begins half of it further."""
    nearest: int = 3
    """Rows between a patch and the first that is predicted; 1 has pixels in common."""
    furthest: int = 5
    """The same, of the last."""
    sides: Literal[1, 4] = 4
    """From which the grid is read."""
    dim: int = 64
    """D, of predictions and what they are compared with."""
    temperature: float = 0.1
    """Divides the cosine similarities."""
    colours: Literal["keep", "drop"] = "drop"
    """drop: keep one channel of each patch, drawn anew in each step."""

    def __post_init__(self) -> None:
        check_bounds(
            self,
            "--objective.",
            patch="[2, 65535]",
            nearest="[1, 1000]",
            furthest="[1, 1000]",
            dim="[1, 1e6]",
            temperature="(0, inf)",
        )

    def views(self, crop: CropConfig, augment: AugmentConfig) -> ViewPlan:
        """One view of each image, which is cut into patches.

        Raises:
            ConfigError: its size does not go with the patches'.
        """
        check_patches(crop.size, self.patch, range(self.nearest, self.furthest + 1))
        return super().views(crop, augment)

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "CPC":
        """The encoder, a context network and predictions; there is no projection head.

        Raises:
            ConfigError: the encoder has BatchNorm, whose statistics tell of other patches.
        """
        check_alone(encoder)
        return CPC(encoder, self, given)

    def cost(self, step: StepSizes) -> LossCost:
        """InfoNCE of predictions against patches."""
        grid = grid_of(step.side, self.patch)
        below = sum(grid - offset for offset in range(self.nearest, self.furthest + 1))
        columns = grid**2 * step.local_batch * step.world_size
        return two_sided_cost(self.sides * grid * below * step.local_batch, columns, self.dim)

    def compares(self, batch: int, num_samples: int) -> str:
        """Predictions with patches."""
        return "a patch's place below with all patches of the batch"


class CPC(Objective):
    """An encoder of patches, contexts and predictions."""

    config: CPCConfig

    def __init__(self, encoder: Encoder, config: CPCConfig, given: Given) -> None:
        super().__init__(encoder, None, config)
        self.given, self.grid = given, grid_of(given.side, config.patch)
        width, offsets = encoder.feature_dim, range(config.nearest, config.furthest + 1)
        self.target = nn.Conv2d(width, config.dim, 1)
        self.predictions = Predictions(width, config.dim, self.grid, offsets, config.sides)

    def forward(self, inputs: Inputs) -> Outputs:
        """``predictions``, ``(N, Q, D)``, and ``targets``, ``(N, T, D)``, not normalised."""
        patches_NTCpp = cut_patches(inputs.views[0][0], self.config.patch)
        count = patches_NTCpp.shape[1]
        if self.config.colours == "drop":
            drawn = (self.given.seed, inputs.step, inputs.ids_N, Stream.TILE_COLOUR, count)
            patches_NTCpp = drop_colours(patches_NTCpp, uniform_draws(*drawn))
        patches_RCpp = patches_NTCpp.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        features_NTC = self.encoder(patches_RCpp).unflatten(0, (-1, count))
        z_NCGG = features_NTC.transpose(1, 2).unflatten(2, (self.grid, self.grid)).contiguous()
        targets_NTD = self.target(z_NCGG).flatten(2).transpose(1, 2)
        return Outputs({"predictions": self.predictions(z_NCGG), "targets": targets_NTD})

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """Mean cross-entropy of all predictions over the patches of all images."""
        predictions_NQD, targets_NTD = outputs.rows["predictions"], outputs.rows["targets"]
        images, count, _ = targets_NTD.shape
        first = rank_and_size()[0] * images
        whose_N1 = torch.arange(first, first + images, device=targets_NTD.device)[:, None]
        meant_Q = self.predictions.meant
        value, top1 = two_sided(
            predictions_NQD.flatten(0, 1),
            targets_NTD.flatten(0, 1),
            (count * whose_N1 + meant_Q).flatten(),
            self.config.temperature,
        )
        cosines_NQ = self.predictions.cosines(predictions_NQD, targets_NTD)
        (positive,) = global_mean(cosines_NQ.mean(1, keepdim=True) / self.config.temperature)
        return Loss(value - positive, {"cpc_top1": top1})

    def embedding(self, outputs: Outputs) -> torch.Tensor:
        """What patches are compared by, ``(N * T, D)``."""
        return outputs.rows["targets"].flatten(0, 1)
