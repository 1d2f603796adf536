"""One Triton kernel at one real tile size, as :mod:`kernels.inspect` compiles it ahead of time."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class CompileCase:
    """What the compiler has to know in place of a call's arguments.

    A Triton module of a kernel lists its own in ``compile_cases()``, with the tile sizes, warps and
    stages that its launcher uses for that GPU, so that what is inspected is what runs.
    """

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
    architectures: tuple[int, ...] = field(default=(80, 90, 100))
    """Compute capabilities, times ten, on which the launcher would use this configuration."""
