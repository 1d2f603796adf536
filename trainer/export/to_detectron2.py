"""detectron2: the keys of its ResNet backbone.

detectron2 is on no package index and is built from source, so the proof runs on a stand-in: the
modules, names and computation that detectron2/modeling/backbone/resnet.py has, with the batch
normalisation that its configurations freeze. What it shows is that every tensor has its documented
name and place; detectron2's own code does not run.
"""

from typing import Any

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from trainer.evaluation.load_encoder import Preprocessing
from trainer.export.target import BLOCKS, RESNETS, Tensors, WeightsFile
from trainer.models.encoders import EncoderConfig
from trainer.models.tensor_names import detectron2_resnet


class ToDetectron2(WeightsFile):
    """A safetensors file for the backbone's ``load_state_dict``."""

    name = "detectron2"
    built_by = "a stand-in with detectron2's names (not detectron2 itself)"

    def __init__(self, encoder: EncoderConfig, preprocessing: Preprocessing) -> None:
        super().__init__(encoder, preprocessing)
        if encoder.name not in RESNETS:
            raise self.refused(
                f"its ResNet backbone cannot be {encoder.name}, only {', '.join(RESNETS)}"
            )
        if encoder.stem != "imagenet":
            raise self.refused("its stem is 7x7 with stride 2 and max-pool, not the CIFAR stem")
        self._depth, self._groups, self._width = RESNETS[encoder.name]

    def renamed(self, tensors: Tensors) -> Tensors:
        """By detectron2's names; the counters of batches go, as frozen normalisation has none."""
        return {
            detectron2_resnet(name): value
            for name, value in tensors.items()
            if not name.endswith("num_batches_tracked")
        }

    def model(self) -> nn.Module:
        """The stand-in, pooled to one vector an image."""
        return _ResNet(self._depth, self._groups, self._width)

    def facts(self) -> dict[str, Any]:
        """The settings that differ from detectron2's defaults, by its names."""
        scale = 255.0 if self.preprocessing.normalize else 1.0
        mean = self.preprocessing.mean if self.preprocessing.normalize else (0.0, 0.0, 0.0)
        std = self.preprocessing.std if self.preprocessing.normalize else (255.0, 255.0, 255.0)
        settings: dict[str, Any] = {
            "INPUT.FORMAT": "RGB",
            "MODEL.PIXEL_MEAN": [round(scale * value, 6) for value in mean],
            "MODEL.PIXEL_STD": [round(scale * value, 6) for value in std],
            "MODEL.RESNETS.DEPTH": self._depth,
            "MODEL.RESNETS.STRIDE_IN_1X1": False,
            "MODEL.RESNETS.NUM_GROUPS": self._groups,
            "MODEL.RESNETS.WIDTH_PER_GROUP": self._width,
        }
        if self._depth < 50:
            settings["MODEL.RESNETS.RES2_OUT_CHANNELS"] = 64
        return {"settings": settings, "stand_in": True}

    def instructions(self, name: str) -> list[str]:
        """For a detector with a feature pyramid; the settings are in the JSON."""
        pairs = [value for pair in self.facts()["settings"].items() for value in pair]
        return [
            "from detectron2.modeling import build_model",
            "from safetensors.torch import load_file",
            "",
            f"cfg.merge_from_list({pairs!r})  # your detector's",
            "model = build_model(cfg)",
            "backbone = getattr(model.backbone, 'bottom_up', model.backbone)  # under a pyramid",
            f"backbone.load_state_dict(load_file({name!r}), strict=False)",
        ]


class _Conv(nn.Conv2d):
    """A convolution with its normalisation inside, as ``detectron2.layers.Conv2d``."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = FrozenBatchNorm2d(outputs)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  (nn.Conv2d's name)
        """Convolve and normalise."""
        normalised: torch.Tensor = self.norm(super().forward(input))
        return normalised


class _Block(nn.Module):
    """BasicBlock where ``middle`` is None, else BottleneckBlock with its stride in the 3x3."""

    def __init__(self, inputs: int, outputs: int, middle: int | None, stride: int, groups: int):
        super().__init__()
        if middle is None:
            layers = [_Conv(inputs, outputs, 3, stride), _Conv(outputs, outputs, 3, 1)]
        else:
            layers = [_Conv(inputs, middle, 1, 1), _Conv(middle, middle, 3, stride, groups)]
            layers.append(_Conv(middle, outputs, 1, 1))
        for number, layer in enumerate(layers, 1):
            self.add_module(f"conv{number}", layer)
        self._count = len(layers)
        self.shortcut = _Conv(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Residual and shortcut."""
        out = x
        for number in range(1, self._count + 1):
            out = self.get_submodule(f"conv{number}")(out)
            out = out.relu() if number < self._count else out
        return (out + (x if self.shortcut is None else self.shortcut(x))).relu()


class _ResNet(nn.Module):
    """``stem``, ``res2`` to ``res5``; the mean over the last one's places."""

    def __init__(self, depth: int, groups: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential()
        self.stem.add_module("conv1", _Conv(3, 64, 7, 2))
        inputs, outputs = 64, 64 if depth < 50 else 256
        for stage, count in enumerate(BLOCKS[depth]):
            middle = groups * width * 2**stage if depth >= 50 else None
            blocks = []
            for index in range(count):
                stride = 2 if stage and not index else 1
                blocks.append(_Block(inputs, outputs, middle, stride, groups))
                inputs = outputs
            self.add_module(f"res{stage + 2}", nn.Sequential(*blocks))
            outputs *= 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) to (N, F)."""
        x = nn.functional.max_pool2d(self.stem(x).relu(), 3, 2, 1)
        for stage in (2, 3, 4, 5):
            x = self.get_submodule(f"res{stage}")(x)
        return x.mean((2, 3))
