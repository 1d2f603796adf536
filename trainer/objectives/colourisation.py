"""Colourisation: which colours did a grey image have?

Zhang, Isola & Efros 2016, arXiv 1603.08511: hues in cells of CIE Lab's plane, at a quarter of the
image's side, rare ones with more weight. Or their distance, as a baseline.

Shapes: N images of this process, Q cells, h pixels of a side at a quarter or so.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import tyro
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate

from common.bounds import check_bounds
from common.errors import ConfigError
from kernels.ntxent.reference import statistics_dtype
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig
from trainer.objectives.base import Given, Inputs, Loss, ObjectiveConfig, Outputs
from trainer.objectives.cost import LossCost, StepSizes, softmax_cost
from trainer.objectives.parts.decoder import DecodingObjective
from trainer.objectives.parts.global_mean import global_mean
from trainer.objectives.parts.hue_weights import HueWeights
from trainer.objectives.parts.lab import HueCells, lab_to_rgb, rgb_to_lab

_QUARTER = 4  # what hues' sides are smaller by
_GREY = 5.0  # an image without a hue further from grey than this teaches nothing
_SCALE = 110.0  # of a and b
_SHARPNESS = 0.38  # a temperature, between the most likely hue and the mean of all


@dataclass(frozen=True, kw_only=True)
class ColourisationConfig(ObjectiveConfig):
    """Cross-entropy over cells of hues, or the squared distance to a hue."""

    looks: ClassVar[int] = 1

    name: tyro.conf.Suppress[Literal["colourisation"]] = "colourisation"
    """Which objective a saved configuration describes."""
    decodes: Literal["cells", "hues"] = "cells"
    """cells: a class of each pixel, of 261; hues: a and b of CIE Lab, by their squared error."""
    uniform: float = 0.5
    """For cells: the share of a uniform distribution in that by whose inverse cells are weighted;
    the rest is what the run's images have had so far. 1: no weights."""

    def __post_init__(self) -> None:
        check_bounds(self, "--objective.", uniform="(0, 1]")

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "Colourisation":
        """The encoder and a decoder of its last maps; there is no projection head.

        Raises:
            ConfigError: the encoder sees colours.
        """
        if encoder.sees != "grey":
            raise ConfigError(
                "--encoder.sees colours: an encoder that is to tell them must not; set"
                " --encoder.sees grey"
            )
        return Colourisation(encoder, self, given)

    def cost(self, step: StepSizes) -> LossCost:
        """A classifier of each pixel at a quarter of the side, whose logits are all held."""
        pixels = step.local_batch * (step.side // _QUARTER) ** 2
        return softmax_cost(pixels, len(HueCells()) if self.decodes == "cells" else 2, 1)

    def compares(self, batch: int, num_samples: int) -> str:
        """Hues."""
        return "a pixel's hue with those decoded from grey"


class Colourisation(DecodingObjective):
    """An encoder of grey images and a decoder of hues."""

    config: ColourisationConfig

    def __init__(self, encoder: Encoder, config: ColourisationConfig, given: Given) -> None:
        cells = HueCells()
        outputs = len(cells) if config.decodes == "cells" else 2
        super().__init__(encoder, config, given, outputs, _QUARTER)
        self.cells = cells
        self.weights = HueWeights(cells, config.uniform)

    def forward(self, inputs: Inputs) -> Outputs:
        """``hues`` as decoded, ``(N, Q, h, h)`` logits or ``(N, 2, h, h)``, and as they are."""
        images_NCHW = inputs.views[0][0]
        decoded_NQhw = self.decode(images_NCHW)
        smaller = images_NCHW.shape[-1] // decoded_NQhw.shape[-1]
        hues_N2hw = avg_pool2d(self._lab(images_NCHW)[:, 1:], smaller)
        return Outputs({"hues": decoded_NQhw}, {"hues": hues_N2hw})

    def _lab(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        dtype = statistics_dtype(images_NCHW.dtype)
        return rgb_to_lab(self.given.colours(images_NCHW.to(dtype)))

    def pictures(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """The image in grey, and in the hues that are decoded: of cells their mean, by
        probabilities sharpened as in the paper."""
        images_NCHW = inputs.views[0][0]
        decoded = self.decode(images_NCHW)
        if self.config.decodes == "cells":
            shares_NQhw = (decoded / _SHARPNESS).softmax(1)
            centres_Q2 = self.cells.centres_Q2.to(decoded.device)
            hues_N2hw = torch.einsum("nqhw,qc->nchw", shares_NQhw, centres_Q2)
        else:
            hues_N2hw = decoded * _SCALE
        hues_N2HW = interpolate(hues_N2hw, images_NCHW.shape[-1], mode="bilinear")
        lightness_N1HW = self._lab(images_NCHW)[:, :1]
        grey_N3HW = torch.cat([lightness_N1HW, torch.zeros_like(hues_N2HW)], 1)
        coloured_N3HW = torch.cat([lightness_N1HW, hues_N2HW], 1)
        grey, coloured = (
            self.given.normalised(lab_to_rgb(lab)) for lab in (grey_N3HW, coloured_N3HW)
        )
        return {"grey": grey, "coloured": coloured, "image": images_NCHW}

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """Mean over the images that have any colour; for cells ln 261 at first."""
        decoded, hues_N2hw = outputs.rows["hues"], outputs.fixed["hues"]
        decoded = decoded.to(statistics_dtype(decoded.dtype))
        coloured_N = _coloured(hues_N2hw).to(decoded.dtype)
        if self.config.decodes == "hues":
            errors_N = (decoded - hues_N2hw.to(decoded.dtype) / _SCALE).square().mean((1, 2, 3))
            error, coloured = global_mean(torch.stack([errors_N * coloured_N, coloured_N], 1))
            return Loss(error / coloured.clamp_min(1e-12), {})
        cells_Nhw = self.cells.of(hues_N2hw)
        losses_Nhw = cross_entropy(decoded, cells_Nhw, reduction="none")
        losses_N = (losses_Nhw * self.weights()[cells_Nhw].to(decoded.dtype)).mean((1, 2))
        hits_N = (decoded.detach().argmax(1) == cells_Nhw).to(decoded.dtype).mean((1, 2))
        sums_N3 = torch.stack([losses_N * coloured_N, hits_N * coloured_N, coloured_N], 1)
        value, top1, coloured = global_mean(sums_N3)
        coloured = coloured.clamp_min(1e-12)
        return Loss(value / coloured, {"colourisation_top1": (top1 / coloured).detach()})

    @torch.no_grad()
    def after_step(
        self, outputs: Outputs, step: int, total_steps: int, skipped: torch.Tensor
    ) -> None:
        """Count the pixels' cells, of all processes: integers, whose sum has no order."""
        if self.config.decodes == "hues":
            return
        hues_N2hw = outputs.fixed["hues"]
        shown_Nhw = _coloured(hues_N2hw)[:, None, None].expand_as(hues_N2hw[:, 0])
        self.weights.add(self.cells.of(hues_N2hw), shown_Nhw & (skipped == 0))


def _coloured(hues_N2hw: torch.Tensor) -> torch.Tensor:
    """Which images have any hue."""
    return hues_N2hw.abs().amax((1, 2, 3)) > _GREY
