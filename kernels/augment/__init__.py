"""Augmentation of a whole batch in one call; one row of parameters per output image.

:func:`augment` chooses the implementation. All are pure functions of pixels and table, and none
lets an image's result depend on the images beside it: a view is byte-equal in whatever batch it
stands, which "the same run on any number of GPUs" rests on.

========== ========================================= ===========================================
reference  ``reference.py``, any device and dtype    plain torch; the oracle of the others
cpu        ``cpu.py``, numba, CPU                    one pass per image, threads over images
triton     ``triton_kernels.py``, CUDA, not float64  one launch; ``plan.py`` cuts the batch
========== ========================================= ===========================================

A table lies on the host, or, for "triton", on the GPU.
"""

import math
from typing import Literal, get_args

import numpy as np
import torch

from kernels import dispatch
from kernels.augment.table import Column, FloatArray, Jitter, gaussian_half_kernels, identity_table
from kernels.dispatch import to_device

__all__ = [
    "Column",
    "FloatArray",
    "Implementation",
    "Jitter",
    "augment",
    "choose",
    "gaussian_half_kernels",
    "identity_table",
    "to_device",
]

Implementation = Literal["auto", "reference", "cpu", "triton"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def augment(
    crops_BVHWC: torch.Tensor,
    table_RP: FloatArray | torch.Tensor,
    *,
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
    std: tuple[float, float, float] = (1.0, 1.0, 1.0),
    dtype: torch.dtype = torch.float32,
    implementation: Implementation = "auto",
) -> torch.Tensor:
    """Jitter, grayscale, blur, solarise, flip and normalise, each image by its own row.

    The operations are those of ``torchvision.transforms.v2.functional`` on floats in [0, 1].
    Arithmetic is float32, or float64 where ``dtype`` is. Nothing here waits for a GPU.

    Args:
        crops_BVHWC: uint8 ``(B, V, H, W, 3)``, any device.
        table_RP: float64 ``(V * B, P)`` on the host (:mod:`kernels.augment.table`), view-major:
            row ``v * B + b`` is for view ``v`` of sample ``b``. Or, for "triton" alone, such a
            table as a contiguous float32 tensor on the device of the crops.
        mean: subtracted per channel at the end, in units of [0, 1].
        std: divided by per channel at the end, in units of [0, 1].
        dtype: float32, float64, bfloat16 or float16.
        implementation: "auto" or the name of one.

    Returns:
        ``(V * B, 3, H, W)`` in ``dtype``, channels_last, view-major, on the device of the crops.

    Raises:
        ValueError: a shape or dtype is not as said, or the implementation does not serve here.
    """
    _check(crops_BVHWC, table_RP, dtype)
    if not all(math.isfinite(m) and 0 < s < math.inf for m, s in zip(mean, std)):
        raise ValueError(f"augment: cannot normalise by mean {mean} and deviation {std}")
    chosen = choose(crops_BVHWC.device, implementation, dtype)
    dispatch.record(chosen)
    if chosen.implementation == "triton":
        from kernels.augment.triton_kernels import augment_triton

        if not isinstance(table_RP, torch.Tensor):
            table_RP = to_device(table_RP.astype(np.float32), crops_BVHWC.device)
        return augment_triton(crops_BVHWC, table_RP, mean, std, dtype)
    if isinstance(table_RP, torch.Tensor):
        raise ValueError(
            f"augment: implementation {chosen.implementation!r} takes a table on the host, float64 "
            "as NumPy has it; only 'triton' takes one on the device"
        )
    if chosen.implementation == "cpu":
        from kernels.augment.cpu import augment_cpu

        return augment_cpu(crops_BVHWC, table_RP, mean, std, dtype)
    from kernels.augment.reference import augment_reference

    return augment_reference(crops_BVHWC, table_RP, mean, std, dtype)


def choose(device: torch.device, asked: str, dtype: torch.dtype) -> dispatch.Choice:
    """Which implementation serves ``device`` and makes ``dtype``, and why.

    Raises:
        ValueError: the implementation asked for does not run there.
    """
    if asked not in get_args(Implementation):
        raise ValueError(f"augment: no implementation {asked!r}; use 'auto'")
    if asked == "cpu" and device.type != "cpu":
        raise ValueError(f"augment: implementation 'cpu' cannot run on {device}; use 'auto'")
    obstacle = dispatch.triton_obstacle(device)
    if dtype == torch.float64:
        obstacle = "Triton's arithmetic is float32, not float64"
    plain = "cpu" if device.type == "cpu" else "reference"
    return dispatch.choose("augment", asked, device, obstacle, plain)


def _check(
    crops_BVHWC: torch.Tensor, table_RP: FloatArray | torch.Tensor, dtype: torch.dtype
) -> None:
    shape = tuple(crops_BVHWC.shape)
    if crops_BVHWC.dtype != torch.uint8 or len(shape) != 5 or shape[-1] != 3:
        raise ValueError(
            f"augment: crops must be uint8 (B, V, H, W, 3), got {crops_BVHWC.dtype} {shape}"
        )
    if dtype not in _DTYPES:
        raise ValueError(f"augment: dtype must be one of {_DTYPES}, got {dtype}")
    _check_table(table_RP, crops_BVHWC.device)
    if table_RP.shape[0] != shape[0] * shape[1]:
        raise ValueError(
            f"augment: {shape[1]} views of {shape[0]} samples want as many rows of parameters, "
            f"got {table_RP.shape[0]}"
        )
    radius = table_RP.shape[1] - Column.BLUR - 1
    if not 0 <= radius < min(shape[2:4]):
        raise ValueError(
            f"augment: a blur of radius {radius} cannot reflect at the border of "
            f"{shape[2]}x{shape[3]} images"
        )


def _check_table(table_RP: FloatArray | torch.Tensor, device: torch.device) -> None:
    if isinstance(table_RP, torch.Tensor):
        fits = table_RP.dtype == torch.float32 and table_RP.device == device
        if not fits or table_RP.ndim != 2 or not table_RP.is_contiguous():
            raise ValueError(
                f"augment: a table that is a tensor must be float32 (R, P), contiguous, on "
                f"{device}, got {table_RP.dtype} {tuple(table_RP.shape)} on {table_RP.device}"
            )
    elif table_RP.dtype != np.float64 or table_RP.ndim != 2:
        raise ValueError(
            f"augment: the table must be float64 (R, P), got {table_RP.dtype} {table_RP.shape}"
        )
