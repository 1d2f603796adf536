"""Jigsaw: in which of P orders do an image's nine tiles lie?

Noroozi & Favaro 2016, arXiv 1603.09246; for ResNets Goyal et al. 2019, arXiv 1905.01235. Features
are put in order, not pixels: each tile is encoded once, whatever the number of orders that are
asked for, and the loss is that of shuffled tiles, because one encoder sees them all.

Shapes: N images of this process, T = 9 tiles, L orders of each image, P permutations, W width.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import tyro
from torch import nn

from common.bounds import check_bounds
from common.randomness import Stream
from data_pipeline.augment import AugmentConfig
from data_pipeline.crops import CropConfig
from data_pipeline.views import ViewPlan
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig
from trainer.objectives.base import Given, Inputs, Loss, Objective, ObjectiveConfig, Outputs
from trainer.objectives.cost import LossCost, StepSizes, softmax_cost
from trainer.objectives.parts.classification import classification
from trainer.objectives.parts.draws import uniform_draws
from trainer.objectives.parts.permutations import MOST, permutations_of_nine
from trainer.objectives.parts.tiles import (
    TILES,
    TileEncoder,
    check_tiles,
    cut_tiles,
    joined,
    standardised,
)


@dataclass(frozen=True, kw_only=True)
class JigsawConfig(ObjectiveConfig):
    """Cross-entropy over orders of tiles; the defaults are those for a crop of 255 pixels."""

    looks: ClassVar[int] = 1

    name: tyro.conf.Suppress[Literal["jigsaw"]] = "jigsaw"
    """Which objective a saved configuration describes."""
    permutations: int = 100
    """P: orders to tell apart, up to 1512; any two differ in 7 places or more up to 504, then 6."""
    orders: int = 1
    """L: of them an image is shown in so many in a step; each costs a classifier's pass, no
    encoder's."""
    tile: int = 64
    """Side of a tile in pixels: about three quarters of a cell, a third of --crop.size."""
    width: int = 1000
    """W: of a tile's features before they are joined."""

    def __post_init__(self) -> None:
        bounds = {"permutations": f"[2, {MOST}]", "orders": "[1, 1000]", "tile": "[1, 65535]"}
        check_bounds(self, "--objective.", **bounds, width="[1, 1e9]")

    def views(self, crop: CropConfig, augment: AugmentConfig) -> ViewPlan:
        """One view of each image, which is cut into tiles.

        Raises:
            ConfigError: its size does not go with the tiles'.
        """
        check_tiles(crop.size, self.tile)
        return super().views(crop, augment)

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "Jigsaw":
        """The encoder and a classifier of nine tiles; there is no projection head."""
        return Jigsaw(encoder, self, given.seed)

    def cost(self, step: StepSizes) -> LossCost:
        """A linear classifier, counted with the networks."""
        return softmax_cost(self.orders * step.local_batch, self.permutations, 1)

    def compares(self, batch: int, num_samples: int) -> str:
        """Each order with all."""
        return f"{self.permutations} orders of {TILES} tiles"


class Jigsaw(Objective):
    """An encoder of tiles and a classifier of their order."""

    config: JigsawConfig
    permutations: torch.Tensor

    def __init__(self, encoder: Encoder, config: JigsawConfig, seed: int) -> None:
        super().__init__(encoder, None, config)
        self.seed = seed
        self.tiles = TileEncoder(encoder.feature_dim, config.width)
        self.classifier = nn.Linear(TILES * config.width, config.permutations)
        chosen = permutations_of_nine()[: config.permutations]
        self.register_buffer("permutations", torch.from_numpy(chosen))

    def forward(self, inputs: Inputs) -> Outputs:
        """``logits``, ``(N, L, P)``, and the orders that were shown, ``(N, L)``."""
        config, ids_N = self.config, inputs.ids_N
        places = uniform_draws(self.seed, inputs.step, ids_N, Stream.TILE, 2 * TILES)
        tiles_NTCHW = standardised(cut_tiles(inputs.views[0][0], config.tile, places))
        features_NTW = self.tiles(self.encoder, tiles_NTCHW)
        drawn_NL = uniform_draws(self.seed, inputs.step, ids_N, Stream.TILE_ORDER, config.orders)
        orders_NL = (drawn_NL * config.permutations).long()
        ordered_NLTW = features_NTW[:, None].take_along_dim(
            self.permutations[orders_NL][..., None], 2
        )
        return Outputs({"logits": self.classifier(ordered_NLTW.flatten(2))}, {"orders": orders_NL})

    def pictures(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """Tiles in the first of the orders shown, and put back as the classifier says."""
        outputs = self(inputs)
        shown_NT = self.permutations[outputs.fixed["orders"][:, 0]]
        told_NT = self.permutations[outputs.rows["logits"][:, 0].argmax(1)]
        places = uniform_draws(self.seed, inputs.step, inputs.ids_N, Stream.TILE, 2 * TILES)
        tiles_NTCHW = cut_tiles(inputs.views[0][0], self.config.tile, places)
        # Tile told[k] is said to be at place k, so each goes back to where it is said to come from.
        shown_NTCHW = tiles_NTCHW.take_along_dim(shown_NT[..., None, None, None], 1)
        back_NTCHW = shown_NTCHW.take_along_dim(told_NT.argsort(1)[..., None, None, None], 1)
        return {"shuffled": joined(shown_NTCHW), "put back": joined(back_NTCHW)}

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """Mean cross-entropy over all orders of all images; ln P by chance."""
        value, top1 = classification(outputs.rows["logits"], outputs.fixed["orders"])
        return Loss(value, {"jigsaw_top1": top1})
