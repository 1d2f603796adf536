"""Start a run's encoder from weights of elsewhere: ``widebatch pretrain ... --init-from FILE``.

Taken are files whose tensors have the names of torchvision, its layers' numbers in their place, or
for transformers the names of timm, below whatever stands before them:

* torchvision's and timm's own, with their classifier;
* checkpoints of MoCo v1 to v3 (``module.base_encoder.``, ``module.encoder_q.``), of DINO, lightly
  (``backbone.0.``) and others, with heads and optimizer, which are left over;
* for an encoder of timm's, whatever timm itself reads: DINOv2, DINOv3, CLIP and others;
* what DDP, FSDP, DeepSpeed or ``torch.compile`` saved of such models;
* SimCLR's TensorFlow checkpoints after conversion to torchvision's names;
* our own exports for torchvision and timm, and ``model.safetensors`` of a checkpoint.

A safetensors file is proved sound by :mod:`common.files.safetensors_file`; any other is read by
torch's unpickler that builds tensors and plain containers and nothing else (``weights_only=True``).
"""

import argparse
import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.errors import ConfigError, DataError
from common.files.regular_file import open_regular
from common.files.safetensors_file import Tensors, load_safetensors
from trainer.models.any_size_vit import POSITIONS, resized_positions
from trainer.models.tensor_names import timm_vit
from trainer.models.timm_encoder import as_timm_has_them

log = logging.getLogger(__name__)

LEAST_MATCHED = 0.9
"""Of the encoder's tensors, and of the values in them, that a file must have."""

# What wrappers put into names, anywhere: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = re.compile(r"\b_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")
# Of two networks in a file, not the one with such a word before its names: MoCo's keys, moving
# averages, and DINO's student.
_SECOND_CHOICE = re.compile("encoder_k|momentum|target|ema|student")
_DEPTH = 6  # of dictionaries in dictionaries
# Counters of batches are used by no recipe here, and old files have none.
_COUNTER = "num_batches_tracked"
_SHOWN = 4  # names in a message
_LONGEST_NAME = 1000  # letters; no library's are longer


@dataclass(frozen=True)
class Matched:
    """What of a file went into an encoder. Counters of batches are in no list."""

    prefix: str
    """What stands before the encoder's names in the file, names of dictionaries included."""
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
    """Fill an encoder with the weights of a ``.safetensors`` file, or of what ``torch.save`` wrote.

    In place and on the CPU. What matched is said in the log. Draws no random numbers, so the rest
    of a run is what it is without the file.

    Raises:
        ConfigError: too little of the encoder is in the file; nothing is filled then.
        DataError: the file is missing, damaged, holds code or no tensors, or values that are not
            finite.
    """
    found = read_weights(path)
    own = {n: t for n, t in encoder.state_dict().items() if not n.endswith(_COUNTER)}
    theirs, prefix = _best_names(_namings(encoder, own), found)
    fits = all(
        n in found and _is_whole(found[n]) and found[n].shape == own[name].shape
        for name, n in theirs.items()
    )
    if type(encoder).__module__.startswith("timm.") and not fits:
        found = _as_timm_has_them(encoder, found, prefix)
        theirs, prefix = _best_names(_namings(encoder, own), found)
    values: Tensors = {}
    missing, other_shape = [], []
    for name, tensor in own.items():
        value = found.get(theirs[name])
        if value is not None:
            value = _usable(value, path, name)
        if value is not None and name == POSITIONS and value.shape != tensor.shape:
            value = _of_our_grid(value, tensor)
        if value is None:
            missing.append(name)
        elif value.shape != tensor.shape:
            shapes = f"{tuple(value.shape)}, here {tuple(tensor.shape)}"
            other_shape.append(f"{name} {shapes}")
        else:
            values[name] = value.to(tensor.dtype)
    used = {theirs[name] for name in own}
    left_over = [n for n in found if n not in used and not n.endswith(_COUNTER)]
    total = sum(tensor.numel() for tensor in own.values())
    share = sum(value.numel() for value in values.values()) / total
    matched = Matched(prefix, list(values), missing, other_shape, left_over, share)
    _refuse(matched, own, values, path)
    encoder.load_state_dict(values, strict=False)
    for index, line in enumerate(matched.lines()):
        # What is missing trains from random values inside a trained network: to be seen.
        quiet = index == 0 or line.startswith("left over")
        log.log(logging.INFO if quiet else logging.WARNING, "init      %s: %s", path, line)
    return matched


def _as_timm_has_them(encoder: nn.Module, found: Tensors, prefix: str) -> Tensors:
    ours = {n for n, t in found.items() if n.startswith(prefix) and _is_whole(t)}
    below = {n.removeprefix(prefix): found[n] for n in ours}
    others = {n: t for n, t in found.items() if n not in ours}
    converted = as_timm_has_them(encoder, below)
    for name, value in converted.items():
        if name in below and below[name].shape != value.shape:
            shapes = f"{tuple(below[name].shape)} to {tuple(value.shape)}"
            log.info("init      %s of %s, as timm does it", name, shapes)
    return others | {prefix + n: t for n, t in converted.items()}


def _is_whole(value: torch.Tensor) -> bool:
    """Whether it has a place in memory for every number, and not one for many."""
    plain = value.layout is torch.strided and not value.is_nested and value.device.type == "cpu"
    return plain and value.untyped_storage().nbytes() >= value.numel() * value.element_size()


def _of_our_grid(positions: torch.Tensor, own_1TD: torch.Tensor) -> torch.Tensor:
    """Positions of another square grid interpolated to the encoder's; else as they are."""
    is_alike = positions.dim() == 3 and positions.shape[::2] == own_1TD.shape[::2]
    if not is_alike or not _is_whole(positions):
        return positions
    before, after = (math.isqrt(max(0, each.shape[1] - 1)) for each in (positions, own_1TD))
    if not before or positions.shape[1] != 1 + before**2:
        return positions
    log.info("init      positions of a grid of %d interpolated to one of %d", before, after)
    return resized_positions(positions.float(), after)


def read_weights(path: Path) -> Tensors:
    """The tensors of a file by name, on the CPU.

    Those of dictionaries in dictionaries have the names of all of them, with dots between.

    Raises:
        DataError: the file is missing, damaged, holds code or no tensors.
    """
    if path.suffix == ".safetensors":
        tensors = load_safetensors(path)
    else:
        tensors = dict(_tensors(_unpickled(path)))
    if not tensors:
        raise DataError(
            f"{path}: holds no tensors by name; save the model's state_dict() to a file of its own"
        )
    short = {name: value for name, value in tensors.items() if len(name) <= _LONGEST_NAME}
    return {_WRAPPERS.sub("", name): value for name, value in short.items()}


def _tensors(content: Any, before: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, Any]]:
    for name, value in content.items() if isinstance(content, Mapping) and depth else ():
        if isinstance(value, torch.Tensor) and isinstance(name, str):
            yield before + name, value.detach()
        elif isinstance(name, str):  # an optimizer's state is numbered
            yield from _tensors(value, f"{before}{name}.", depth - 1)


def _unpickled(path: Path) -> Any:
    # Options of a script lie beside the tensors of many checkpoints; a Namespace has no code.
    harmless = torch.serialization.safe_globals([argparse.Namespace])
    try:
        with open_regular(path) as file, harmless, warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # whatever a damaged or hostile archive makes torch raise
        code = re.search(r"GLOBAL (\S+)|(TorchScript)", str(error))
        if code is None:
            raise DataError(
                f"{path}: damaged, or not in torch.save's own format; take a .safetensors, or a"
                " .pth of a model's weights"
            ) from None
        raise DataError(
            f"{path}: no weights that can be read without running code of the file: it holds"
            f" {_printable(code[1] or code[2])}; where you trust it, save its tensors alone, as"
            " safetensors"
        ) from None


def _best_names(namings: list[dict[str, str]], found: Tensors) -> tuple[dict[str, str], str]:
    """The file's name for each tensor of the encoder, by the naming and prefix that find most."""
    candidates = []
    for names in namings:
        foreign = set(names.values())
        hits = Counter({"": 0})
        for name in found:
            starts = [0, *(match.end() for match in re.finditer(r"\.", name))]
            hits.update(name[:start] for start in starts if name[start:] in foreign)
        candidates += [(count, names, prefix) for prefix, count in hits.items()]
    _, names, prefix = max(
        candidates, key=lambda c: (c[0], not _SECOND_CHOICE.search(c[2]), -len(c[2]))
    )
    return {name: prefix + foreign for name, foreign in names.items()}, prefix


def _namings(encoder: nn.Module, own: Tensors) -> list[dict[str, str]]:
    """torchvision's names, with numbers for its layers as in an nn.Sequential of them, timm's."""
    number = {name: str(place) for place, (name, _) in enumerate(encoder.named_children())}
    numbered = {}
    for name in own:
        layer, dot, rest = name.partition(".")
        numbered[name] = number.get(layer, layer) + dot + rest
    namings = [{name: name for name in own}, numbered]
    if "class_token" in own:
        namings.append({name: timm_vit(name) for name in own})
    return namings


def _refuse(matched: Matched, own: Tensors, values: Tensors, path: Path) -> None:
    if not matched.matched and not matched.other_shape:
        raise ConfigError(
            f"--init-from {path}: none of its tensors ({_few(matched.left_over)}) has a name of "
            f"this encoder's ({_few(list(own))}), whatever stands before it; set --encoder.name to "
            "the file's architecture or, if it is that, rename its tensors to torchvision's names"
        )
    total = len(own)
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
    dense = value.layout is torch.strided and value.device.type == "cpu" and not value.is_nested
    if not dense or not value.is_floating_point():
        raise DataError(
            f"{path}: {name} is no dense tensor of floating-point numbers ({value.dtype}, "
            f"{value.layout}); take weights that are not quantised"
        )
    return value


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return _printable(", ".join(names[:_SHOWN])) + more


def _printable(text: str) -> str:
    """A file's text without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
