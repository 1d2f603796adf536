"""The configurations of every Triton kernel, for :mod:`tests.kernels.machine_code` to compile.

They have the tile sizes, warps and stages that the launchers use for that GPU, so that what is
inspected is what runs.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kernels.augment import triton_kernels as augment_kernels
from kernels.augment.plan import plan_launch
from kernels.ntxent import triton_kernels as ntxent_kernels
from kernels.ntxent.triton import tile_config


@dataclass(frozen=True, kw_only=True)
class CompileCase:
    """One kernel at one real tile size: what the compiler has to know in place of arguments."""

    name: str
    """Kernel and configuration, unique: ``ntxent.forward bf16 D=128``."""
    kernel: Any
    """The ``@triton.jit`` function."""
    signature: Mapping[str, str]
    """Triton type of every argument that is not constant: ``*bf16``, ``i32``, ``fp32``."""
    constants: Mapping[str, Any]
    """Value of every ``tl.constexpr`` argument."""
    aligned: tuple[str, ...] = ()
    """Arguments that the launcher's callers always pass divisible by 16 (pointers, strides)."""
    warps: int = 4
    stages: int = 3
    tensor_cores: bool = False
    """Whether the machine code must hold tensor-core instructions."""


# --- NT-Xent and InfoNCE --------------------------------------------------------------------------

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_NUMBERS = dict.fromkeys(("row_count", "row_stride", "share"), "i32") | {"scale": "fp32"}
_COLUMNS = dict.fromkeys(("column_count", "column_stride"), "i32")
_STATISTICS = {"positive": "*i64", "sums": "*fp32", "maxima": "*fp32", "hardests": "*fp32"}
_GRADIENT = {"row_lse": "*fp32", "column_lse": "*fp32", "gradient": "*fp32"}


def ntxent() -> Iterator[CompileCase]:
    """SimCLR's and MoCo's dimensions, and the extremes, at cold and at usual temperatures.

    D = 112 stands for all that are no power of two; the launcher pads to multiples of 16.
    """
    sizes = {torch.bfloat16: (64, 112, 128, 256, 512), torch.float16: (128,)}
    sizes[torch.float32] = (64, 128, 512)
    for dtype, dimensions in sizes.items():
        for size_d in dimensions:
            for online in (False, True):
                yield _ntxent("own_block", dtype, size_d, ONLINE=online)
                yield _ntxent("rectangle", dtype, size_d, ONLINE=online)
                yield _ntxent("gradient", dtype, size_d, ONLINE=online, OWN=True)
    yield _ntxent("gradient", torch.bfloat16, 256, ONLINE=False, OWN=False)  # MoCo v3


def _ntxent(kernel: str, dtype: torch.dtype, size_d: int, **switches: bool) -> CompileCase:
    # One table entry serves 8.0, 9.0 and 10.0.
    config = getattr(tile_config(size_d, dtype, (9, 0)), kernel)
    pointers = {"row_pointer": f"*{_NAMES[dtype]}"}
    pointers |= _GRADIENT if kernel == "gradient" else _STATISTICS
    tile, numbers, aligned = {"BLOCK_M": config.rows}, _NUMBERS, {"row_stride"}
    if kernel != "own_block":
        pointers["column_pointer"] = pointers["row_pointer"]
        tile["BLOCK_N"] = config.columns
        numbers = numbers | _COLUMNS
        aligned |= {"column_stride", "share"}
    if kernel == "gradient":
        numbers = numbers | {"own_start": "i32"}
    named = ", ".join(name.lower() for name, on in switches.items() if on) or "plain"
    return CompileCase(
        name=f"ntxent.{kernel} {_NAMES[dtype]} D={size_d} ({named})",
        kernel=getattr(ntxent_kernels, f"{kernel}_kernel"),
        signature=pointers | numbers,
        constants={
            "SIZE_D": size_d,
            "CHUNK": config.chunk,
            "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee",
            **tile,
            **switches,
        },
        aligned=(*pointers, *sorted(aligned)),
        warps=config.warps,
        stages=config.stages,
        tensor_cores=True,
    )


# --- augmentation ---------------------------------------------------------------------------------


def augment() -> Iterator[CompileCase]:
    """ImageNet's and CIFAR's crops, in every output type."""
    for side, radius in ((224, 11), (32, 1)):
        launch = plan_launch(side, side, radius)
        for out in ("bf16", "fp16", "fp32"):
            pointers = {"pixels": "*u8", "table": "*fp32", "out": f"*{out}", "scratch": "*fp32"}
            numbers = dict.fromkeys(("rows", "samples", "views"), "i32")
            normal = {f"{what}_{c}": "fp32" for what in ("scale", "shift") for c in "rgb"}
            yield CompileCase(
                name=f"augment {out} {side}x{side}",
                kernel=augment_kernels.augment_kernel,
                signature={**pointers, "ticket": "*i32", **numbers, **normal},
                constants=augment_kernels._constants(side, side, radius, launch),
                aligned=(*pointers, "ticket"),
                warps=launch.warps,
            )


KERNELS: dict[str, Callable[[], Iterator[CompileCase]]] = {
    "ntxent": ntxent,
    "augment": augment,
}


def case_named(name: str) -> CompileCase:
    """The configuration of that name."""
    (found,) = (case for cases in KERNELS.values() for case in cases() if case.name == name)
    return found
