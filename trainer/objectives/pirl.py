"""PIRL: an image, and what is left of it when it is cut up or turned, are one row of a memory bank.

Misra & van der Maaten 2020, arXiv 1912.01991: NPID with a second branch, whose image is a jigsaw of
nine tiles in any order, or turned by a multiple of 90 degrees. The bank remembers the image itself.

Shapes: N images of this process, T = 9 tiles, F features, D dimensions.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
import tyro
from torch import nn

from common.bounds import check_bounds
from common.randomness import Stream
from data_pipeline.augment import AugmentConfig
from data_pipeline.crops import CropConfig
from data_pipeline.views import ViewGroup, ViewPlan
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig, ProjectionHead
from trainer.objectives.base import Given, Inputs, Loss, Outputs
from trainer.objectives.cost import LossCost, StepSizes
from trainer.objectives.npid import NPID, MemoryBankConfig
from trainer.objectives.parts.draws import uniform_draws
from trainer.objectives.parts.tiles import TILES, check_tiles, cut_tiles

_TURNS = 4


@dataclass(frozen=True, kw_only=True)
class PIRLConfig(MemoryBankConfig):
    """Two losses against one bank; the defaults are the paper's for ImageNet."""

    name: tyro.conf.Suppress[Literal["pirl"]] = "pirl"
    """Which objective a saved configuration describes."""
    negatives: int = 32000
    """K: rows of other samples that an image is compared with, drawn anew in each step and the same
    for the whole batch and both branches; 0: all samples."""
    transform: Literal["jigsaw", "rotation"] = "jigsaw"
    """What becomes of the second branch's image."""
    weight: float = 0.5
    """Lambda: of the second branch's loss; the first one's has what it lacks to 1."""
    second_crop: CropConfig = field(default_factory=lambda: CropConfig(size=255, scale=(0.6, 1.0)))
    """How the second branch's image is cut; for a jigsaw a side that 3 divides."""
    tile: int = 64
    """Side of a jigsaw's tiles in pixels: about three quarters of a cell."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, "--objective.", weight="[0, 1]", tile="[1, 65535]")

    def views(self, crop: CropConfig, augment: AugmentConfig) -> ViewPlan:
        """One view of --crop.* for the image, one of the second crop for what becomes of it.

        Raises:
            ConfigError: its size does not go with the tiles'.
        """
        if self.transform == "jigsaw":
            check_tiles(self.second_crop.size, self.tile, "--objective.second-crop.size")
        second = ViewGroup(self.second_crop, (augment.view2,))
        return (ViewGroup(crop, (augment.view1,)), second)

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "PIRL":
        """Encoder, a head for each branch, and a bank of random directions."""
        built = ProjectionHead(encoder.feature_dim, head)
        return PIRL(encoder, built, self, given)

    def cost(self, step: StepSizes) -> LossCost:
        """InfoNCE with rows of the bank, twice."""
        return super().cost(step)._replace(times=2)


class PIRL(NPID):
    """Encoder, a head for each branch, and memory bank."""

    config: PIRLConfig

    def __init__(
        self, encoder: Encoder, head: ProjectionHead, config: PIRLConfig, given: Given
    ) -> None:
        super().__init__(encoder, head, config, given)
        self.second_head = nn.Linear(encoder.feature_dim, head.out_dim)
        if config.transform == "jigsaw":
            self.of_tiles = nn.Linear(TILES * head.out_dim, head.out_dim)

    def forward(self, inputs: Inputs) -> Outputs:
        """``projections`` and ``transformed``, ``(N, D)``, not normalised, and whose they are."""
        outputs = super().forward(inputs)
        branch = self._jigsaw if self.config.transform == "jigsaw" else self._turned
        return outputs._replace(rows={**outputs.rows, "transformed": branch(inputs)})

    def _jigsaw(self, inputs: Inputs) -> torch.Tensor:
        def draws(stream: Stream, count: int) -> torch.Tensor:
            return uniform_draws(self.seed, inputs.step, inputs.ids_N, stream, count)

        tiles_NTCHW = cut_tiles(inputs.views[1][0], self.config.tile, draws(Stream.TILE, 2 * TILES))
        tiles_RCHW = tiles_NTCHW.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        found_NTD = self.second_head(self.encoder(tiles_RCHW)).unflatten(0, (-1, TILES))
        order_NT = draws(Stream.TILE_ORDER, TILES).argsort(1)  # of all there are
        of_tiles: torch.Tensor = self.of_tiles(
            found_NTD.take_along_dim(order_NT[..., None], 1).flatten(1)
        )
        return of_tiles

    def _turned(self, inputs: Inputs) -> torch.Tensor:
        images_NCHW = inputs.views[1][0]
        draw_N1 = uniform_draws(self.seed, inputs.step, inputs.ids_N, Stream.TILE_ORDER, 1)
        turn_N111 = (draw_N1 * _TURNS).long()[..., None, None]
        turned_NCHW = images_NCHW
        for turn in range(1, _TURNS):
            turned_NCHW = torch.where(
                turn_N111 == turn, images_NCHW.rot90(turn, (2, 3)), turned_NCHW
            )
        turned_NCHW = turned_NCHW.contiguous(memory_format=torch.channels_last)
        turned: torch.Tensor = self.second_head(self.encoder(turned_NCHW))
        return turned

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """InfoNCE of both branches against the image's row of the bank and the same negatives."""
        ids_N, weight = outputs.fixed["ids"], self.config.weight
        value, top1 = self._contrast(outputs.rows["projections"], ids_N, step)
        second, second_top1 = self._contrast(outputs.rows["transformed"], ids_N, step)
        both = (1 - weight) * value + weight * second
        metrics = {"contrastive_top1": top1, "transformed_top1": second_top1}
        return Loss(both, metrics)
