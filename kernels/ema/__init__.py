"""MoCo's key encoder (He et al. 2020, arXiv 1911.05722, eq. 2): a moving average of the query's.

========== ===================================== ==============================================
foreach    any device and dtype                  two operations on lists of tensors
triton     ``triton_kernels.py``, CUDA, float32  one launch
========== ===================================== ==============================================
"""

from collections.abc import Sequence
from typing import Literal

import torch

from kernels import dispatch
from kernels.multi_tensor import obstacle, same_layout

__all__ = ["Implementation", "ema_update_"]

Implementation = Literal["auto", "foreach", "triton"]


@torch.no_grad()
def ema_update_(
    keys: Sequence[torch.Tensor],
    queries: Sequence[torch.Tensor],
    momentum: float,
    implementation: Implementation = "auto",
) -> None:
    """``k = m k + (1 - m) q`` for every pair, in place; the host does not wait.

    Args:
        keys: floating point, of one device; dense.
        queries: of the same shapes.
        momentum: m, in [0, 1]; 1 keeps the keys to the bit.
        implementation: "foreach", "triton" (float32 keys, float32 or bfloat16 queries, all of one
            dtype and in one memory layout pair by pair), or "auto".

    Raises:
        ValueError: lists differ, momentum is out of range, or "triton" does not run here.
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"ema_update_: momentum must lie in [0, 1], got {momentum}")
    if len(keys) != len(queries):
        raise ValueError(f"ema_update_: {len(keys)} keys and {len(queries)} queries")
    for key, query in zip(keys, queries):
        if key.shape != query.shape:
            raise ValueError(f"ema_update_: a key of shape {key.shape}, a query of {query.shape}")
    if implementation not in ("auto", "foreach", "triton"):
        raise ValueError(f"ema_update_: no implementation {implementation!r}; use 'auto'")
    if not keys or momentum == 1:  # 0 times a query that is not finite would be NaN
        return
    found = _obstacle(keys, queries)
    chosen = dispatch.choose("ema", implementation, keys[0].device, found, plain="foreach")
    dispatch.record(*chosen)
    if chosen.implementation == "triton":
        from kernels.ema.triton_kernels import ema_triton_

        ema_triton_(keys, queries, momentum)
        return
    torch._foreach_mul_(list(keys), momentum)
    torch._foreach_add_(
        list(keys), [q.to(k.dtype) for k, q in zip(keys, queries)], alpha=1.0 - momentum
    )


def _obstacle(keys: Sequence[torch.Tensor], queries: Sequence[torch.Tensor]) -> str:
    if len({key.device for key in [*keys, *queries]}) > 1:
        return "tensors of several devices"
    if len({query.dtype for query in queries}) > 1:
        return "queries of several dtypes"
    for key, query in zip(keys, queries):
        if found := obstacle(key, query):
            return found
        if query.dtype == torch.float16:
            return "queries are float16"
        if not same_layout(query, key):
            return f"a key and a query of shape {tuple(key.shape)} lie differently in memory"
    return ""
