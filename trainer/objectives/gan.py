"""GAN features: is an image real, or has the other network made it?

Radford et al. 2016 (DCGAN, arXiv 1511.06434): what a discriminator has learnt is of use for other
tasks. The encoder is the discriminator here; a generator of a few layers is its adversary, and both
learn in one step. Or it is the generator's inverse (BiGAN, Donahue et al. 2017, arXiv 1605.09782):
it makes codes of images, and another discriminator tells images with their codes from codes with
what is made of them. Baselines for small images.

Shapes: N images of this process, C = 3 channels, S pixels of a side, Z numbers of a code.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import tyro
from torch import nn

from common.bounds import check_bounds
from common.randomness import Stream
from kernels.ntxent.reference import statistics_dtype
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig
from trainer.objectives.base import Given, Inputs, Loss, Objective, ObjectiveConfig, Outputs
from trainer.objectives.cost import LossCost, StepSizes, softmax_cost
from trainer.objectives.parts.alone import check_alone
from trainer.objectives.parts.decoder import Decoder
from trainer.objectives.parts.discriminator import Discriminator, fooling, telling, told
from trainer.objectives.parts.draws import normal_draws
from trainer.objectives.parts.global_mean import global_mean

_CHANNELS, _SIDE = 256, 4  # of the maps that a code becomes first


@dataclass(frozen=True, kw_only=True)
class GANConfig(ObjectiveConfig):
    """The losses of a discriminator and of its generator."""

    looks: ClassVar[int] = 1

    name: tyro.conf.Suppress[Literal["gan"]] = "gan"
    """Which objective a saved configuration describes."""
    learns: Literal["discriminator", "inverse"] = "discriminator"
    """What the encoder is: the discriminator, or the inverse of the generator (BiGAN)."""
    code: int = 128
    """Z: numbers that an image is made of, drawn anew for each and every step."""

    def __post_init__(self) -> None:
        check_bounds(self, "--objective.", code="[1, 1e9]")

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "GAN":
        """The encoder, a layer for its verdict, and a generator; there is no projection head.

        Raises:
            ConfigError: the encoder has BatchNorm; or images are no power of two times 4 pixels.
        """
        if self.learns == "discriminator":
            check_alone(encoder)
        return GAN(encoder, self, given)

    def cost(self, step: StepSizes) -> LossCost:
        """Two numbers an image."""
        return softmax_cost(2 * step.local_batch, 1, 1)

    def compares(self, batch: int, num_samples: int) -> str:
        """Real and made."""
        return "an image and one that is made"


class GAN(Objective):
    """A discriminator and a generator."""

    config: GANConfig

    def __init__(self, encoder: Encoder, config: GANConfig, given: Given) -> None:
        super().__init__(encoder, None, config)
        self.given = given
        if config.learns == "inverse":
            self.to_code = nn.Linear(encoder.feature_dim, config.code)
            self.discriminator = Discriminator(given.side, config.code)
        else:
            self.verdict = nn.Linear(encoder.feature_dim, 1)
        self.from_code = nn.Linear(config.code, _CHANNELS * _SIDE**2)
        self.decoder = Decoder(_CHANNELS, given.side // _SIDE)

    def forward(self, inputs: Inputs) -> Outputs:
        """Logits ``made`` and ``real``, ``(N,)``, of as many made images as there are real ones."""
        images_NCHW, code_NZ = inputs.views[0][0], self._code(inputs)
        made_NCHW = self._made(code_NZ).contiguous(memory_format=torch.channels_last)
        if self.config.learns == "discriminator":
            return Outputs(told(self._judge, [made_NCHW], [images_NCHW], 1.0))
        real_NZ = self.to_code(self.encoder(images_NCHW))
        made, real = (made_NCHW, code_NZ), (images_NCHW, real_NZ)
        return Outputs(told(self.discriminator, made, real, 1.0))

    def _code(self, inputs: Inputs) -> torch.Tensor:
        drawn = (self.given.seed, inputs.step, inputs.ids_N, Stream.NOISE, self.config.code)
        return normal_draws(*drawn).to(inputs.views[0].dtype)

    def _made(self, code_NZ: torch.Tensor) -> torch.Tensor:
        maps_NChw = self.from_code(code_NZ).unflatten(1, (_CHANNELS, _SIDE, _SIDE))
        made_NCHW: torch.Tensor = self.decoder(maps_NChw)
        return made_NCHW

    def _judge(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        logits_N: torch.Tensor = self.verdict(self.encoder(images_NCHW))[:, 0]
        return logits_N

    def pictures(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """What is made beside what is real, which have nothing to do with each other but where the
        encoder tells what to make an image of."""
        images_NCHW = inputs.views[0][0]
        if self.config.learns == "discriminator":
            return {"made": self._made(self._code(inputs)), "image": images_NCHW}
        again_NCHW = self._made(self.to_code(self.encoder(images_NCHW)))
        return {"made of its code": again_NCHW, "image": images_NCHW}

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """The generator's (not the saturating one) and the discriminator's, 3 ln 2 by chance; with
        an inverse its own as well, 4 ln 2."""
        made_N, real_N = outputs.rows["made"], outputs.rows["real"]
        dtype = statistics_dtype(made_N.dtype)
        made_N, real_N = made_N.to(dtype), real_N.to(dtype)
        fooling_N = fooling(made_N)
        if self.config.learns == "inverse":
            fooling_N = fooling_N + fooling(-real_N)
        losses_N2 = torch.stack([fooling_N, telling(made_N, real_N)], 1)
        fooled, judged = global_mean(losses_N2)
        metrics = {"generator_loss": fooled.detach(), "discriminator_loss": judged.detach()}
        return Loss(fooled + judged, metrics)
