"""Encoders: torchvision's models without their classifier, small ResNets, timm's, or a user's own.

An encoder is the model itself, not a wrapper: the keys of its ``state_dict`` are the library's,
less the classifier's. Weights are random, made by torch's generator (seed it before) and never
downloaded; synchronised BatchNorm and channels_last are the trainer's business.
"""

import copy
import dataclasses
import difflib
import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torchvision
from torch import nn
from torch.nn.functional import conv2d
from torchvision.models.vision_transformer import VisionTransformer

from common.bounds import check_bounds
from common.constants import constants
from common.errors import ConfigError
from trainer.models.any_size_vit import take_any_size
from trainer.models.cifar_resnet import CIFAR_RESNETS, CifarResNet
from trainer.models.timm_encoder import build_timm, has_one_size, is_timms

_CLASSES = 1000  # of torchvision's classifiers, by which they are recognised

STRIDES = {"cifar": 1, "cifar-stride2": 2}
"""Of the first convolution, by those stems that have 3x3 and no max-pool."""

_SMALL_VIT = re.compile(r"vit_(ti|s)_([1-9][0-9]?)")
_HEADS_AND_WIDTH = {"ti": (3, 192), "s": (6, 384)}  # of DeiT's, with 12 blocks

_TIMMS_RANDOM = ("DropPath", "DropBlock2d", "PatchDropout", "PatchDropoutWithIndices")

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601

_NOT_A_RESNETS: dict[str, Any] = {"stem": "imagenet", "zero_init_residual": False}

Stem = Literal["imagenet", "cifar", "cifar-stride2"]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The network that is pretrained and handed on."""

    name: str = "resnet50"
    """A torchvision classification model (resnet18 to resnet152, wide_resnet50_2, convnext_tiny,
    vit_b_16...); its transformer as small as DeiT's (vit_s_16, vit_ti_16) and with patches of any
    size (vit_ti_4); a small ResNet for images of 32 pixels (resnet8, 14, 20, 32, 44, 56 or 110 as
    published for CIFAR, resnet8x2 with twice the channels, x4 with four times); timm/NAME for one
    of timm's (timm/vit_small_patch14_dinov2), where that is installed; or package.module:callable
    for your own, from PYTHONPATH or the working folder: called without arguments, it returns an
    nn.Module from (N, 3, H, W) to (N, F)."""
    stem: Stem = "imagenet"
    """Of a ResNet: 7x7 stride 2 and max-pool; cifar: 3x3 stride 1 without, for small images;
    cifar-stride2: 3x3 stride 2 without, a quarter of its time."""
    zero_init_residual: bool = False
    """Of a ResNet: start each residual branch at zero by its last BatchNorm's scale."""
    image_size: int = 224
    """Side of the images in pixels, for models built for one size (ViT, MaxViT); others take any.
    Of your own the features are counted at this size: where it is not set, the crop's."""
    norm: Literal["batch", "layer"] = "batch"
    """layer: GroupNorm with one group in the place of every BatchNorm, of each image alone."""
    sees: Literal["colours", "grey"] = "colours"
    """grey: a grey image in all three channels, made of a coloured one; for colourisation. Exports
    and evaluations have it in the first convolution's weights, and take coloured images."""

    def __post_init__(self) -> None:
        check_bounds(self, "--encoder.", image_size="[1, 65535]")


class Encoder(nn.Module):
    """For type checkers: any ``nn.Module`` from ``(N, 3, H, W)`` to ``(N, feature_dim)``.

    :func:`build_encoder` returns the model itself with these attributes set, not an instance.
    """

    feature_dim: int
    sees: Literal["colours", "grey"]


def build_encoder(config: EncoderConfig) -> Encoder:
    """Build the encoder that ``config`` names, on the CPU or torch's default device.

    Raises:
        ConfigError: no such model (near names are given), a setting that it does not have, or a
            callable of the user's that fails or returns something else.
    """
    if config.name in CIFAR_RESNETS:
        model = _build_cifar_resnet(config)
    elif is_timms(config.name):
        _refuse_a_resnets_settings(config)
        model = build_timm(config.name, config.image_size)
    elif ":" in config.name:
        model = _build_user_model(config)
    else:
        model = _build_torchvision_model(config)
    if config.norm == "layer":
        use_layer_norm(model)
    encoder = cast(Encoder, model)
    encoder.feature_dim = _feature_dim(model, config)
    encoder.sees = config.sees
    if config.sees == "grey":
        _first_convolution(encoder)
        encoder.register_forward_pre_hook(_see_grey)
    return encoder


def _see_grey(encoder: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor | None:
    if encoder.sees == "colours":
        return None
    (images_NCHW,) = inputs
    return conv2d(images_NCHW, constants(_LUMA, images_NCHW).expand(3, 3)[..., None, None])


def see_colours(encoder: nn.Module) -> None:
    """Turn an encoder that sees grey to one that takes colours and is the same function, in place.

    Grey is a mix of channels, and so is what a convolution begins with: its weights take it in.
    """
    cast(Encoder, encoder).sees = "colours"
    first = _first_convolution(encoder)
    with torch.no_grad():
        first.weight.copy_(
            first.weight.sum(1, keepdim=True) * constants(_LUMA, first.weight)[:, None, None]
        )


def _first_convolution(encoder: nn.Module) -> nn.Conv2d:
    for layer in encoder.modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels == 3:
            if type(layer) is not nn.Conv2d:
                break  # such as one that standardises its weights
            return layer
    raise ConfigError(
        "--encoder.sees grey: the encoder does not begin with a plain convolution of three"
        " channels, which could take the grey in; take another"
    )


def fixed_image_size(config: EncoderConfig) -> int | None:
    """Side of the images that the encoder is built for, pixels; none where it takes any."""
    one_size = config.name.startswith(("vit_", "maxvit"))
    if is_timms(config.name):
        one_size = has_one_size(config.name)
    return config.image_size if one_size else None


def takes_size(config: EncoderConfig, side: int) -> bool:
    """Whether images of a side go beside those that the encoder is built for: a transformer's
    patches must divide it."""
    fixed = fixed_image_size(config)
    if fixed is None or side == fixed:
        return True
    patch = re.fullmatch(r"vit_[a-z]+_(\d+)", config.name)
    return patch is not None and side % int(patch[1]) == 0


def is_resnet(name: str) -> bool:
    """Whether the encoder has a ResNet's settings: ``stem`` and ``zero_init_residual``."""
    if not is_torchvisions(name):
        return name in CIFAR_RESNETS
    builder = torchvision.models.get_model_builder(name)
    return builder.__module__ == torchvision.models.resnet.__name__


def is_torchvisions(name: str) -> bool:
    """Whether plain torchvision can build the encoder."""
    return name in torchvision.models.list_models(module=torchvision.models)


def for_family(config: EncoderConfig, recipe: EncoderConfig, crop_size: int) -> EncoderConfig:
    """``config`` without what came from ``recipe`` with the name of another kind of encoder.

    Settings for ResNets are left out; timm's and the user's take images of the crop's size.
    """
    if is_resnet(config.name):
        return config
    of_crop = is_timms(config.name) or ":" in config.name
    plain = {**_NOT_A_RESNETS, **({"image_size": crop_size} if of_crop else {})}
    given = [name for name in plain if getattr(config, name) != getattr(recipe, name)]
    return dataclasses.replace(config, **{name: plain[name] for name in plain if name not in given})


def _refuse_a_resnets_settings(config: EncoderConfig) -> None:
    if is_resnet(config.name):
        return
    for setting, plain in _NOT_A_RESNETS.items():
        value = getattr(config, setting)
        if value != plain:
            option = f"--encoder.{setting.replace('_', '-')}"
            flag = "stem imagenet" if setting == "stem" else "no-zero-init-residual"
            raise ConfigError(
                f"{option} {value} is for ResNets, and {config.name} is none that we know by name;"
                f" set --encoder.{flag}"
            )


def _build_cifar_resnet(config: EncoderConfig) -> nn.Module:
    if config.stem == "imagenet":
        raise ConfigError(
            f"--encoder.stem imagenet: {config.name} is for small images; set --encoder.stem cifar "
            "or cifar-stride2"
        )
    blocks, factor = CIFAR_RESNETS[config.name]
    return CifarResNet(blocks, factor, STRIDES[config.stem], config.zero_init_residual)


def _build_torchvision_model(config: EncoderConfig) -> nn.Module:
    small_vit = _SMALL_VIT.fullmatch(config.name)
    if not is_torchvisions(config.name) and small_vit is None:
        small = ("vit_s_16", "vit_ti_16")
        known = [*CIFAR_RESNETS, *small, *torchvision.models.list_models(module=torchvision.models)]
        raise ConfigError(f"--encoder.name: there is no model {_unknown(config.name, known)}")
    _refuse_a_resnets_settings(config)
    options = torchvision_options(config)
    if config.zero_init_residual:
        options["zero_init_residual"] = True
    try:
        if small_vit is not None:
            heads, width = _HEADS_AND_WIDTH[small_vit[1]]
            patch = int(small_vit[2])
            model = VisionTransformer(config.image_size, patch, 12, heads, width, 4 * width)
        else:
            model = torchvision.models.get_model(config.name, weights=None, **options)
    except (AssertionError, ValueError) as error:  # a size that a transformer cannot divide
        raise ConfigError(f"--encoder.image-size {config.image_size}: {error}") from error
    remove_classifier(model)
    if isinstance(model, VisionTransformer):
        take_any_size(model)
    if config.stem != "imagenet":
        use_cifar_stem(model, STRIDES[config.stem])
    return model


def torchvision_options(config: EncoderConfig) -> dict[str, Any]:
    """What torchvision has to be told so that its model has the encoder's shape."""
    if config.name.startswith("vit_"):
        return {"image_size": config.image_size}
    if config.name.startswith("maxvit"):
        return {"input_size": (config.image_size, config.image_size)}
    if config.name in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": True}
    return {}


def remove_classifier(model: nn.Module) -> str:
    """Make a torchvision classification model return its classifier's input, in place.

    The last layer becomes an identity, and so does dropout beside it: it belongs to the
    classifier, and its random numbers would depend on the number of processes.

    Returns:
        Path of the layer, such as ``"classifier.6"``.

    Raises:
        ConfigError: no layer has as many outputs as ImageNet has classes.
    """
    path = ""
    for name, layer in model.named_modules():
        outputs = {getattr(layer, size, None) for size in ("out_features", "out_channels")}
        if _CLASSES in outputs:
            path = name
    if not path:
        raise ConfigError(f"--encoder.name: found no classifier in a {type(model).__name__}")
    parent = model.get_submodule(path.rpartition(".")[0])
    for name, child in list(parent.named_children()):
        if isinstance(child, nn.Dropout):
            parent.add_module(name, nn.Identity())
    parent.add_module(path.rpartition(".")[2], nn.Identity())
    return path


def use_cifar_stem(resnet: nn.Module, stride: int = 1) -> None:
    """Give a ResNet of torchvision's the stem for small images: 3x3, no max-pool, in place.

    At stride 1 it is SimCLR's for CIFAR-10 (arXiv 2002.05709, B.9). ``conv1.weight`` keeps its name
    and gets the shape (64, 3, 3, 3), initialised as torchvision does.
    """
    conv = nn.Conv2d(3, 64, kernel_size=3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    resnet.add_module("conv1", conv)
    resnet.add_module("maxpool", nn.Identity())


def use_layer_norm(model: nn.Module) -> None:
    """Put GroupNorm with one group, over channels and pixels, in every BatchNorm's place."""
    for name, norm in list(model.named_modules()):
        if isinstance(norm, nn.BatchNorm2d):
            if type(norm) is not nn.BatchNorm2d:
                raise ConfigError(
                    f"--encoder.norm layer: {name} is a {type(norm).__name__}, which does more than"
                    " a BatchNorm; take another encoder"
                )
            layer = nn.GroupNorm(1, norm.num_features)
            if norm.affine:
                layer.load_state_dict({"weight": norm.weight, "bias": norm.bias})
            model.set_submodule(name, layer)


def _build_user_model(config: EncoderConfig) -> nn.Module:
    _refuse_a_resnets_settings(config)
    build = _import_callable(config.name)
    try:
        model = build()
    except Exception as error:
        raise ConfigError(
            f"--encoder.name: {config.name} failed: {type(error).__name__}: {_one_line(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"--encoder.name: {config.name} returned a {type(model).__name__}, not an nn.Module"
        )
    return model


def _import_callable(path: str) -> Callable[[], Any]:
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute.isidentifier():
        raise ConfigError(f"--encoder.name: {path!r} is not of the form package.module:callable")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # behind all others: what lies there hides nothing of ours
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module does at import
        raise ConfigError(
            f"--encoder.name: cannot import {module_name} ({type(error).__name__}: "
            f"{_one_line(error)}); start in its folder, or put that on PYTHONPATH"
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        public = [name for name, value in vars(module).items() if callable(value)]
        raise ConfigError(
            f"--encoder.name: {module_name} has no callable {_unknown(attribute, public)}"
        )
    return cast(Callable[[], Any], found)


def _unknown(name: str, known: list[str]) -> str:
    spelling = {each.lower(): each for each in known}
    near = [spelling[key] for key in difflib.get_close_matches(name.lower(), spelling, n=3)]
    return f"{name!r}; did you mean {' or '.join(near)}?" if near else f"{name!r}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _feature_dim(model: nn.Module, config: EncoderConfig) -> int:
    """The declared feature size, or the one seen by a pass without data on the meta device."""
    declared = getattr(model, "feature_dim", None)
    if isinstance(declared, int):
        return declared
    image = torch.empty(2, 3, config.image_size, config.image_size, device="meta")
    try:
        with torch.no_grad():
            output = copy.deepcopy(model).to("meta").eval()(image)
    except Exception as error:  # whatever the model's forward pass does
        raise ConfigError(
            f"--encoder.name: cannot tell the feature size of {config.name} at {config.image_size} "
            f"pixels ({type(error).__name__}: {_one_line(error)}); set --encoder.image-size, or "
            "give your module an int attribute feature_dim"
        ) from error
    if not isinstance(output, torch.Tensor) or output.dim() != 2:
        shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ConfigError(f"--encoder.name: {config.name} returns {shape}, not (N, F) features")
    return output.shape[1]


def stochastic_layers(module: nn.Module) -> list[str]:
    """Names of layers that draw random numbers while training: dropout, stochastic depth.

    A run with any is not the same on another number of processes: torch's generator is keyed by
    process and not by sample.
    """
    kinds = (nn.modules.dropout._DropoutNd, torchvision.ops.StochasticDepth)
    found = {name: m.p for name, m in module.named_modules() if isinstance(m, kinds)}
    for name, m in module.named_modules():
        if type(m).__name__ in _TIMMS_RANDOM:
            found[name] = getattr(m, "drop_prob", getattr(m, "prob", 0.0))
    return [name for name, chance in found.items() if chance]


def seed_stochastic_layers(seed: int, step: int, rank: int, piece: int = 0) -> None:
    """Key torch's own generator by place, for encoders with dropout or stochastic depth.

    Such layers then draw the same numbers after a resume. They differ with the number of ranks:
    the promise of equal runs is for encoders without them, as ResNets are.
    """
    place = ((seed * 1_000_003 + step) * 65_537 + rank) * 1_048_583 + piece
    torch.manual_seed(place % 2**63)
