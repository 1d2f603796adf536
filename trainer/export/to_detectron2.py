"""detectron2: the keys of its ResNet backbone.

detectron2 is on no package index and is built from source, so the proof runs on a stand-in:
torchvision's network with the batch normalisation that detectron2's configurations freeze, filled
by detectron2's names. Tests hold the names to detectron2's modules.
"""

from pathlib import Path
from typing import Any

import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from common.files.safetensors_file import parse_safetensors
from trainer.evaluation.load_encoder import Preprocessing
from trainer.export.target import RESNETS, Tensors, WeightsFile, resnet_shape
from trainer.models.encoders import EncoderConfig, remove_classifier
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
        if encoder.norm != "batch":
            raise self.refused("its ResNet has BatchNorm, and this encoder has none")
        if encoder.stem != "imagenet":
            raise self.refused("its stem is 7x7 with stride 2 and max-pool, not the CIFAR stem")
        self._shape = resnet_shape(encoder.name)

    def renamed(self, tensors: Tensors) -> Tensors:
        """By detectron2's names; the counters of batches go, as frozen normalisation has none."""
        return {
            detectron2_resnet(name): value
            for name, value in tensors.items()
            if not name.endswith("num_batches_tracked")
        }

    def model(self) -> nn.Module:
        """The stand-in, pooled to one vector an image."""
        model: nn.Module = torchvision.models.get_model(
            self.encoder.name, weights=None, norm_layer=FrozenBatchNorm2d
        )
        remove_classifier(model)
        return model

    def named_for(self, model: nn.Module, written: bytes) -> Tensors:
        """From detectron2's names."""
        ours = {detectron2_resnet(name): name for name in model.state_dict()}
        tensors = parse_safetensors(written, Path("export"))
        return {ours.get(name, name): value for name, value in tensors.items()}

    def facts(self) -> dict[str, Any]:
        """The settings that differ from detectron2's defaults, by its names."""
        scale = 255.0 if self.preprocessing.normalize else 1.0
        mean = self.preprocessing.mean if self.preprocessing.normalize else (0.0, 0.0, 0.0)
        std = self.preprocessing.std if self.preprocessing.normalize else (255.0, 255.0, 255.0)
        settings: dict[str, Any] = {
            "INPUT.FORMAT": "RGB",
            "MODEL.PIXEL_MEAN": [round(scale * value, 6) for value in mean],
            "MODEL.PIXEL_STD": [round(scale * value, 6) for value in std],
            "MODEL.RESNETS.DEPTH": self._shape.depth,
            "MODEL.RESNETS.STRIDE_IN_1X1": False,
            "MODEL.RESNETS.NUM_GROUPS": self._shape.groups,
            "MODEL.RESNETS.WIDTH_PER_GROUP": self._shape.width,
        }
        if self._shape.depth < 50:
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
