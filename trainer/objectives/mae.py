"""Masked autoencoder: a transformer sees a quarter of an image's patches, a small one draws the
rest.

He et al. 2022, arXiv 2111.06377. Hidden patches take no time in the encoder.

Shapes: N images of this process, P patches, K of them seen, X pixels of a patch times channels.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import tyro
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from torchvision.models.vision_transformer import VisionTransformer

from common.bounds import check_bounds
from common.errors import ConfigError
from common.randomness import Stream
from kernels.ntxent.reference import statistics_dtype
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig
from trainer.objectives.base import Given, Inputs, Loss, Objective, ObjectiveConfig, Outputs
from trainer.objectives.cost import LossCost, StepSizes, softmax_cost
from trainer.objectives.parts.draws import uniform_draws
from trainer.objectives.parts.global_mean import global_mean
from trainer.objectives.parts.token_decoder import HEAD, TokenDecoder
from trainer.objectives.parts.tokens import seen_tokens, transformer

_EPSILON = 1e-6  # of a patch's variance


@dataclass(frozen=True, kw_only=True)
class MAEConfig(ObjectiveConfig):
    """Squared error of hidden patches; the defaults are the paper's."""

    looks: ClassVar[int] = 1

    name: tyro.conf.Suppress[Literal["mae"]] = "mae"
    """Which objective a saved configuration describes."""
    ratio: float = 0.75
    """The share of patches that is hidden, others for each image and step."""
    width: int = 512
    """Of the decoder; a multiple of 32."""
    depth: int = 8
    """Blocks of the decoder."""
    standardised: bool = True
    """Whether a patch's pixels have mean 0 and variance 1 where they are compared."""

    def __post_init__(self) -> None:
        check_bounds(self, "--objective.", ratio="(0, 1)", width="[32, 1e6]", depth="[1, 1e4]")
        if self.width % HEAD:
            raise ConfigError(f"--objective.width {self.width}: choose a multiple of {HEAD}")

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "MAE":
        """The encoder and a decoder; there is no projection head.

        Raises:
            ConfigError: the encoder is no vision transformer of torchvision's.
        """
        return MAE(transformer(encoder, "a masked autoencoder", "inpainting"), self, given)

    def cost(self, step: StepSizes) -> LossCost:
        """A difference for each pixel, beside the networks."""
        return softmax_cost(step.local_batch, 3 * step.side**2, 1)

    def compares(self, batch: int, num_samples: int) -> str:
        """Hidden patches."""
        return f"{100 * self.ratio:.0f} % of an image's patches with those decoded"


class MAE(Objective):
    """An encoder of the patches that are seen, and a decoder of all."""

    config: MAEConfig

    def __init__(self, encoder: VisionTransformer, config: MAEConfig, given: Given) -> None:
        super().__init__(encoder, None, config)
        self.given = given
        self.patch = encoder.patch_size
        self.patches = (encoder.image_size // self.patch) ** 2
        self.seen = min(max(round(self.patches * (1 - config.ratio)), 1), self.patches - 1)
        outputs = 3 * self.patch**2
        self.decoder = TokenDecoder(
            encoder.hidden_dim, config.width, config.depth, self.patches, outputs
        )

    def forward(self, inputs: Inputs) -> Outputs:
        """``patches`` as decoded, ``(N, P, X)``, as they are, and which of them were hidden."""
        images_NCHW = inputs.views[0][0]
        draws = (self.given.seed, inputs.step, inputs.ids_N, Stream.MASK, self.patches)
        order_NP = uniform_draws(*draws).argsort(1)
        seen_NK = order_NP[:, : self.seen]
        decoded_NPX = self.decoder(seen_tokens(self.encoder, images_NCHW, seen_NK), seen_NK)
        is_hidden_NP = torch.ones_like(order_NP, dtype=torch.bool).scatter(1, seen_NK, False)
        patches_NPX = pixel_unshuffle(images_NCHW, self.patch).flatten(2).transpose(1, 2)
        fixed = {"patches": patches_NPX, "hidden": is_hidden_NP}
        return Outputs({"patches": decoded_NPX}, fixed)

    def pictures(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """What can be seen, and what is decoded where nothing can, in the hidden patches' own
        brightness and contrast."""
        outputs = self(inputs)
        patches_NPX, decoded_NPX = outputs.fixed["patches"], outputs.rows["patches"]
        if self.config.standardised:
            variance_NP1, mean_NP1 = torch.var_mean(patches_NPX, 2, keepdim=True)
            decoded_NPX = decoded_NPX * variance_NP1.sqrt() + mean_NP1
        hidden_NP1 = outputs.fixed["hidden"][..., None]
        shown = {
            "seen": patches_NPX.masked_fill(hidden_NP1, 0),
            "filled in": torch.where(hidden_NP1, decoded_NPX, patches_NPX),
            "image": patches_NPX,
        }
        side = inputs.views[0].shape[-1] // self.patch
        return {
            name: pixel_shuffle(each.transpose(1, 2).unflatten(2, (side, side)), self.patch)
            for name, each in shown.items()
        }

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """Mean squared error over the hidden patches of all images; 1 or so for a decoder that
        knows their means alone."""
        decoded_NPX, patches_NPX = outputs.rows["patches"], outputs.fixed["patches"]
        dtype = statistics_dtype(decoded_NPX.dtype)
        patches_NPX = patches_NPX.to(dtype)
        if self.config.standardised:
            variance_NP1, mean_NP1 = torch.var_mean(patches_NPX, 2, keepdim=True)
            patches_NPX = (patches_NPX - mean_NP1) / (variance_NP1 + _EPSILON).sqrt()
        errors_NP = (decoded_NPX.to(dtype) - patches_NPX).square().mean(2)
        hidden_NP = outputs.fixed["hidden"].to(dtype)
        (value,) = global_mean((errors_NP * hidden_NP).sum(1, keepdim=True) / hidden_NP[0].sum())
        return Loss(value, {})
