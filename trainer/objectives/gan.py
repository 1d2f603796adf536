"""GAN features: is an image real, or has the other network made it?

Radford et al. 2016 (DCGAN, arXiv 1511.06434): what a discriminator has learnt is of use for other
tasks. The encoder is the discriminator here; a generator of a few layers is its adversary, and both
learn in one step. A baseline for small images.

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
from trainer.objectives.parts.discriminator import fooling, telling, told
from trainer.objectives.parts.draws import normal_draws
from trainer.objectives.parts.global_mean import global_mean

_CHANNELS, _SIDE = 256, 4  # of the maps that a code becomes first


@dataclass(frozen=True, kw_only=True)
class GANConfig(ObjectiveConfig):
    """The losses of a discriminator and of its generator."""

    looks: ClassVar[int] = 1

    name: tyro.conf.Suppress[Literal["gan"]] = "gan"
    """Which objective a saved configuration describes."""
    code: int = 128
    """Z: numbers that an image is made of, drawn anew for each and every step."""

    def __post_init__(self) -> None:
        check_bounds(self, "--objective.", code="[1, 1e9]")

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "GAN":
        """The encoder, a layer for its verdict, and a generator; there is no projection head.

        Raises:
            ConfigError: the encoder has BatchNorm; or images are no power of two times 4 pixels.
        """
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
        self.verdict = nn.Linear(encoder.feature_dim, 1)
        self.from_code = nn.Linear(config.code, _CHANNELS * _SIDE**2)
        self.decoder = Decoder(_CHANNELS, given.side // _SIDE)

    def forward(self, inputs: Inputs) -> Outputs:
        """Logits ``made`` and ``real``, ``(N,)``, of as many made images as there are real ones."""
        images_NCHW = inputs.views[0][0]
        made_NCHW = self._made(inputs).contiguous(memory_format=torch.channels_last)
        return Outputs(told(self._judge, made_NCHW, images_NCHW, 1.0))

    def _made(self, inputs: Inputs) -> torch.Tensor:
        drawn = (self.given.seed, inputs.step, inputs.ids_N, Stream.NOISE, self.config.code)
        code_NZ = normal_draws(*drawn).to(inputs.views[0].dtype)
        maps_NChw = self.from_code(code_NZ).unflatten(1, (_CHANNELS, _SIDE, _SIDE))
        made_NCHW: torch.Tensor = self.decoder(maps_NChw)
        return made_NCHW

    def _judge(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        logits_N: torch.Tensor = self.verdict(self.encoder(images_NCHW))[:, 0]
        return logits_N

    def pictures(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """What is made beside what is real, which have nothing to do with each other."""
        return {"made": self._made(inputs), "image": inputs.views[0][0]}

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """The generator's (not the saturating one) and the discriminator's, 3 ln 2 by chance."""
        made_N, real_N = outputs.rows["made"], outputs.rows["real"]
        dtype = statistics_dtype(made_N.dtype)
        made_N, real_N = made_N.to(dtype), real_N.to(dtype)
        losses_N2 = torch.stack([fooling(made_N), telling(made_N, real_N)], 1)
        fooled, judged = global_mean(losses_N2)
        metrics = {"generator_loss": fooled.detach(), "discriminator_loss": judged.detach()}
        return Loss(fooled + judged, metrics)
