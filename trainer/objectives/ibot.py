"""iBOT: DINO, and each hidden patch of a large view predicts what the average says of that patch.

Zhou et al. 2022, arXiv 2111.07832. Patches have the classes' head, directions and sharpness.

Shapes: N images of this process, L = 2 large views, R = L * N, V views of all sizes, P patches of a
large view, M of them that may be hidden, K directions, D dimensions.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from common.bounds import check_bounds
from common.errors import ConfigError
from common.randomness import Stream
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig
from trainer.objectives.base import Given, Inputs, Loss, Outputs
from trainer.objectives.cost import LossCost, StepSizes, softmax_cost
from trainer.objectives.dino import DINO, TaughtConfig
from trainer.objectives.parts.centre import move_centre
from trainer.objectives.parts.dino_head import DinoHead
from trainer.objectives.parts.draws import uniform_draws
from trainer.objectives.parts.global_mean import global_mean
from trainer.objectives.parts.hidden_patches import PATCH_DRAWS, HiddenPatches, hide_patches
from trainer.objectives.parts.multi_crop import LARGE
from trainer.objectives.parts.tokens import all_tokens, patch_tokens, transformer

_PATCH = 16
_DEVIATION = 0.02  # of the token that stands for a hidden patch, at first


@dataclass(frozen=True, kw_only=True)
class IBOTConfig(TaughtConfig):
    """DINO's settings, and those of hidden patches; the defaults are the paper's for ViT-S/16."""

    name: tyro.conf.Suppress[Literal["ibot"]] = "ibot"
    """Which objective a saved configuration describes."""
    directions: int = 8192
    """K, of the last layer, behind --head.*."""
    small_views: int = 10
    """Views of the small size, beside the two of --crop.size; 0: none."""
    hidden: tuple[float, float] = (0.1, 0.5)
    """Least and greatest share of a large view's patches that are hidden, in a block or a few."""
    hidden_views: float = 0.5
    """Share of large views of which any are."""
    patch_weight: float = 1.0
    """Of the patches' loss beside the views'."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(
            self, "--objective.", hidden="(0, 1)", hidden_views="[0, 1]", patch_weight="[0, inf)"
        )
        if self.hidden[0] > self.hidden[1]:
            least, most = self.hidden
            raise ConfigError(f"--objective.hidden {least:g} {most:g}: the least comes first")

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "IBOT":
        """Encoder, head and last layer, and averages of them.

        Raises:
            ConfigError: the encoder is no vision transformer of torchvision's.
        """
        vit = transformer(encoder, "iBOT", "DINO")
        return IBOT(vit, DinoHead(encoder.feature_dim, head, self.directions), self, given)

    def cost(self, step: StepSizes) -> LossCost:
        """Cross-entropy of every view and of patches, of which there may be more or fewer: a
        plan's are of 16 pixels."""
        patches = round(LARGE * self.hidden[1] * (step.side / _PATCH) ** 2)
        rows = (LARGE + self.small_views + patches) * step.local_batch
        return softmax_cost(rows, self.directions, 1)


class IBOT(DINO):
    """Encoder and head, and moving averages of them."""

    config: IBOTConfig
    patch_centre: torch.Tensor

    def __init__(
        self, encoder: VisionTransformer, head: DinoHead, config: IBOTConfig, given: Given
    ) -> None:
        super().__init__(encoder, head, config)
        self.seed, self.grid = given.seed, given.side // encoder.patch_size
        self.hidden = nn.Parameter(_DEVIATION * torch.randn(1, 1, encoder.hidden_dim))
        self.register_buffer("patch_centre", torch.zeros(config.directions))

    def forward(self, inputs: Inputs) -> Outputs:
        """DINO's ``cosines`` and ``taught``, and those of patches that may be hidden, ``(N, 2, M,
        K)``, with their weights, ``(N, 2, M)``."""
        large_RCHW = inputs.views[0].flatten(0, 1)
        chosen = self.hidden_patches(inputs)
        tokens_RTD = all_tokens(self.encoder, large_RCHW, chosen.is_hidden_RP, self.hidden)
        small = [self.encoder(views.flatten(0, 1)) for views in inputs.views[1:]]
        classes = torch.cat([tokens_RTD[:, 0], *small])
        asked = patch_tokens(tokens_RTD, chosen.asked_RM)
        frozen = inputs.step < self.config.frozen_steps
        found = self.student(torch.cat([classes, asked]), frozen).split([len(classes), len(asked)])
        with torch.no_grad():
            tokens_RTD = all_tokens(self.key.encoder, large_RCHW)
            of_patches = patch_tokens(tokens_RTD, chosen.asked_RM)
            taught = self.key.head(torch.cat([tokens_RTD[:, 0], of_patches]))
            taught = taught.split([len(tokens_RTD), len(of_patches)])
        images = large_RCHW.shape[0] // LARGE

        def by_image(rows: torch.Tensor, *patches: int) -> torch.Tensor:
            return rows.unflatten(0, (-1, images, *patches)).transpose(0, 1)

        each = chosen.asked_RM.shape[1]
        return Outputs(
            {"cosines": by_image(found[0]), "patches": by_image(found[1], each)},
            {
                "taught": by_image(taught[0]),
                "taught_patches": by_image(taught[1], each),
                "weights": by_image(chosen.weight_RM),
            },
        )

    def hidden_patches(self, inputs: Inputs) -> HiddenPatches:
        """Which patches of the large views are hidden, drawn by (seed, step, sample, view)."""
        count = LARGE * PATCH_DRAWS
        draws_NE = uniform_draws(self.seed, inputs.step, inputs.ids_N, Stream.MASK, count)
        draws_RE = draws_NE.unflatten(1, (LARGE, -1)).transpose(0, 1).flatten(0, 1)
        return hide_patches(draws_RE, self.grid, self.config.hidden, self.config.hidden_views)

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """DINO's loss, and the mean over views of the mean cross-entropy of their hidden patches,
        ln K each by chance; see :meth:`Objective.loss`."""
        of_views = super().loss(outputs, step)
        cosines, taught = outputs.rows["patches"], outputs.fixed["taught_patches"]
        logs = (cosines / self.config.temperature).log_softmax(3)
        centred = taught.to(logs.dtype) - self.patch_centre.to(logs.dtype)
        losses_NLM = -((centred / self._sharpness(step)).softmax(3) * logs).sum(3)
        weights_NLM = outputs.fixed["weights"].to(logs.dtype)
        losses_N = (losses_NLM * weights_NLM).sum(2).mean(1)
        (value,) = global_mean(losses_N[:, None])
        metrics = {**of_views.metrics, "patch_loss": value.detach()}
        return Loss(of_views.value + self.config.patch_weight * value, metrics)

    @torch.no_grad()
    def after_step(
        self, outputs: Outputs, step: int, total_steps: int, skipped: torch.Tensor
    ) -> None:
        """Move the averages and the centres."""
        super().after_step(outputs, step, total_steps, skipped)
        taught, momentum = outputs.fixed["taught_patches"], self.config.centre_momentum
        move_centre(self.patch_centre, taught, momentum, skipped)
