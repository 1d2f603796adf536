"""Autoencoders: give an image back, from itself, from noise, or from fewer pixels.

Vincent et al. 2008 (denoising); Dong et al. 2014, arXiv 1501.00092 (super-resolution). Baselines:
what an encoder learns by them is far below what it learns by any other objective here, and the
distance is what they are for.

Shapes: N images of this process, C = 3 channels, S pixels of a side.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import tyro
from torch.nn.functional import interpolate

from common.bounds import check_bounds
from common.constants import constants
from common.errors import ConfigError
from common.randomness import Stream
from data_pipeline.augment import AugmentConfig
from data_pipeline.crops import CropConfig
from data_pipeline.views import ViewPlan
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig
from trainer.objectives.base import Given, Inputs, Loss, ObjectiveConfig, Outputs
from trainer.objectives.cost import LossCost, StepSizes, softmax_cost
from trainer.objectives.parts.decoder import DecodingObjective, psnr, squared_errors
from trainer.objectives.parts.draws import normal_draws
from trainer.objectives.parts.global_mean import global_mean


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(ObjectiveConfig):
    """Squared error of a decoded image."""

    looks: ClassVar[int] = 1

    name: tyro.conf.Suppress[Literal["autoencoder"]] = "autoencoder"
    """Which objective a saved configuration describes."""
    given: Literal["image", "noisy", "small"] = "image"
    """What the encoder sees: the image (autoencoder), the image with noise (denoising), the image
    after it was made smaller and large again (super-resolution)."""
    noise: float = 0.5
    """For noisy: deviation of the noise, in deviations of the data's channels."""
    factor: int = 4
    """For small: how many times fewer pixels a side has."""

    def __post_init__(self) -> None:
        check_bounds(self, "--objective.", noise="(0, inf)", factor="[2, 1024]")

    def views(self, crop: CropConfig, augment: AugmentConfig) -> ViewPlan:
        """One view of each image.

        Raises:
            ConfigError: its size does not divide by the factor.
        """
        if self.given == "small" and crop.size % self.factor:
            raise ConfigError(
                f"--crop.size {crop.size} does not divide by --objective.factor {self.factor}"
            )
        return super().views(crop, augment)

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "Autoencoder":
        """The encoder and a decoder of its last maps; there is no projection head."""
        return Autoencoder(encoder, self, given)

    def cost(self, step: StepSizes) -> LossCost:
        """A difference for each pixel, beside the networks."""
        return softmax_cost(step.local_batch, 3 * step.side**2, 1)

    def compares(self, batch: int, num_samples: int) -> str:
        """Pixels."""
        return "an image's pixels with those decoded"


class Autoencoder(DecodingObjective):
    """An encoder and a decoder."""

    config: AutoencoderConfig

    def forward(self, inputs: Inputs) -> Outputs:
        """``images`` as decoded, ``(N, C, S, S)``, and as they are."""
        images_NCHW = inputs.views[0][0]
        decoded_NCHW = self.decode(self._shown(images_NCHW, inputs))
        return Outputs({"images": decoded_NCHW}, {"images": images_NCHW})

    def _shown(self, images_NCHW: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        config = self.config
        if config.given == "noisy":
            pixels = images_NCHW[0].numel()
            noise = normal_draws(self.given.seed, inputs.step, inputs.ids_N, Stream.NOISE, pixels)
            return images_NCHW + config.noise * noise.to(images_NCHW.dtype).view_as(images_NCHW)
        if config.given == "small":
            side = images_NCHW.shape[-1]
            small = interpolate(
                images_NCHW.float(), side // config.factor, mode="bicubic", antialias=True
            )
            return interpolate(small, side, mode="bicubic").to(images_NCHW.dtype)
        return images_NCHW

    def pictures(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """What the encoder is given, and what is made of it."""
        images_NCHW = inputs.views[0][0]
        shown_NCHW = self._shown(images_NCHW, inputs)
        return {"given": shown_NCHW, "decoded": self.decode(shown_NCHW), "image": images_NCHW}

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """Mean squared error over all pixels, of channels as they are normalised; 1 or so for a
        decoder that knows the data's mean alone."""
        squares_NC = squared_errors(outputs.rows["images"], outputs.fixed["images"])
        of_white_N = (squares_NC.detach() * constants(self.given.std, squares_NC).square()).mean(1)
        value, error = global_mean(torch.stack([squares_NC.mean(1), of_white_N], 1))
        return Loss(value, {"psnr": psnr(error)})
