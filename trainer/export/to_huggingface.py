"""Hugging Face: a folder for ``from_pretrained`` of transformers, with its preprocessing."""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from common.errors import NumericalError
from common.files.strict_json import dump_json
from trainer.evaluation.load_encoder import Preprocessing
from trainer.export.target import RESNETS, Features, Target, Tensors, resnet_shape
from trainer.models.encoders import EncoderConfig, build_encoder
from trainer.models.tensor_names import huggingface_resnet, huggingface_vit

_RESNETS = tuple(name for name in RESNETS if name.startswith("resnet"))  # not wide, no groups
_BILINEAR = 2  # PIL's number


class ToHuggingFace(Target):
    """``config.json``, ``model.safetensors`` and ``preprocessor_config.json``."""

    name = "huggingface"
    built_by = "the model that transformers loaded"
    suffix = ""
    packages = ("transformers", "safetensors")

    def __init__(self, encoder: EncoderConfig, preprocessing: Preprocessing) -> None:
        super().__init__(encoder, preprocessing)
        self._is_vit = encoder.name.startswith("vit_")
        if encoder.name not in _RESNETS and not self._is_vit:
            raise self.refused(
                f"no configuration of transformers' ResNet or ViT is {encoder.name}, only "
                f"{', '.join(_RESNETS)} and all that begin with vit_"
            )
        if encoder.norm != "batch" and not self._is_vit:
            raise self.refused("its ResNet has BatchNorm, and this encoder has none")
        if encoder.stem != "imagenet":
            raise self.refused(
                "transformers' ResNet has a 7x7 stem with stride 2 and max-pool, which no setting "
                "turns into the CIFAR stem"
            )
        self._config = _vit_config(encoder) if self._is_vit else _resnet_config(encoder.name)
        self._class_name: str = self._config["architectures"][0]

    def write(self, model: nn.Module, tensors: Tensors) -> dict[str, bytes]:
        """The files that ``save_pretrained`` would write."""
        return {
            "config.json": _json(self._config),
            "preprocessor_config.json": _json(_processor(self.preprocessing)),
            # `metadata` is what tells transformers that these are torch's.
            "model.safetensors": safetensors.torch.save(
                _renamed(tensors, self._is_vit), metadata={"format": "pt"}
            ),
        }

    def load(self, written: Path | bytes) -> Features:
        """``from_pretrained`` of the folder, without network, with every key accounted for."""
        try:
            import transformers
        except ImportError as error:
            raise self.absent("transformers", error) from None
        transformers.utils.logging.disable_progress_bar()
        kind = getattr(transformers, self._class_name)
        options = {"add_pooling_layer": False} if self._is_vit else {}
        model, info = kind.from_pretrained(
            str(written), local_files_only=True, output_loading_info=True, **options
        )
        wrong = {key: sorted(map(str, names)) for key, names in info.items() if names}
        if wrong:
            raise NumericalError(f"export: {self._class_name}: {wrong}; nothing was written")
        model = model.to(self.dtype).eval()
        if self._is_vit:
            return lambda images: model(pixel_values=images).last_hidden_state[:, 0]
        return lambda images: model(pixel_values=images).pooler_output.flatten(1)

    def facts(self) -> dict[str, Any]:
        """The class, and where in its output the features are."""
        where = "last_hidden_state[:, 0]" if self._is_vit else "pooler_output.flatten(1)"
        return {"class": self._class_name, "features": where, "config": self._config}

    def instructions(self, name: str) -> list[str]:
        """For features."""
        pooling = ", add_pooling_layer=False" if self._is_vit else ""
        return [
            f"from transformers import AutoImageProcessor, {self._class_name}",
            "",
            f"processor = AutoImageProcessor.from_pretrained({name!r})",
            f"model = {self._class_name}.from_pretrained({name!r}{pooling})",
            'output = model(**processor(images, return_tensors="pt"))',
            f"features = output.{self.facts()['features']}",
        ]


def _renamed(tensors: Tensors, is_vit: bool) -> Tensors:
    if not is_vit:
        return {huggingface_resnet(name): value for name, value in tensors.items()}
    renamed: Tensors = {}
    for name, value in tensors.items():
        names = huggingface_vit(name)
        parts = (part.contiguous() for part in value.chunk(len(names)))
        renamed |= zip(names, parts, strict=True) if len(names) > 1 else {names[0]: value}
    return renamed


def _resnet_config(name: str) -> dict[str, Any]:
    shape, widths = resnet_shape(name), [64, 128, 256, 512]
    return {
        "architectures": ["ResNetModel"],
        "model_type": "resnet",
        "dtype": "float32",
        "num_channels": 3,
        "embedding_size": 64,
        "hidden_sizes": widths if shape.depth < 50 else [4 * width for width in widths],
        "depths": shape.blocks,
        "layer_type": "basic" if shape.depth < 50 else "bottleneck",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,  # torchvision strides in the 3x3
    }


def _vit_config(encoder: EncoderConfig) -> dict[str, Any]:
    with torch.device("meta"):
        vit: Any = build_encoder(encoder)
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "dtype": "float32",
        "num_channels": 3,
        "image_size": encoder.image_size,
        "patch_size": vit.patch_size,
        "hidden_size": vit.hidden_dim,
        "num_hidden_layers": len(vit.encoder.layers),
        "num_attention_heads": vit.encoder.layers[0].num_heads,
        "intermediate_size": vit.mlp_dim,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": vit.encoder.ln.eps,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def _processor(preprocessing: Preprocessing) -> dict[str, Any]:
    """Shorter side, centre crop and normalisation, as the encoder was evaluated."""
    side = preprocessing.size
    return {
        "image_processor_type": "BitImageProcessor",  # the one with just these steps
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": preprocessing.resize},
        "resample": _BILINEAR,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": preprocessing.normalize,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }


def _json(values: dict[str, Any]) -> bytes:
    return (dump_json(values, indent=2) + "\n").encode()
