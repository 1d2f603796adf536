"""Real or made? The adversary of a generator (Goodfellow et al. 2014, arXiv 1406.2661), in one step
with it.

Both learn from one pass forward and one backward: the discriminator's gradient is turned where it
leaves towards the generator.

Shapes: N images of this process, C = 3 channels, s pixels of a side.
"""

from collections.abc import Callable, Sequence
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
        code: numbers that come with each image, which it is to fit; 0: none.
    """

    def __init__(self, side: int, code: int = 0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs, outputs = 3, _NARROWEST
        while side > _SMALLEST:
            layers.append(nn.Conv2d(inputs, outputs, 4, stride=2, padding=1))
            if inputs != 3:
                layers.append(nn.GroupNorm(1, outputs))
            layers.append(nn.LeakyReLU(0.2))
            side, inputs, outputs = side // 2, outputs, min(2 * outputs, _WIDEST)
        if code:
            self.of_code = nn.Sequential(nn.Linear(code, _WIDEST), nn.LeakyReLU(0.2))
            layers += [nn.Flatten(), nn.Linear(inputs * side**2, _WIDEST), nn.LeakyReLU(0.2)]
            self.layers = nn.Sequential(*layers)
            together = (nn.Linear(2 * _WIDEST, _WIDEST), nn.LeakyReLU(0.2), nn.Linear(_WIDEST, 1))
            self.together = nn.Sequential(*together)
        else:
            self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * side**2, 1))

    def forward(
        self, images_NCss: torch.Tensor, code_NZ: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits ``(N,)``: above 0 of what it takes for real."""
        found: torch.Tensor = self.layers(images_NCss)
        if code_NZ is not None:
            found = self.together(torch.cat([found, self.of_code(code_NZ)], 1))
        return found[:, 0]


def told(
    judge: Callable[..., torch.Tensor],
    made: Sequence[torch.Tensor],
    real: Sequence[torch.Tensor],
    share: float,
) -> dict[str, torch.Tensor]:
    """Logits of images ``made`` and ``real``, for :func:`telling`; by them, whoever made the images
    gets the gradient of ``share`` times :func:`fooling`, and so does who made what comes with the
    real ones, of the opposite.

    Args:
        judge: images, and what comes with them, to logits ``(N,)``, each image alone, as no
            BatchNorm does.
        made: images and what comes with them.
        real: likewise.
    """
    logits: dict[str, torch.Tensor] = {}
    for name, inputs, sign in (("made", made, 1.0), ("real", real, -1.0)):
        said: list[torch.Tensor] = []
        logits[name] = judge(*(_Turned.apply(each, said, share, sign) for each in inputs))
        said.append(logits[name].detach())
    return logits


class _Turned(torch.autograd.Function):
    """Turns the gradient of softplus(f) into that of share * softplus(-f), image by image; with the
    other sign, that of softplus(-f) into that of share * softplus(f).

    By f they are sigmoid(f) and -share * sigmoid(-f): -share * exp(-f) times the other. What an
    image is told depends on it alone, so the factor may as well stand behind the network.
    """

    @staticmethod
    def forward(
        ctx: Any, images: torch.Tensor, said: list[torch.Tensor], share: float, sign: float
    ) -> Any:
        ctx.said, ctx.share, ctx.sign = said, share, sign
        return images.view_as(images)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (logits_N,) = ctx.said
        logits_N = ctx.sign * logits_N.to(statistics_dtype(logits_N.dtype))
        factor_N = -ctx.share * (-logits_N.clamp(min=_SUREST)).exp()
        factor = factor_N.to(gradient.dtype).view(-1, *(1,) * (gradient.ndim - 1))
        return gradient * factor, None, None, None


def fooling(made_N: torch.Tensor) -> torch.Tensor:
    """The generator's loss of each image, not the saturating one: ln 2 at first. No gradient; for
    who goes with the real ones, of logits of the other sign."""
    return softplus(-made_N.detach())


def telling(made_N: torch.Tensor, real_N: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss of each image: 2 ln 2 at first."""
    return softplus(made_N) + softplus(-real_N)
