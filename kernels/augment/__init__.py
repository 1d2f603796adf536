"""Augmentation of a whole batch in one call; one row of parameters per output image.

:func:`augment` chooses the implementation, :func:`explain` says which and why. All are pure
functions of pixels and table, and none lets an image's result depend on the images beside it: a
view is byte-equal in whatever batch it stands, which "the same run on any number of GPUs" rests on.

========== ========================================= ===========================================
reference  ``reference.py``, any device and dtype    plain torch; the oracle of the others
cpu        ``cpu.py``, numba, CPU                    one pass per image, threads over images
========== ========================================= ===========================================
"""

from typing import Literal

import numpy as np
import torch

from kernels.augment.table import Column, FloatArray, Jitter, gaussian_half_kernels, identity_table

__all__ = [
    "Column",
    "Implementation",
    "Jitter",
    "augment",
    "choose",
    "explain",
    "gaussian_half_kernels",
    "identity_table",
]

Implementation = Literal["auto", "reference", "cpu"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def augment(
    crops_BVHWC: torch.Tensor,
    table_RP: FloatArray,
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
            row ``v * B + b`` is for view ``v`` of sample ``b``.
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
    if choose(crops_BVHWC.device, implementation) == "cpu":
        from kernels.augment.cpu import augment_cpu

        return augment_cpu(crops_BVHWC, table_RP, mean, std, dtype)
    from kernels.augment.reference import augment_reference

    return augment_reference(crops_BVHWC, table_RP, mean, std, dtype)


def choose(device: torch.device | str, implementation: Implementation = "auto") -> str:
    """Name of the implementation that serves ``device``.

    Raises:
        ValueError: the implementation asked for does not run there.
    """
    on_cpu = torch.device(device).type == "cpu"
    if implementation == "auto":
        return "cpu" if on_cpu else "reference"
    if implementation == "cpu" and not on_cpu:
        raise ValueError(f"augment: implementation 'cpu' cannot run on {device}; use 'auto'")
    if implementation not in ("cpu", "reference"):
        raise ValueError(f"augment: no implementation {implementation!r}; use 'auto'")
    return implementation


def explain(
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    implementation: Implementation = "auto",
) -> str:
    """One line: which implementation :func:`augment` runs for these, and why."""
    name = choose(device, implementation)
    why = "as asked" if implementation != "auto" else f"fastest here for {torch.device(device)}"
    real = "float64" if dtype == torch.float64 else "float32"
    what = {
        "cpu": f"numba, {torch.get_num_threads()} thread(s) over images",
        "reference": "plain torch",
    }[name]
    return f"augment: {name} ({what}; {why}), arithmetic in {real}, output {str(dtype)[6:]}"


def _check(crops_BVHWC: torch.Tensor, table_RP: FloatArray, dtype: torch.dtype) -> None:
    shape = tuple(crops_BVHWC.shape)
    if crops_BVHWC.dtype != torch.uint8 or len(shape) != 5 or shape[-1] != 3:
        raise ValueError(
            f"augment: crops must be uint8 (B, V, H, W, 3), got {crops_BVHWC.dtype} {shape}"
        )
    if dtype not in _DTYPES:
        raise ValueError(f"augment: dtype must be one of {_DTYPES}, got {dtype}")
    if table_RP.dtype != np.float64 or table_RP.ndim != 2:
        raise ValueError(
            f"augment: the table must be float64 (R, P), got {table_RP.dtype} {table_RP.shape}"
        )
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
