"""Many tensors in one launch: a table of their addresses, and one of their chunks.

A program of a multi-tensor kernel has a chunk: a piece of at most ``CHUNK`` elements of one tensor.
Chunks depend on sizes alone, addresses on where the tensors lie. Both tables are functions of their
keys, kept while they are in use: parameters and momenta keep their addresses for a run, gradients
too unless they are freed between steps, when 8 bytes each are copied again, without waiting. One
stream uses the tables: another might read them before the copy has ended.

Legend: T tensors, C chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from kernels.dispatch import to_device, triton_obstacle

CHUNK = 8192  # elements: ResNet-50 is 3,200 of them, 24 for each processor of an H100
_ALIGNMENT = 16  # bytes of the widest load


@dataclass(frozen=True)
class Chunks:
    """How tensors of given sizes are cut."""

    plan: torch.Tensor
    """int32 ``(3, C)``: the tensor, its first element in units of ``CHUNK``, elements (at most
    ``CHUNK``). Chunks of a tensor stand together, tensors in their order."""
    first: torch.Tensor
    """int32 ``(T + 1,)``: the number of a tensor's first chunk; at the end the number of all."""
    count: int
    """C."""


@lru_cache(maxsize=64)
def chunks(sizes: tuple[int, ...], device: torch.device) -> Chunks:
    """The chunks of tensors of ``sizes`` elements, on ``device``."""
    plan: list[tuple[int, int, int]] = []
    first = [0]
    for number, size in enumerate(sizes):
        starts = range(0, size, CHUNK)
        plan += [(number, start // CHUNK, min(CHUNK, size - start)) for start in starts]
        first.append(len(plan))
    plan_3C = torch.tensor(plan, dtype=torch.int32).reshape(-1, 3).T.contiguous()
    first_T1 = torch.tensor(first, dtype=torch.int32)
    return Chunks(to_device(plan_3C, device), to_device(first_T1, device), len(plan))


def addresses(lists: Sequence[Sequence[torch.Tensor]]) -> tuple[tuple[int, ...], ...]:
    """Where the elements of every tensor begin, list by list: the key of :func:`address_table`."""
    return tuple(tuple(tensor.data_ptr() for tensor in tensors) for tensors in lists)


@lru_cache(maxsize=64)
def address_table(where: tuple[tuple[int, ...], ...], device: torch.device) -> torch.Tensor:
    """The addresses as int64 ``(lists, T)`` on ``device``."""
    return to_device(torch.tensor(where, dtype=torch.int64), device)


def all_aligned(where: tuple[tuple[int, ...], ...]) -> bool:
    """Whether every tensor may be read 16 bytes at a time. Slices of a bucket may not."""
    return not any(address % _ALIGNMENT for row in where for address in row)


def check_alike(lists: Sequence[Sequence[torch.Tensor]], what: str) -> None:
    """Hold that tensors standing side by side have one shape and one dense memory layout.

    Raises:
        ValueError: they do not, or a list's tensors differ in dtype or device.
    """
    model = lists[0]
    for tensors in lists:
        if len(tensors) != len(model):
            raise ValueError(f"{what}: lists of {len(model)} and {len(tensors)} tensors")
        if len({tensor.dtype for tensor in tensors}) > 1:
            raise ValueError(f"{what}: the tensors of a list must have one dtype")
        for tensor, other in zip(tensors, model):
            if tensor.device != model[0].device:
                raise ValueError(f"{what}: tensors on {tensor.device} and {model[0].device}")
            if not same_layout(tensor, other):
                raise ValueError(
                    f"{what}: tensors of shapes {tuple(tensor.shape)} and {tuple(other.shape)} and "
                    f"strides {tensor.stride()} and {other.stride()} do not lie alike"
                )


def obstacle(target: torch.Tensor, source: torch.Tensor) -> str:
    """What keeps Triton from moving ``target`` by ``source``; empty where nothing does."""
    for tensor in (target, source):
        # A DTensor's address is a shard's, its norm all processes'.
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return f"{type(tensor).__name__} is not a plain tensor"
        if tensor.layout != torch.strided:
            return f"a tensor of shape {tuple(tensor.shape)} is sparse"
    if target.dtype != torch.float32:
        return f"parameters are {str(target.dtype)[6:]}, not float32"
    if source.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"gradients are {str(source.dtype)[6:]}"
    return triton_obstacle(target.device)


def same_layout(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have one shape and their elements lie alike and without gaps."""
    if tensor.shape != other.shape:
        return False
    if tensor.is_contiguous() and other.is_contiguous():
        return True
    pairs = zip(tensor.shape, tensor.stride(), other.stride())
    return is_dense(other) and all(ours == theirs for size, ours, theirs in pairs if size > 1)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the tensor's elements fill one piece of memory, in any order of dimensions."""
    if tensor.layout != torch.strided:
        return False
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True
