"""Start a run's encoder from weights of elsewhere: ``widebatch pretrain ... --init-from FILE``.

Taken are files whose tensors have the names of torchvision or, for transformers, of timm:

* torchvision's and timm's own, with their classifier;
* checkpoints of MoCo v1 to v3 (``module.base_encoder.``, ``module.encoder_q.``) and DINO-like ones
  (``backbone.``), with heads and optimizer, which are left over;
* SimCLR's TensorFlow checkpoints after conversion to torchvision's names;
* our own exports for torchvision and timm, and ``model.safetensors`` of a checkpoint.

A safetensors file is proved sound by :mod:`trainer.safetensors_file`; any other is read by torch's
unpickler that builds tensors and plain containers and nothing else (``weights_only=True``).
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_pipeline.errors import DataError
from data_pipeline.regular_file import open_regular
from trainer.errors import ConfigError
from trainer.key_names import timm_vit
from trainer.safetensors_file import Tensors, load_safetensors

log = logging.getLogger(__name__)

LEAST_MATCHED = 0.9
"""Of the encoder's tensors, and of the values in them, that a file must have."""

# Under which key of a checkpoint the tensors are; else it is the dictionary of them itself.
_CONTAINERS = ("state_dict", "model", "model_state_dict", "teacher", "student")
# What stands before the encoder's names; the one under which most of them are found is taken.
_PREFIXES = (
    *("", "module.", "encoder.", "module.encoder.", "backbone.", "module.backbone.", "model."),
    *("base_encoder.", "module.base_encoder.", "encoder_q.", "module.encoder_q."),
)
# Counters of batches are used by no recipe here, and old files have none.
_COUNTER = "num_batches_tracked"
_SHOWN = 4  # names in a message


@dataclass(frozen=True)
class Matched:
    """What of a file went into an encoder. Counters of batches are in no list."""

    prefix: str
    """Of the encoder's names in the file."""
    matched: list[str]
    """The encoder's tensors that were filled."""
    missing: list[str]
    """Those that keep their random values: the file has no such name."""
    other_shape: list[str]
    """Those that keep them because the file's tensor has another shape; with both shapes."""
    left_over: list[str]
    """The file's tensors that were not used: classifiers, heads."""
    matched_values: float
    """Of the encoder's values, a fraction."""

    def lines(self) -> list[str]:
        """For a person."""
        total = len(self.matched) + len(self.missing) + len(self.other_shape)
        under = f" under {self.prefix!r}" if self.prefix else ""
        lines = [f"{len(self.matched)} of {total} tensors{under} ({self.matched_values:.1%})"]
        for what, names in (
            ("missing, random", self.missing),
            ("of another shape, random", self.other_shape),
            ("left over", self.left_over),
        ):
            if names:
                lines.append(f"{what}: {_few(names)}")
        return lines


def start_from(encoder: nn.Module, path: Path) -> Matched:
    """Fill an encoder with a file's weights, in place, and say in the log what matched.

    Draws no random numbers, so the rest of a run is what it is without the file.

    Args:
        encoder: one of ours, on the CPU.
        path: ``.safetensors``, or what ``torch.save`` wrote.

    Raises:
        ConfigError: too little of the encoder is in the file; nothing is filled then.
        DataError: the file is missing, damaged, holds code or no tensors, or values that are not
            finite.
    """
    found = read_weights(path)
    own = {n: t for n, t in encoder.state_dict().items() if not n.endswith(_COUNTER)}
    theirs, prefix = _best_names(own, found)
    values: Tensors = {}
    missing, other_shape = [], []
    for name, tensor in own.items():
        value = found.get(theirs[name])
        if value is None:
            missing.append(name)
        elif value.shape != tensor.shape:
            shapes = f"{tuple(value.shape)}, here {tuple(tensor.shape)}"
            other_shape.append(f"{name} {shapes}")
        else:
            values[name] = _usable(value, path, name).to(tensor.dtype)
    used = {theirs[name] for name in own}
    left_over = [n for n in found if n not in used and not n.endswith(_COUNTER)]
    total = sum(tensor.numel() for tensor in own.values())
    share = sum(value.numel() for value in values.values()) / total
    matched = Matched(prefix, list(values), missing, other_shape, left_over, share)
    _refuse(matched, len(own), values, path)
    encoder.load_state_dict(values, strict=False)
    for index, line in enumerate(matched.lines()):
        # What is missing trains from random values inside a trained network: to be seen.
        quiet = index == 0 or line.startswith("left over")
        log.log(logging.INFO if quiet else logging.WARNING, "init      %s: %s", path, line)
    return matched


def read_weights(path: Path) -> Tensors:
    """The tensors of a file by name, on the CPU, whatever container they are in.

    Raises:
        DataError: the file is missing, damaged, holds code or no tensors.
    """
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    content = _unpickled(path)
    for name in _CONTAINERS:
        inner = content.get(name) if isinstance(content, Mapping) else None
        if isinstance(inner, Mapping):
            content = inner
            break
    tensors = {
        name: value.detach()
        for name, value in (content.items() if isinstance(content, Mapping) else ())
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise DataError(
            f"{path}: holds no tensors by name, neither at the top nor under "
            f"{', '.join(_CONTAINERS)}; save the model's state_dict() to a file of its own"
        )
    return tensors


def _unpickled(path: Path) -> Any:
    try:
        with open_regular(path) as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # whatever a damaged or hostile archive makes torch raise
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path}: no weights that can be read without running code of the file "
            f"({type(error).__name__}: {reason[:160]}); save its tensors as safetensors where you "
            "trust it"
        ) from None


def _best_names(own: Tensors, found: Tensors) -> tuple[dict[str, str], str]:
    """The file's name for each tensor of the encoder, by the naming that finds most."""
    candidates = []
    for names in _namings(own):
        for prefix in _PREFIXES:
            theirs = {name: prefix + foreign for name, foreign in names.items()}
            hits = sum(foreign in found for foreign in theirs.values())
            candidates.append((hits, theirs, prefix))
    _, theirs, prefix = max(candidates, key=lambda candidate: candidate[0])
    return theirs, prefix


def _namings(own: Tensors) -> list[dict[str, str]]:
    """torchvision's names, and timm's where they are others."""
    same = {name: name for name in own}
    if "class_token" not in own:
        return [same]
    return [same, {name: timm_vit(name) for name in own}]


def _refuse(matched: Matched, total: int, values: Tensors, path: Path) -> None:
    share = min(len(matched.matched) / total, matched.matched_values)
    if share < LEAST_MATCHED:
        raise ConfigError(
            f"--init-from {path}: has only {'; '.join(matched.lines())}; at least "
            f"{LEAST_MATCHED:.0%} must match: set --encoder.name and --encoder.stem to the file's "
            "architecture"
        )
    broken = [name for name, value in values.items() if not torch.isfinite(value).all()]
    if broken:
        raise DataError(f"{path}: values that are not finite in {_few(broken)}; take another file")


def _usable(value: torch.Tensor, path: Path, name: str) -> torch.Tensor:
    dense = value.layout is torch.strided and value.device.type == "cpu"
    if not dense or not value.is_floating_point():
        raise DataError(
            f"{path}: {name} is no dense tensor of floating-point numbers ({value.dtype}, "
            f"{value.layout}); take weights that are not quantised"
        )
    return value


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
