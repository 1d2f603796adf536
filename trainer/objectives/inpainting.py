"""Inpainting: what stands where an image was hidden?

A square in the middle (context encoder, Pathak et al. 2016, arXiv 1604.07379, whose features are
learnt without the adversarial term), or most of an image's patches (SimMIM, Xie et al. 2022,
arXiv 2111.09886). What can be seen is no part of the loss.

Shapes: N images of this process, C = 3 channels, S pixels of a side.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import tyro

from common.bounds import check_bounds
from common.errors import ConfigError
from common.randomness import Stream
from data_pipeline.augment import AugmentConfig
from data_pipeline.crops import CropConfig
from data_pipeline.views import ViewPlan
from kernels.ntxent.reference import statistics_dtype
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig
from trainer.objectives.base import Given, Inputs, Loss, ObjectiveConfig, Outputs
from trainer.objectives.cost import LossCost, StepSizes, softmax_cost
from trainer.objectives.parts.decoder import DecodingObjective
from trainer.objectives.parts.discriminator import Discriminator, fooling, telling, told
from trainer.objectives.parts.draws import uniform_draws
from trainer.objectives.parts.global_mean import global_mean
from trainer.objectives.parts.masks import centre_mask, middle, patch_mask


@dataclass(frozen=True, kw_only=True)
class InpaintingConfig(ObjectiveConfig):
    """Error of decoded pixels that were hidden; the defaults are SimMIM's."""

    looks: ClassVar[int] = 1

    name: tyro.conf.Suppress[Literal["inpainting"]] = "inpainting"
    """Which objective a saved configuration describes."""
    hidden: Literal["patches", "centre"] = "patches"
    """patches: some of a grid's, drawn for each image and step; centre: a square, half as wide."""
    patch: int = 32
    """For patches: their side in pixels; an encoder's stride, or a multiple of it."""
    ratio: float = 0.6
    """For patches: the share that is hidden."""
    power: Literal[1, 2] = 1
    """Of a pixel's error: 1 as in SimMIM, 2 as in the context encoder."""
    adversarial: float = 0.0
    """For centre: the share of the loss that is a discriminator's word on the square; the context
    encoder's 0.001 sharpens what it draws, and no features."""

    def __post_init__(self) -> None:
        check_bounds(self, "--objective.", patch="[1, 65535]", ratio="(0, 1)", adversarial="[0, 1)")
        if self.adversarial and self.hidden != "centre":
            raise ConfigError(
                f"--objective.adversarial {self.adversarial} judges a square in the middle; set"
                " --objective.hidden centre"
            )

    def views(self, crop: CropConfig, augment: AugmentConfig) -> ViewPlan:
        """One view of each image.

        Raises:
            ConfigError: its size does not divide into two patches or more.
        """
        if self.hidden == "patches" and (crop.size % self.patch or crop.size < 2 * self.patch):
            raise ConfigError(
                f"--crop.size {crop.size} does not divide into patches of --objective.patch"
                f" {self.patch}"
            )
        return super().views(crop, augment)

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "Inpainting":
        """The encoder and a decoder of its last maps; there is no projection head."""
        return Inpainting(encoder, self, given)

    def cost(self, step: StepSizes) -> LossCost:
        """A difference for each pixel, beside the networks."""
        return softmax_cost(step.local_batch, 3 * step.side**2, 1)

    def compares(self, batch: int, num_samples: int) -> str:
        """Hidden pixels."""
        share = self.ratio if self.hidden == "patches" else 0.25
        return f"{100 * share:.0f} % of an image's pixels with those decoded"


class Inpainting(DecodingObjective):
    """An encoder of what can be seen and a decoder of what can not."""

    config: InpaintingConfig

    def __init__(self, encoder: Encoder, config: InpaintingConfig, given: Given) -> None:
        super().__init__(encoder, config, given)
        if config.adversarial:
            self.discriminator = Discriminator(given.side // 2)

    def forward(self, inputs: Inputs) -> Outputs:
        """``images`` as decoded, ``(N, C, S, S)``, as they are, and what was hidden of them; with a
        discriminator its logits, ``(N,)``."""
        images_NCHW = inputs.views[0][0]
        hidden_N1HW = self._hidden(images_NCHW, inputs)[:, None]
        # 0 is the data's mean, for views are normalised.
        seen_NCHW = images_NCHW.masked_fill(hidden_N1HW, 0)
        rows = {"images": self.decode(seen_NCHW)}
        if self.config.adversarial:
            made, real = middle(rows["images"]), middle(images_NCHW)
            rows |= told(self.discriminator, [made], [real], self.config.adversarial)
        return Outputs(rows, {"images": images_NCHW, "hidden": hidden_N1HW})

    def _hidden(self, images_NCHW: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        images, _, side, _ = images_NCHW.shape
        if self.config.hidden == "centre":
            return centre_mask(images, side, images_NCHW.device)
        patches = (side // self.config.patch) ** 2
        draws_NK = uniform_draws(self.given.seed, inputs.step, inputs.ids_N, Stream.MASK, patches)
        return patch_mask(draws_NK, side, self.config.ratio)

    def pictures(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """What can be seen, and what is decoded where nothing can."""
        outputs = self(inputs)
        images_NCHW, hidden_N1HW = outputs.fixed["images"], outputs.fixed["hidden"]
        filled_NCHW = torch.where(hidden_N1HW, outputs.rows["images"], images_NCHW)
        seen_NCHW = images_NCHW.masked_fill(hidden_N1HW, 0)
        return {"seen": seen_NCHW, "filled in": filled_NCHW, "image": images_NCHW}

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """Mean error over the hidden pixels of all images, of channels as they are normalised; with
        a discriminator a part of the loss is its word, and its own loss is added."""
        decoded, images = outputs.rows["images"], outputs.fixed["images"]
        dtype = statistics_dtype(decoded.dtype)
        hidden_N1HW = outputs.fixed["hidden"].to(dtype)
        errors = (decoded.to(dtype) - images.to(dtype)).abs().pow(self.config.power)
        errors_N = (errors * hidden_N1HW).sum((1, 2, 3)) / (3 * hidden_N1HW.sum((1, 2, 3)))
        share = self.config.adversarial
        if not share:
            (value,) = global_mean(errors_N[:, None])
            return Loss(value, {})
        made_N, real_N = (outputs.rows[name].to(dtype) for name in ("made", "real"))
        losses_N3 = torch.stack([errors_N, fooling(made_N), telling(made_N, real_N)], 1)
        error, fooled, judged = global_mean(losses_N3)
        value = (1 - share) * error + share * fooled + judged
        return Loss(value, {"hidden_error": error.detach(), "discriminator_loss": judged.detach()})
