"""The key encoder's exponential moving average, all tensors in one launch.

Bytes: 12 per element, read key and query and write key, which is the floor; as two operations on
lists of tensors it is 20.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.dispatch import on_device_of
from kernels.multi_tensor import CHUNK, address_table, addresses, all_aligned, chunks

_CHUNK = tl.constexpr(CHUNK)
_BLOCK = 1024
_WARPS = 4


@triton.jit
def _average(key, query, inside, momentum, rest):
    k = tl.load(key, mask=inside, other=0.0)
    q = tl.load(query, mask=inside, other=0.0).to(tl.float32)
    tl.store(key, k * momentum + q * rest, mask=inside)


@triton.jit(do_not_specialize=["tensors", "chunk_count"])
def ema_kernel(
    table,
    plan,
    tensors,
    chunk_count,
    momentum,
    rest,
    QUERY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``k = momentum k + rest q`` on float32 keys."""
    chunk = tl.program_id(0)
    tensor = tl.load(plan + chunk)
    begin = tl.load(plan + chunk_count + chunk).to(tl.int64) * _CHUNK
    count = tl.load(plan + 2 * chunk_count + chunk)
    keys = tl.load(table + tensor).to(tl.pointer_type(tl.float32))
    queries = tl.load(table + tensors + tensor).to(tl.pointer_type(QUERY))
    if ALIGNED:
        keys = tl.multiple_of(keys, 16)
        queries = tl.multiple_of(queries, 16)
    # A mask by `count`, of which the compiler knows nothing, would take loads one by one: whole
    # blocks have none.
    whole = count // BLOCK * BLOCK
    lanes = tl.arange(0, BLOCK)
    for start in range(0, whole, BLOCK):
        index = begin + start + lanes
        _average(keys + index, queries + index, lanes >= 0, momentum, rest)
    if whole < count:
        index = begin + whole + lanes
        _average(keys + index, queries + index, lanes < count - whole, momentum, rest)


def ema_triton_(
    keys: Sequence[torch.Tensor], queries: Sequence[torch.Tensor], momentum: float
) -> None:
    """As :func:`kernels.ema.ema_update_`, on tensors that it has checked."""
    device = keys[0].device
    where = addresses([keys, queries])
    cut = chunks(tuple(key.numel() for key in keys), device)
    if not cut.count:
        return
    with on_device_of(keys[0]):
        ema_kernel[(cut.count,)](
            address_table(where, device),
            cut.plan,
            len(keys),
            cut.count,
            momentum,
            1.0 - momentum,
            QUERY=_TYPES[queries[0].dtype],
            ALIGNED=all_aligned(where),
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )


_TYPES: dict[torch.dtype, Any] = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
