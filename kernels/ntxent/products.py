"""Matrix products for the losses in plain torch: 16-bit factors, sums in float32, fast on CPUs too.

Shapes are those of ordinary matrix products.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from kernels.ntxent.reference import statistics_dtype

WARM = 60.0
"""Largest 1/tau whose exponentials need no maximum subtracted: exp(60) times a billion and exp(-60)
over a billion are float32 numbers with all their digits."""


def factors(rows: torch.Tensor) -> torch.Tensor:
    """Rows as factors of products whose sums are wanted in the statistics' dtype.

    CUDA multiplies 16-bit factors and hands back float32 sums. The CPU's product of such factors
    is rounded to 16 bits (at tau = 0.1 an error of 0.04 in a logit), so there they are widened.
    """
    return rows if rows.is_cuda else rows.to(statistics_dtype(rows.dtype))


def multiply(a: torch.Tensor, b: torch.Tensor, alpha: float, out: torch.Tensor) -> None:
    """``out = alpha a @ b``."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=0, alpha=alpha, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out).mul_(alpha)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``total += a @ b``."""
    if b.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b, out_dtype=total.dtype)


@contextmanager
def products_of(rows: torch.Tensor) -> Iterator[None]:
    """Let the CPU's matrix unit (AMX) multiply what came as bfloat16: three times the speed.

    oneDNN rounds float32 factors to bfloat16, which rows that were bfloat16 do not notice, and sums
    in float32. Weights are rounded as on a GPU. The switch is the process's own: for as long as
    this lasts it holds for float32 products of other threads too.
    """
    if rows.is_cuda or rows.dtype != torch.bfloat16 or not _has_matrix_unit():
        yield
        return
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


@cache
def _has_matrix_unit() -> bool:
    return torch.cpu.get_capabilities().get("amx_bf16", False)
