"""torchvision and timm: libraries that build the encoder's architecture by its name."""

from typing import Any

import torch
import torchvision
from torch import nn

from trainer.evaluation.load_encoder import Preprocessing
from trainer.export.target import RESNETS, WeightsFile
from trainer.models.encoders import (
    STRIDES,
    EncoderConfig,
    is_torchvisions,
    remove_classifier,
    torchvision_options,
    use_cifar_stem,
    use_layer_norm,
)
from trainer.models.tensor_names import timm_vit
from trainer.models.timm_encoder import TIMM, is_timms, timm_options

_TIMM_VITS = {
    "vit_b_16": "vit_base_patch16_224",
    "vit_b_32": "vit_base_patch32_224",
    "vit_l_16": "vit_large_patch16_224",
    "vit_l_32": "vit_large_patch32_224",
    "vit_h_14": "vit_huge_patch14_224",
    "vit_s": "vit_small_patch16_224",
    "vit_ti": "vit_tiny_patch16_224",
}


class _NamedModel(WeightsFile):
    """A model by its name and options, a ResNet perhaps with another stem."""

    def __init__(
        self,
        encoder: EncoderConfig,
        preprocessing: Preprocessing,
        architecture: str,
        options: dict[str, Any],
    ) -> None:
        super().__init__(encoder, preprocessing)
        self.architecture, self.options = architecture, options
        self.adapt: list[str] = []
        if encoder.norm == "layer":
            self.adapt = [
                "for name, norm in list(model.named_modules()):",
                "    if isinstance(norm, torch.nn.BatchNorm2d):",
                "        model.set_submodule(name, torch.nn.GroupNorm(1, norm.num_features))",
            ]
        if encoder.stem != "imagenet":
            self.adapt += [
                "model.conv1 = torch.nn.Conv2d(3, 64, kernel_size=3, "
                f"stride={STRIDES[encoder.stem]}, padding=1, bias=False)",
                "model.maxpool = torch.nn.Identity()",
            ]

    def adapted(self, model: nn.Module) -> nn.Module:
        """What the lines of ``adapt`` make of the library's model."""
        if self.encoder.norm == "layer":
            use_layer_norm(model)
        if self.encoder.stem != "imagenet":
            use_cifar_stem(model, STRIDES[self.encoder.stem])
        return model

    def facts(self) -> dict[str, Any]:
        """How to make the model that takes the weights."""
        return {"architecture": self.architecture, "options": self.options, "adapt": self.adapt}

    def arguments(self) -> str:
        """The options, to follow other arguments in a line of Python."""
        return "".join(f", {name}={value!r}" for name, value in self.options.items())


class ToTorchvision(_NamedModel):
    """The keys of ``torchvision.models.NAME()``, only the classifier's missing."""

    name = "torchvision"
    built_by = "a model that torchvision built"
    packages = ("torchvision", "safetensors")

    def __init__(self, encoder: EncoderConfig, preprocessing: Preprocessing) -> None:
        if not is_torchvisions(encoder.name):
            raise self.refused(f"{encoder.name} is no architecture of torchvision's")
        super().__init__(encoder, preprocessing, encoder.name, torchvision_options(encoder))
        with torch.device("meta"):
            self.classifier = remove_classifier(self.model())

    def model(self) -> nn.Module:
        """With its classifier."""
        return self.adapted(
            torchvision.models.get_model(self.architecture, weights=None, **self.options)
        )

    def facts(self) -> dict[str, Any]:
        """As of any named model, and which layer the file has no weights of."""
        return {**super().facts(), "classifier": self.classifier}

    def instructions(self, name: str) -> list[str]:
        """With the lines that adapt the stem."""
        return [
            "import torch",
            "import torchvision",
            "from safetensors.torch import load_file",
            "",
            f"model = torchvision.models.{self.architecture}(weights=None{self.arguments()})",
            *self.adapt,
            f"missing, unexpected = model.load_state_dict(load_file({name!r}), strict=False)",
            f"# missing: {self.classifier}.weight and {self.classifier}.bias, your new classifier",
        ]


class ToTimm(_NamedModel):
    """All keys of ``timm.create_model(NAME, num_classes=0)``.

    timm took torchvision's ResNets over with their names: same keys, same computation.
    """

    name = "timm"
    built_by = "a model that timm built"
    packages = ("timm", "safetensors")

    def __init__(self, encoder: EncoderConfig, preprocessing: Preprocessing) -> None:
        size, _, patch = encoder.name.rpartition("_")
        is_small = size in _TIMM_VITS
        vit = size if is_small else encoder.name
        self._is_vit = vit in _TIMM_VITS
        if not self._is_vit and encoder.name not in RESNETS and not is_timms(encoder.name):
            raise self.refused(
                f"no counterpart of {encoder.name} is known, only of {', '.join(RESNETS)} "
                f"and {', '.join(_TIMM_VITS)}"
            )
        architecture = _TIMM_VITS.get(vit, encoder.name.removeprefix(TIMM))
        options = {"img_size": encoder.image_size} if self._is_vit else {}
        if is_timms(encoder.name):
            options = timm_options(encoder.name, encoder.image_size)
        if is_small:
            options["patch_size"] = int(patch)
        super().__init__(encoder, preprocessing, architecture, options)

    def renamed(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """ResNets under their own keys, transformers under timm's."""
        if self._is_vit:
            return {timm_vit(name): value for name, value in tensors.items()}
        return tensors

    def model(self) -> nn.Module:
        """Without classifier."""
        try:
            import timm
        except ImportError as error:
            raise self.absent("timm", error) from None
        return self.adapted(
            timm.create_model(self.architecture, pretrained=False, num_classes=0, **self.options)
        )

    def instructions(self, name: str) -> list[str]:
        """For features; a classifier is added by another ``num_classes`` and ``strict=False``."""
        return [
            *(["import torch"] if self.adapt else []),
            "import timm",
            "from safetensors.torch import load_file",
            "",
            f"model = timm.create_model({self.architecture!r}, num_classes=0{self.arguments()})",
            *self.adapt,
            f"model.load_state_dict(load_file({name!r}))",
        ]
