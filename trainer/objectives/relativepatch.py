"""Relative patch location: on which of eight sides of the centre tile does a tile lie?

Doersch, Gupta & Efros 2015, arXiv 1505.05192, with the geometry of later work on ResNets
(Kolesnikov et al. 2019, arXiv 1901.09005): each of nine tiles is encoded once, and the centre meets
its eight neighbours.

Shapes: N images of this process, T = 9 tiles, S = 8 sides, W width.
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
from trainer.objectives.parts.chromatic_aberration import drop_colours, project_colours
from trainer.objectives.parts.classification import classification
from trainer.objectives.parts.draws import uniform_draws
from trainer.objectives.parts.tiles import (
    TILES,
    TileEncoder,
    check_tiles,
    cut_tiles,
    joined,
    standardised,
)

_SIDES, _CENTRE = 8, 4
_NEIGHBOURS = [tile for tile in range(TILES) if tile != _CENTRE]


@dataclass(frozen=True, kw_only=True)
class RelativePatchConfig(ObjectiveConfig):
    """Cross-entropy over eight sides; the defaults are those for a crop of 255 pixels."""

    looks: ClassVar[int] = 1

    name: tyro.conf.Suppress[Literal["relativepatch"]] = "relativepatch"
    """Which objective a saved configuration describes."""
    tile: int = 64
    """Side of a tile in pixels: about three quarters of a cell, a third of --crop.size."""
    width: int = 2048
    """W: of a tile's features before it meets another."""
    colours: Literal["keep", "drop", "project"] = "keep"
    """Against lenses that shift colours towards an image's edge, which tells where a tile lay:
    drop keeps one channel of each tile, project takes out the axis from green to magenta. keep
    leaves it to --augment.view1.grayscale."""

    def __post_init__(self) -> None:
        check_bounds(self, "--objective.", tile="[1, 65535]", width="[1, 1e9]")

    def views(self, crop: CropConfig, augment: AugmentConfig) -> ViewPlan:
        """One view of each image, which is cut into tiles.

        Raises:
            ConfigError: its size does not go with the tiles'.
        """
        check_tiles(crop.size, self.tile)
        return super().views(crop, augment)

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "RelativePatch":
        """The encoder and a classifier of pairs; there is no projection head."""
        return RelativePatch(encoder, self, given)

    def cost(self, step: StepSizes) -> LossCost:
        """A linear classifier, counted with the networks."""
        return softmax_cost(_SIDES * step.local_batch, _SIDES, 1)

    def compares(self, batch: int, num_samples: int) -> str:
        """Each neighbour with all sides."""
        return f"{_SIDES} neighbours of a tile, {_SIDES} sides each"


class RelativePatch(Objective):
    """An encoder of tiles and a classifier of the side on which a neighbour lies."""

    config: RelativePatchConfig

    def __init__(self, encoder: Encoder, config: RelativePatchConfig, given: Given) -> None:
        super().__init__(encoder, None, config)
        self.given = given
        self.tiles = TileEncoder(encoder.feature_dim, config.width)
        self.classifier = nn.Sequential(
            nn.Linear(2 * config.width, config.width, bias=False),
            nn.BatchNorm1d(config.width),
            nn.ReLU(),
            nn.Linear(config.width, _SIDES),
        )

    def _tiles(self, inputs: Inputs) -> torch.Tensor:
        config, ids_N = self.config, inputs.ids_N
        images_NCHW = inputs.views[0][0]
        if config.colours == "project":
            images_NCHW = project_colours(images_NCHW, self.given.std)
        places = uniform_draws(self.given.seed, inputs.step, ids_N, Stream.TILE, 2 * TILES)
        tiles_NTCHW = cut_tiles(images_NCHW, config.tile, places)
        if config.colours != "drop":
            return tiles_NTCHW
        kept_NT = uniform_draws(self.given.seed, inputs.step, ids_N, Stream.TILE_COLOUR, TILES)
        return drop_colours(tiles_NTCHW, kept_NT)

    def forward(self, inputs: Inputs) -> Outputs:
        """``logits``, ``(N, S, 8)``: of each neighbour in reading order, those of the sides."""
        features_NTW = self.tiles(self.encoder, standardised(self._tiles(inputs)))
        around_NSW = features_NTW[:, _NEIGHBOURS]
        centre_NSW = features_NTW[:, _CENTRE, None].expand_as(around_NSW)
        pairs_RW = torch.cat([centre_NSW, around_NSW], 2).flatten(0, 1)
        return Outputs({"logits": self.classifier(pairs_RW).unflatten(0, (-1, _SIDES))})

    def pictures(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """Each image's tiles, and its neighbours on the sides where they are said to lie; of
        several on one side the last one, on a side without any nothing."""
        tiles_NTCHW, said_NS = self._tiles(inputs), self(inputs).rows["logits"].argmax(2)
        put_NTCHW = torch.zeros_like(tiles_NTCHW)
        put_NTCHW[:, _CENTRE] = tiles_NTCHW[:, _CENTRE]
        numbers_N = torch.arange(len(said_NS), device=said_NS.device)
        for side, tile in enumerate(_NEIGHBOURS):
            # Sides leave out the centre.
            place_N = said_NS[:, side] + (said_NS[:, side] >= _CENTRE)
            put_NTCHW[numbers_N, place_N] = tiles_NTCHW[:, tile]
        return {"tiles": joined(tiles_NTCHW), "put where they are said to lie": joined(put_NTCHW)}

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """Mean cross-entropy over all neighbours of all images; ln 8 by chance."""
        logits_NS8 = outputs.rows["logits"]
        sides_NS = torch.arange(_SIDES, device=logits_NS8.device).expand(logits_NS8.shape[:2])
        value, top1 = classification(logits_NS8, sides_NS)
        return Loss(value, {"relativepatch_top1": top1})
