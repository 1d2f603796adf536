"""Which implementation of every kernel runs here, and why; and getting things to its device.

What :func:`choose` chose is noted by :func:`record`: said once in the log, at DEBUG; a fall back to
a slower way is said once at WARNING, so that no run is slow in silence. :func:`explain` tells all
of it again.
"""

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
    """One line of :func:`explain`."""

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


_choices: dict[tuple[str, str, str], Choice] = {}


def record(kernel: str, implementation: str, reason: str, fallback: bool = False) -> None:
    """Note a :class:`Choice`; log it the first time it is noted.

    Cheap enough for every call. Inside ``torch.compile`` it does nothing: call it from the body of
    a custom operation, which is not traced.
    """
    if torch.compiler.is_compiling() or (kernel, implementation, reason) in _choices:
        return
    _choices[kernel, implementation, reason] = Choice(kernel, implementation, reason, fallback)
    if fallback:
        _log.warning("%s: falling back to %s: %s", kernel, implementation, reason)
    else:
        _log.debug("%s: %s: %s", kernel, implementation, reason)


def explain() -> str:
    """All choices made so far by this process, one a line, in the order they were made."""
    if not _choices:
        return "no kernel has run yet"
    return "\n".join(
        f"{choice.kernel}: {choice.implementation}{' (fallback)' if choice.fallback else ''}"
        f": {choice.reason}"
        for choice in _choices.values()
    )


def forget() -> None:
    """Start over, as a new process would; for tests."""
    _choices.clear()


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current GPU: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def to_device(values: torch.Tensor | npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """Host to device without waiting: a copy from pageable memory would wait for the stream."""
    tensor = values if isinstance(values, torch.Tensor) else torch.from_numpy(values)
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
