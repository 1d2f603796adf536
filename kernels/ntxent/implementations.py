"""Which implementation serves a device, a dtype and a size, and the functions it consists of."""

import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch

from kernels import choice
from kernels.ntxent import blocked, rectangle

Implementation = Literal["auto", "reference", "blocked", "triton"]

IMPLEMENTATIONS: tuple[str, ...] = ("auto", "reference", "blocked", "triton")


def check_options(
    loss: str, temperature: float, implementation: str, block_size: int | None
) -> None:
    """Refuse what neither loss can mean.

    Raises:
        ValueError: which of them, what it was and what it must be.
    """
    if isinstance(temperature, torch.Tensor):
        raise ValueError(f"{loss} has no derivative by the temperature: it wants a number")
    if not 0 < temperature < math.inf:
        raise ValueError(f"{loss} wants a positive temperature, got {temperature}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"no implementation {implementation!r}: {', '.join(IMPLEMENTATIONS)}")
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be positive, got {block_size}")


class RowKernels(NamedTuple):
    """What an implementation provides; the contracts stand in ``blocked`` and ``rectangle``."""

    row_statistics: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
    row_gradient: Callable[..., torch.Tensor]
    cross_statistics: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
    cross_gradient: Callable[..., torch.Tensor]


class Chosen(NamedTuple):
    """An implementation's name, why it, and whether a faster one could not run."""

    name: str
    reason: str
    fallback: bool


def choose(device: torch.device, dtype: torch.dtype, size_d: int, asked: str) -> Chosen:
    """``"auto"`` is Triton on CUDA where it can run, and otherwise blocked; or what was asked for.

    Args:
        device: of the rows.
        dtype: of the rows as factors.
        size_d: dimensions.
        asked: a name of :data:`IMPLEMENTATIONS`.

    Raises:
        ValueError: ``"triton"`` was asked for and cannot run.
    """
    what = f"{device.type}, {str(dtype).removeprefix('torch.')}, D = {size_d}"
    if asked in ("reference", "blocked"):
        return Chosen(asked, f"as asked; {what}", fallback=False)
    if asked == "auto" and device.type != "cuda":
        return Chosen("blocked", f"the fastest there is for {what}", fallback=False)
    obstacle = _obstacle_to_triton(device, dtype, size_d)
    if asked == "triton":
        if obstacle is not None:
            raise ValueError(f"ntxent: implementation 'triton' cannot run: {obstacle}; use 'auto'")
        return Chosen("triton", f"as asked; {what}", fallback=False)
    if obstacle is not None:
        return Chosen("blocked", f"{obstacle} ({what})", fallback=True)
    return Chosen("triton", f"the fastest there is for {what}", fallback=False)


def kernels_for(rows: torch.Tensor, asked: str, kernel: str) -> RowKernels:
    """The functions that :func:`choose` chooses for these rows; notes the choice.

    Args:
        rows: ``(M, D)``, in the dtype of the factors.
        asked: ``"auto"``, ``"blocked"`` or ``"triton"``.
        kernel: what is computed, as ``kernels.explain()`` is to call it.
    """
    chosen = choose(rows.device, rows.dtype, rows.shape[1], asked)
    choice.record(kernel, chosen.name, chosen.reason, fallback=chosen.fallback)
    return _triton_kernels() if chosen.name == "triton" else _BLOCKED


_BLOCKED = RowKernels(
    blocked.row_statistics,
    blocked.row_gradient,
    rectangle.cross_statistics,
    rectangle.cross_gradient,
)


def _triton_kernels() -> RowKernels:
    from kernels.ntxent import triton_kernels

    return RowKernels(
        triton_kernels.row_statistics,
        triton_kernels.row_gradient,
        triton_kernels.cross_statistics,
        triton_kernels.cross_gradient,
    )


def _obstacle_to_triton(device: torch.device, dtype: torch.dtype, size_d: int) -> str | None:
    if not _triton_is_installed():
        return "Triton is not installed"
    from kernels.ntxent import triton_kernels

    return triton_kernels.unsupported(device, dtype, size_d)


@cache
def _triton_is_installed() -> bool:
    """torch brings it on Linux with CUDA, not elsewhere."""
    return find_spec("triton") is not None
