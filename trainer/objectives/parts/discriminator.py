"""Real or made? The adversary of a generator (Goodfellow et al. 2014, arXiv 1406.2661), in one step
with it.

Both learn from one pass forward and one backward: the discriminator's gradient is turned where it
leaves towards the generator.

Shapes: N images of this process, C = 3 channels, s pixels of a side.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from kernels.ntxent.reference import statistics_dtype

_NARROWEST, _WIDEST = 64, 512  # channels, as DCGAN's (arXiv 1511.06434)
_SMALLEST = 4  # pixels of the last maps' side
_SUREST = -30.0  # logit from which on the generator is told less, or 16 bits would overflow


class Discriminator(nn.Module):
    """Convolutions of stride 2 down to 4 pixels, then a logit. Images are normalised one by one:
    BatchNorm would tell made ones by the company that they keep.

    Args:
        side: s.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs, outputs = 3, _NARROWEST
        while side > _SMALLEST:
            layers.append(nn.Conv2d(inputs, outputs, 4, stride=2, padding=1))
            if inputs != 3:
                layers.append(nn.GroupNorm(1, outputs))
            layers.append(nn.LeakyReLU(0.2))
            side, inputs, outputs = side // 2, outputs, min(2 * outputs, _WIDEST)
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * side**2, 1))

    def forward(self, images_NCss: torch.Tensor) -> torch.Tensor:
        """Logits ``(N,)``: above 0 of what it takes for real."""
        logits_N: torch.Tensor = self.layers(images_NCss)[:, 0]
        return logits_N


def told(
    judge: Callable[[torch.Tensor], torch.Tensor],
    made: torch.Tensor,
    real: torch.Tensor,
    share: float,
) -> dict[str, torch.Tensor]:
    """Logits of images ``made`` and ``real``, for :func:`telling`; by them, whoever made the images
    gets the gradient of ``share`` times :func:`fooling`.

    Args:
        judge: images to logits ``(N,)``, each image alone, as no BatchNorm does.
    """
    said: list[torch.Tensor] = []
    logits_N = judge(_Turned.apply(made, said, share))
    said.append(logits_N.detach())
    return {"made": logits_N, "real": judge(real)}


class _Turned(torch.autograd.Function):
    """Turns the gradient of softplus(f) into that of share * softplus(-f), image by image.

    By f they are sigmoid(f) and -share * sigmoid(-f): -share * exp(-f) times the other. What an
    image is told depends on it alone, so the factor may as well stand behind the network.
    """

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, said: list[torch.Tensor], share: float) -> Any:
        ctx.said, ctx.share = said, share
        return images.view_as(images)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (logits_N,) = ctx.said
        logits_N = logits_N.to(statistics_dtype(logits_N.dtype)).clamp(min=_SUREST)
        factor_N = -ctx.share * (-logits_N).exp()
        return gradient * factor_N.to(gradient.dtype)[:, None, None, None], None, None


def fooling(made_N: torch.Tensor) -> torch.Tensor:
    """The generator's loss of each image, not the saturating one: ln 2 at first. No gradient."""
    return softplus(-made_N.detach())


def telling(made_N: torch.Tensor, real_N: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss of each image: 2 ln 2 at first."""
    return softplus(made_N) + softplus(-real_N)
