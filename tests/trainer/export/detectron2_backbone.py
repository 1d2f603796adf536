"""detectron2's ResNet backbone: the modules, names and computation that
detectron2/modeling/backbone/resnet.py has, with frozen batch normalisation. detectron2 is on no
package index, so its own code does not run.
"""

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

# Depth, groups, and the width of a group.
RESNETS: dict[str, tuple[int, int, int]] = {
    "resnet18": (18, 1, 64),
    "resnet34": (34, 1, 64),
    "resnet50": (50, 1, 64),
    "resnet101": (101, 1, 64),
    "resnet152": (152, 1, 64),
    "wide_resnet50_2": (50, 1, 128),
    "wide_resnet101_2": (101, 1, 128),
    "resnext50_32x4d": (50, 32, 4),
    "resnext101_32x8d": (101, 32, 8),
    "resnext101_64x4d": (101, 64, 4),
}
# Blocks of each stage, by the depth. Below 50 layers a block is basic, else a bottleneck.
BLOCKS = {
    18: [2, 2, 2, 2],
    34: [3, 4, 6, 3],
    50: [3, 4, 6, 3],
    101: [3, 4, 23, 3],
    152: [3, 8, 36, 3],
}


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


class Backbone(nn.Module):
    """``stem``, ``res2`` to ``res5``; the mean over the last one's places."""

    def __init__(self, name: str) -> None:
        super().__init__()
        depth, groups, width = RESNETS[name]
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
