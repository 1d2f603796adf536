"""torchvision: the keys of ``torchvision.models.NAME()``, only the classifier's missing."""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision
from torch import nn

from common.files.safetensors_file import parse_safetensors
from trainer.evaluation.load_encoder import Preprocessing
from trainer.export.target import Features, Target, Tensors, fill_exactly, refused
from trainer.models.encoders import (
    STRIDES,
    EncoderConfig,
    is_torchvisions,
    remove_classifier,
    use_cifar_stem,
)


def stem_lines(encoder: EncoderConfig) -> list[str]:
    """Python that makes the ResNet of torchvision or timm take weights with another stem."""
    if encoder.stem == "imagenet":
        return []
    stride = STRIDES[encoder.stem]
    return [
        f"model.conv1 = torch.nn.Conv2d(3, 64, kernel_size=3, stride={stride}, padding=1, "
        "bias=False)",
        "model.maxpool = torch.nn.Identity()",
    ]


class ToTorchvision(Target):
    """A safetensors file for ``load_state_dict(strict=False)``."""

    name = "torchvision"
    built_by = "a model that torchvision built"
    suffix = ".safetensors"
    packages = ("torchvision", "safetensors")

    def __init__(self, encoder: EncoderConfig, preprocessing: Preprocessing) -> None:
        super().__init__(encoder, preprocessing)
        if not is_torchvisions(encoder.name):
            raise refused(self.name, f"{encoder.name} is no architecture of torchvision's")
        self._options = _options(encoder)
        self._adapt = stem_lines(encoder)
        with torch.device("meta"):
            self._classifier = remove_classifier(self._model())

    def _model(self) -> nn.Module:
        model: nn.Module = torchvision.models.get_model(
            self.encoder.name, weights=None, **self._options
        )
        return model

    def write(self, model: nn.Module, tensors: Tensors) -> dict[str, bytes]:
        """The encoder's own keys are torchvision's."""
        return {"": safetensors.torch.save(tensors)}

    def load(self, written: Path | bytes) -> Features:
        """A fresh model of torchvision's, its classifier an identity."""
        assert isinstance(written, bytes)  # noqa: S101  (a file's target)
        model = self._model()
        if self._adapt:
            use_cifar_stem(model, STRIDES[self.encoder.stem])
        tensors = parse_safetensors(written, Path("export"))
        left_out = {f"{self._classifier}.weight", f"{self._classifier}.bias"}
        fill_exactly(model, tensors, left_out, f"torchvision's {self.encoder.name}")
        parent, _, name = self._classifier.rpartition(".")
        model.get_submodule(parent).add_module(name, nn.Identity())
        return model.to(self.dtype).eval()

    def facts(self) -> dict[str, Any]:
        """How to make the model that takes the weights."""
        return {
            "architecture": self.encoder.name,
            "options": self._options,  # of torchvision.models.ARCHITECTURE, beside weights=None
            "adapt": self._adapt,
            "classifier": self._classifier,
        }

    def instructions(self, name: str) -> list[str]:
        """With the lines that adapt the stem."""
        options = "".join(f", {key}={value!r}" for key, value in self._options.items())
        return [
            "import torch",
            "import torchvision",
            "from safetensors.torch import load_file",
            "",
            f"model = torchvision.models.{self.encoder.name}(weights=None{options})",
            *self._adapt,
            f"missing, unexpected = model.load_state_dict(load_file({name!r}), strict=False)",
            f"# missing: {self._classifier}.weight and {self._classifier}.bias, "
            "your new classifier",
        ]


def _options(config: EncoderConfig) -> dict[str, Any]:
    """What torchvision has to be told so that its model has the encoder's shape."""
    if config.name.startswith("vit_"):
        return {"image_size": config.image_size}
    if config.name.startswith("maxvit"):
        return {"input_size": (config.image_size, config.image_size)}
    if config.name in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": True}
    return {}
