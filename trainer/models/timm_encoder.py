"""Encoders of timm by their names, where timm is installed: ``--encoder.name timm/NAME``.

Nothing is downloaded: names of timm's own models alone are taken, and weights are random.
"""

import contextlib
import difflib
import io
import logging
import sys
from typing import Any

import torch
from torch import nn

from common.errors import ConfigError

log = logging.getLogger(__name__)

TIMM = "timm/"


def is_timms(name: str) -> bool:
    """Whether an encoder's name is one of timm's."""
    return name.startswith(TIMM)


def build_timm(name: str, image_size: int) -> nn.Module:
    """timm's model without its classifier: ``(N, 3, H, W)`` to ``(N, F)``.

    Raises:
        ConfigError: timm is not there, or has no such model, or not for images of this size.
    """
    model = _known(name)
    try:
        built: nn.Module = _timm().create_model(
            model, pretrained=False, num_classes=0, **timm_options(name, image_size)
        )
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"--encoder.image-size {image_size}: {name} cannot be built for it:"
            f" {' '.join(str(error).split())}"
        ) from error
    return built


def has_one_size(name: str) -> bool:
    """Whether the model is built for images of one size, as transformers are."""
    config = _timm().models.get_pretrained_cfg(_known(name))
    return bool(config is not None and config.fixed_input_size)


def timm_options(name: str, image_size: int) -> dict[str, Any]:
    """What timm has to be told so that its model takes images of this size."""
    return {"img_size": image_size} if has_one_size(name) else {}


def as_timm_has_them(
    encoder: nn.Module, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Tensors of a published checkpoint under the names and in the shapes of timm's model: what
    timm itself does with those of DINOv2, DINOv3, CLIP and others, positions of another grid
    interpolated. As they are, where timm knows nothing of them.
    """
    convert = getattr(sys.modules[type(encoder).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return tensors
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it looks for in vain
            return dict(convert(dict(tensors), encoder))
    except Exception as error:  # whatever timm makes of a file that is none of those
        log.info("init      timm does not read it: %s", " ".join(str(error).split()))
        return tensors


def _known(name: str) -> str:
    timm, model = _timm(), name.removeprefix(TIMM)
    if not timm.is_model(model):
        near = difflib.get_close_matches(model, timm.list_models(), n=3)
        meant = f"; did you mean {' or '.join(TIMM + each for each in near)}?" if near else ""
        raise ConfigError(f"--encoder.name: timm has no model {model!r}{meant}")
    try:
        timm.models.get_pretrained_cfg(model)
    except RuntimeError as error:
        raise ConfigError(f"--encoder.name {name}: {error}") from None
    return model


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ConfigError(
            f"--encoder.name timm/... needs timm ({error}): pip install timm"
        ) from None
    return timm
