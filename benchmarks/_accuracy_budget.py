"""What the contenders of accuracy.py share: data, encoder, length, arithmetic.

The underscore keeps `make bench` from running this file.
"""

from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn

from data_pipeline.beton import JPEG_MODE, read_sample_table
from trainer.encoders import Encoder, EncoderConfig, build_encoder

SIDE = 32  # pixels


@dataclass(frozen=True)
class Images:
    """A packed file's images, decoded, in memory."""

    pixels_NHWC: npt.NDArray[np.uint8]  # noqa: N815
    labels_N: npt.NDArray[np.int64]  # noqa: N815


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every contender gets, and no more."""

    train: Path
    test: Path
    encoder: EncoderConfig
    batch: int
    steps: int
    seed: int
    precision: str  # bf16: autocast of the networks, losses in float32; or fp32
    workers: int  # of the loader: threads of ours, processes of the peer

    @property
    def warmup_steps(self) -> int:
        """A tenth of the run, for the methods that warm up."""
        return self.steps // 10

    def initial_encoder(self) -> Encoder:
        """The encoder with the weights that every contender starts from.

        Leaves torch's generator where the seed and the encoder put it.
        """
        torch.manual_seed(self.seed)
        return build_encoder(self.encoder)


@cache
def read_images(path: Path) -> Images:
    """Decode a .beton of images of one size, once."""
    table, data = read_sample_table(path), np.memmap(path, np.uint8, "r")
    shape = (len(table.labels), int(table.heights[0]), int(table.widths[0]), 3)
    pixels = np.empty(shape, np.uint8)
    for number, (start, size) in enumerate(zip(table.offsets, table.sizes)):
        stored = data[start : start + size]
        if table.modes[number] == JPEG_MODE:
            pixels[number] = np.asarray(Image.open(BytesIO(stored.tobytes())).convert("RGB"))
        else:
            pixels[number] = stored.reshape(shape[1:])
    return Images(pixels, table.labels)


def encoder_config(name: str) -> EncoderConfig:
    """An encoder for images of 32 pixels, by a short name."""
    if name in ("resnet8", "resnet20"):
        return EncoderConfig(name=f"{__name__}:{name}", image_size=SIDE)
    return EncoderConfig(name=name, stem="cifar", zero_init_residual=True, image_size=SIDE)


class _Block(nn.Module):
    """Two 3x3 convolutions; a shortcut without weights, which pads new channels with zeros."""

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
            shortcut = nn.functional.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels))
        return torch.relu(y + shortcut)


def resnet20() -> nn.Module:
    """He et al. 2016 (arXiv 1512.03385, section 4.2): (N, 3, 32, 32) -> (N, 64), 41 MFLOP."""
    return _resnet(widths=(16, 32, 64), blocks=3, stem_stride=1)


def resnet8() -> nn.Module:
    """The same family for two busy cores: (N, 3, 32, 32) -> (N, 128), 12 MFLOP."""
    return _resnet(widths=(32, 64, 128), blocks=1, stem_stride=2)


def _resnet(widths: tuple[int, ...], blocks: int, stem_stride: int) -> nn.Module:
    inputs = widths[0]
    layers: list[nn.Module] = [
        nn.Conv2d(3, inputs, 3, stem_stride, padding=1, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU(inplace=True),
    ]
    for outputs in widths:
        for _ in range(blocks):
            layers.append(_Block(inputs, outputs))
            inputs = outputs
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
