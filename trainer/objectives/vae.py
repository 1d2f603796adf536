"""Variational autoencoder: give an image back from a code that says little.

Kingma & Welling 2014, arXiv 1312.6114; beta as in Higgins et al. 2017. A baseline. What is handed
on are the encoder's features, not the code.

Shapes: N images of this process, C = 3 channels, S pixels of a side, Z dimensions of the code.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import tyro
from torch import nn

from common.bounds import check_bounds
from common.constants import constants
from common.randomness import Stream
from kernels.ntxent.reference import statistics_dtype
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig
from trainer.objectives.base import Given, Inputs, Loss, Objective, ObjectiveConfig, Outputs
from trainer.objectives.cost import LossCost, StepSizes, softmax_cost
from trainer.objectives.parts.decoder import Decoder, LastMaps, psnr, squared_errors
from trainer.objectives.parts.draws import normal_draws
from trainer.objectives.parts.global_mean import global_mean


@dataclass(frozen=True, kw_only=True)
class VAEConfig(ObjectiveConfig):
    """The evidence's lower bound, of Gaussian pixels of deviation 1 after normalisation."""

    looks: ClassVar[int] = 1

    name: tyro.conf.Suppress[Literal["vae"]] = "vae"
    """Which objective a saved configuration describes."""
    code: int = 256
    """Z: dimensions of the code."""
    beta: float = 1.0
    """What the code's divergence is multiplied by; 1 is the bound itself."""

    def __post_init__(self) -> None:
        check_bounds(self, "--objective.", code="[1, 1e9]", beta="[0, inf)")

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "VAE":
        """The encoder, a layer for the code's distribution, and a decoder."""
        return VAE(encoder, self, given)

    def cost(self, step: StepSizes) -> LossCost:
        """A difference for each pixel, beside the networks."""
        return softmax_cost(step.local_batch, 3 * step.side**2, 1)

    def compares(self, batch: int, num_samples: int) -> str:
        """Pixels."""
        return f"an image's pixels with those decoded from {self.code} numbers"


class VAE(Objective):
    """An encoder, a code and a decoder."""

    config: VAEConfig

    def __init__(self, encoder: Encoder, config: VAEConfig, given: Given) -> None:
        super().__init__(encoder, None, config)
        self.given = given
        maps = LastMaps(encoder, given.side)
        self.shape = (maps.channels, maps.side, maps.side)
        self.to_code = nn.Linear(encoder.feature_dim, 2 * config.code)
        self.from_code = nn.Linear(config.code, maps.channels * maps.side**2)
        self.decoder = Decoder(maps.channels, given.side // maps.side)

    def forward(self, inputs: Inputs) -> Outputs:
        """``images`` as decoded, ``(N, C, S, S)``, and of the code ``(N, Z)`` the mean and the
        logarithm of the variance."""
        images_NCHW = inputs.views[0][0]
        mean_NZ, log_variance_NZ = self.to_code(self.encoder(images_NCHW)).chunk(2, 1)
        drawn = (self.given.seed, inputs.step, inputs.ids_N, Stream.NOISE, self.config.code)
        noise_NZ = normal_draws(*drawn).to(mean_NZ.dtype)
        code_NZ = mean_NZ + noise_NZ * (0.5 * log_variance_NZ).exp()
        decoded_NCHW = self.decoder(self.from_code(code_NZ).unflatten(1, self.shape))
        rows = {"images": decoded_NCHW, "mean": mean_NZ, "log_variance": log_variance_NZ}
        return Outputs(rows, {"images": images_NCHW})

    def pictures(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """What the code says of an image."""
        outputs = self(inputs)
        return {"decoded": outputs.rows["images"], "image": outputs.fixed["images"]}

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """``(|x - d|^2 / 2 + beta KL) / pixels``: divided, a rate goes with images of any size.

        ``kl``, in nats an image, falls to 0 where the decoder has learnt to do without the code.
        """
        squares_NC = squared_errors(outputs.rows["images"], outputs.fixed["images"])
        dtype = statistics_dtype(outputs.rows["mean"].dtype)
        mean_NZ, log_variance_NZ = (outputs.rows[k].to(dtype) for k in ("mean", "log_variance"))
        kl_N = 0.5 * (mean_NZ.square() + log_variance_NZ.exp() - 1 - log_variance_NZ).sum(1)
        pixels = outputs.fixed["images"][0].numel()
        bound_N = 0.5 * squares_NC.mean(1) + self.config.beta * kl_N / pixels
        of_white_N = (squares_NC.detach() * constants(self.given.std, squares_NC).square()).mean(1)
        value, kl, error = global_mean(torch.stack([bound_N, kl_N.detach(), of_white_N], 1))
        return Loss(value, {"kl": kl.detach(), "psnr": psnr(error)})
