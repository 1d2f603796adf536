"""timm: the keys of ``timm.create_model(NAME, num_classes=0)``, all of them."""

from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from common.files.safetensors_file import parse_safetensors
from trainer.evaluation.load_encoder import Preprocessing
from trainer.export.target import Features, Target, Tensors, absent, fill_exactly, refused
from trainer.export.to_torchvision import stem_lines
from trainer.models.encoders import STRIDES, EncoderConfig, use_cifar_stem
from trainer.models.tensor_names import timm_vit

# Same keys, same computation: timm took torchvision's ResNets over with their names.
_RESNETS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("wide_resnet50_2", "wide_resnet101_2"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
)
_VITS = {
    "vit_b_16": "vit_base_patch16_224",
    "vit_b_32": "vit_base_patch32_224",
    "vit_l_16": "vit_large_patch16_224",
    "vit_l_32": "vit_large_patch32_224",
    "vit_h_14": "vit_huge_patch14_224",
}


class ToTimm(Target):
    """A safetensors file for ``load_state_dict``."""

    name = "timm"
    built_by = "a model that timm built"
    suffix = ".safetensors"
    packages = ("timm", "safetensors")

    def __init__(self, encoder: EncoderConfig, preprocessing: Preprocessing) -> None:
        super().__init__(encoder, preprocessing)
        is_vit = encoder.name in _VITS
        if not is_vit and encoder.name not in _RESNETS:
            raise refused(
                self.name,
                f"no counterpart of {encoder.name} is known, only of {', '.join(_RESNETS)} and "
                f"{', '.join(_VITS)}",
            )
        self._architecture = _VITS.get(encoder.name, encoder.name)
        self._options: dict[str, Any] = {"img_size": encoder.image_size} if is_vit else {}
        self._adapt = stem_lines(encoder)

    def write(self, model: nn.Module, tensors: Tensors) -> dict[str, bytes]:
        """ResNets under their own keys, transformers under timm's."""
        if self.encoder.name in _VITS:
            tensors = {timm_vit(name): value for name, value in tensors.items()}
        return {"": safetensors.torch.save(tensors)}

    def load(self, written: Path | bytes) -> Features:
        """What ``timm.create_model`` gives without classifier."""
        try:
            import timm
        except ImportError as error:
            raise absent(self.name, "timm", error) from None
        assert isinstance(written, bytes)  # noqa: S101  (a file's target)
        model: nn.Module = timm.create_model(
            self._architecture, pretrained=False, num_classes=0, **self._options
        )
        if self._adapt:
            use_cifar_stem(model, STRIDES[self.encoder.stem])
        tensors = parse_safetensors(written, Path("export"))
        fill_exactly(model, tensors, set(), f"timm's {self._architecture}")
        return model.to(self.dtype).eval()

    def facts(self) -> dict[str, Any]:
        """How to make the model that takes the weights."""
        return {
            "architecture": self._architecture,
            "options": self._options,  # of timm.create_model
            "adapt": self._adapt,
        }

    def instructions(self, name: str) -> list[str]:
        """For features; a classifier is added by another ``num_classes`` and ``strict=False``."""
        options = "".join(f", {key}={value!r}" for key, value in self._options.items())
        return [
            *(["import torch"] if self._adapt else []),
            "import timm",
            "from safetensors.torch import load_file",
            "",
            f"model = timm.create_model({self._architecture!r}, num_classes=0{options})",
            *self._adapt,
            f"model.load_state_dict(load_file({name!r}))",
        ]
