"""From an encoder's last maps back to images.

Shapes: N images, C channels of the maps, h pixels of their side, S of the images'.
"""

import math
from typing import Any

import torch
from torch import nn

from common.errors import ConfigError
from kernels.ntxent.reference import statistics_dtype
from trainer.models.encoders import Encoder
from trainer.objectives.base import Given, Objective, ObjectiveConfig

_NARROWEST = 32  # channels before the last layer, at the least


class LastMaps:
    """The last maps that an encoder makes before it pools them, and their shape.

    Found by a pass without data: the last of its modules to return ``(N, C, h, h)`` with h above 1,
    or a transformer's tokens ``(N, 1 + h h, C)``, the first of which is the class's.

    Args:
        encoder: a convolutional one, or a vision transformer.
        side: S, of the images that it will see.

    Raises:
        ConfigError: the encoder has no maps.
    """

    def __init__(self, encoder: Encoder, side: int) -> None:
        self.module: nn.Module = encoder
        self.channels = self.side = 0

        def look(module: nn.Module, _: Any, output: Any) -> None:
            if not isinstance(output, torch.Tensor):
                return
            if output.ndim == 4 and output.shape[-1] > 1:
                self.module, (self.channels, self.side) = module, output.shape[1:3]
            elif output.ndim == 3:
                tokens, self.channels = output.shape[1:]
                self.module, self.side = module, math.isqrt(tokens - 1)
                if self.side < 2 or self.side**2 + 1 != tokens:
                    self.side = 0  # what comes after tokens is made of tokens

        hooks = [module.register_forward_hook(look) for module in encoder.modules()]
        modes = {module: module.training for module in encoder.modules()}
        try:
            with torch.no_grad():
                encoder.eval()(torch.zeros(1, 3, side, side))
        finally:
            for hook in hooks:
                hook.remove()
            for module, training in modes.items():
                module.training = training
        if not self.side or side % self.side:
            raise ConfigError(
                "--encoder.name: this objective decodes images from an encoder's maps, and this"
                f" one has none that {side} pixels divide by; take a ResNet, a ConvNeXt or a ViT"
            )

    def __call__(self, encoder: Encoder, images_NCHW: torch.Tensor) -> torch.Tensor:
        """``(N, C, h, h)``; the encoder's own features are a part of their graph."""
        kept: list[torch.Tensor] = []
        hook = self.module.register_forward_hook(lambda _, __, output: kept.append(output))
        try:
            features_NF = encoder(images_NCHW)
        finally:
            hook.remove()
        maps = kept[-1]
        if maps.ndim == 3:
            maps = maps[:, 1:].transpose(1, 2).unflatten(2, (self.side, self.side))
        # What follows the maps has a gradient of zero, for DDP waits for all.
        return maps + 0 * features_NF.sum()


class Decoder(nn.Module):
    """Maps ``(N, C, h, h)`` to ``(N, outputs, h f, h f)``: doubled and convolved, again and again.

    Pixels are doubled and not convolved apart, which would leave a checkerboard (Odena et al. 2016,
    distill.pub/2016/deconv-checkerboard).

    Args:
        channels: C.
        factor: f, a power of two.
        outputs: channels of what is decoded.

    Raises:
        ConfigError: the factor is no power of two.
    """

    def __init__(self, channels: int, factor: int, outputs: int = 3) -> None:
        super().__init__()
        if factor & (factor - 1):
            raise ConfigError(
                f"--crop.size: the encoder's maps are {factor} times smaller than its images, which"
                " is no power of two; take a size that 32 divides"
            )
        layers: list[nn.Module] = []
        for _ in range(factor.bit_length() - 1):
            width = max(_NARROWEST, min(channels // 2, 256))
            layers += [
                nn.Upsample(scale_factor=2, mode="nearest"),
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            channels = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, outputs, 3, padding=1))

    def forward(self, maps_NChw: torch.Tensor) -> torch.Tensor:
        """What is decoded."""
        decoded: torch.Tensor = self.layers(maps_NChw)
        return decoded


class DecodingObjective(Objective):
    """An encoder, and a decoder of its last maps.

    Args:
        outputs: channels of what is decoded.
        smaller: how many times fewer pixels its sides have than images, as far as maps have fewer.
    """

    def __init__(
        self,
        encoder: Encoder,
        config: ObjectiveConfig,
        given: Given,
        outputs: int = 3,
        smaller: int = 1,
    ) -> None:
        super().__init__(encoder, None, config)
        self.given = given
        self.maps = LastMaps(encoder, given.side)
        factor = max(given.side // self.maps.side // smaller, 1)
        self.decoder = Decoder(self.maps.channels, factor, outputs)

    def decode(self, shown_NCHW: torch.Tensor) -> torch.Tensor:
        """``(N, outputs, h, h)`` from the images that the encoder is shown."""
        decoded: torch.Tensor = self.decoder(self.maps(self.encoder, shown_NCHW))
        return decoded


def squared_errors(decoded_NCHW: torch.Tensor, images_NCHW: torch.Tensor) -> torch.Tensor:
    """Mean over pixels of every channel's squared error, ``(N, C)``, in float32 or better."""
    dtype = statistics_dtype(decoded_NCHW.dtype)
    return (decoded_NCHW.to(dtype) - images_NCHW.to(dtype)).square().mean((2, 3))


def psnr(error: torch.Tensor) -> torch.Tensor:
    """Of a mean squared error of pixels from 0 to 1, in dB; without gradient."""
    return -10 * error.detach().log10()
