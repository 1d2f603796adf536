"""The small ResNets for images of 32 pixels: He et al. 2015 (arXiv 1512.03385), section 4.2.

``resnet20`` is the paper's with 20 layers, ``resnet20x2`` the same with twice the channels.
Shortcuts have no weights (the paper's option A). Names of tensors are as torchvision's ResNets'.
"""

import torch
from torch import nn

_WIDTHS = (16, 32, 64)  # channels of the three stages
_BLOCKS = {8: 1, 14: 2, 20: 3, 32: 5, 44: 7, 56: 9, 110: 18}  # of a stage, by the number of layers

CIFAR_RESNETS = {
    f"resnet{layers}" + (f"x{factor}" if factor > 1 else ""): (blocks, factor)
    for layers, blocks in _BLOCKS.items()
    for factor in (1, 2, 4)
}
"""Blocks of a stage, and what the paper's channels are multiplied by, by name."""


class CifarResNet(nn.Module):
    """(N, 3, H, W) -> (N, 64 * factor): a stem, three stages of residual blocks, a global mean."""

    def __init__(
        self, blocks: int, factor: int, stem_stride: int = 1, zero_init_residual: bool = False
    ) -> None:
        """Initialise as the paper does (arXiv 1502.01852).

        ``blocks`` are those of a stage, ``factor`` multiplies the paper's channels. A stem of
        stride 2 leaves a quarter of the time and half of the resolution.
        """
        super().__init__()
        channels = factor * _WIDTHS[0]
        self.conv1 = nn.Conv2d(3, channels, 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        for stage, width in enumerate(_WIDTHS, 1):
            layers = []
            for _ in range(blocks):
                layers.append(_Block(channels, factor * width))
                channels = factor * width
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
        self.feature_dim = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, _Block) and zero_init_residual:
                nn.init.zeros_(module.bn2.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features of images."""
        x = torch.relu(self.bn1(self.conv1(x)))
        for stage in (1, 2, 3):
            x = self.get_submodule(f"layer{stage}")(x)
        return x.mean((2, 3))


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut without weights.

    New channels of the shortcut are zeros, half of them before the others and half behind, as in
    the weights that are around (github.com/akamaster/pytorch_resnet_cifar10).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.new_channels = (2 if outputs > inputs else 1), outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            half = self.new_channels // 2
            shortcut = nn.functional.pad(shortcut, (0, 0, 0, 0, half, half))
        return torch.relu(y + shortcut)
