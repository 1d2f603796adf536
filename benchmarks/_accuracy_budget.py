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

from data_pipeline.reading.beton import JPEG_MODE
from data_pipeline.reading.open_beton import OpenBeton
from trainer.models.cifar_resnet import CIFAR_RESNETS
from trainer.models.encoders import Encoder, EncoderConfig, Stem, build_encoder

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
    table, data = OpenBeton(path).table, np.memmap(path, np.uint8, "r")
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
    if name in CIFAR_RESNETS:
        # Two busy cores have time for a quarter of the pixels.
        stem: Stem = "cifar-stride2" if name == "resnet8x2" else "cifar"
        return EncoderConfig(name=name, stem=stem, image_size=SIDE)
    return EncoderConfig(name=name, stem="cifar", zero_init_residual=True, image_size=SIDE)
