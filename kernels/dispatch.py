"""Which implementation of every kernel runs here, and why; and getting things to its device."""

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

_log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """What runs, and why."""

    kernel: str
    """What is computed: ``"ntxent"`` or ``"augment"``."""
    implementation: str
    """Which way: ``"triton"``, ``"blocked"``."""
    reason: str
    """Why, as a phrase."""
    fallback: bool = False
    """A faster way exists and cannot run here; ``reason`` says what is in its way."""


def choose(kernel: str, asked: str, device: torch.device, obstacle: str, plain: str) -> Choice:
    """What was asked for; for ``"auto"`` Triton on CUDA where it can run, and else ``plain``.

    Args:
        kernel: as in :class:`Choice`.
        asked: ``"auto"``, ``"triton"``, or another that runs everywhere.
        device: of the tensors.
        obstacle: what keeps Triton from them, as a phrase; empty where nothing does.
        plain: what runs where Triton does not.

    Raises:
        ValueError: ``"triton"`` was asked for and cannot run.
    """
    if asked == "triton" and obstacle:
        raise ValueError(f"{kernel}: implementation 'triton' cannot run: {obstacle}; use 'auto'")
    if asked != "auto":
        return Choice(kernel, asked, "as asked")
    on_cuda = device.type == "cuda"
    if on_cuda and not obstacle:
        return Choice(kernel, "triton", "fastest here for cuda")
    return Choice(kernel, plain, obstacle or f"fastest here for {device.type}", on_cuda)


def triton_obstacle(device: torch.device) -> str:
    """What keeps Triton's kernels from tensors on ``device``; empty where nothing does."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # then a kernel runs on the CPU
    if device.type != "cuda" and not (interpreted and device.type == "cpu"):
        return f"Triton does not run on {device.type}"
    return "" if _has_triton() else "Triton is not installed"


@cache
def _has_triton() -> bool:
    """torch brings it on Linux with CUDA, not elsewhere."""
    return find_spec("triton") is not None


def record(choice: Choice) -> None:
    """Say a choice in the log, once: at DEBUG, or at WARNING where it is a fallback.

    Cheap enough for every call. Inside ``torch.compile`` it does nothing: call it from the body of
    a custom operation, which is not traced.
    """
    if not torch.compiler.is_compiling():
        _say(choice)


@cache
def _say(choice: Choice) -> None:
    if choice.fallback:
        _log.warning(
            "%s: falling back to %s: %s", choice.kernel, choice.implementation, choice.reason
        )
    else:
        _log.debug("%s: %s: %s", choice.kernel, choice.implementation, choice.reason)


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current GPU: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def to_device(values: torch.Tensor | npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """Host to device without waiting: a copy from pageable memory would wait for the stream."""
    tensor = values if isinstance(values, torch.Tensor) else torch.from_numpy(values)
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
