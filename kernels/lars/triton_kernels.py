"""LARS over all tensors of a parameter group in three launches: norms, ratios, update.

A program of the first adds squares over one chunk of a tensor (:mod:`kernels.multi_tensor`),
one of the second the sums of a tensor's chunks, both in an order that sizes alone fix: the same
bits in every run, no atomics. The third reads weight, gradient and momentum and writes weight and
momentum. Nothing of a gradient's size is allocated, where one operation at a time needs two.

Bytes, with float32 gradients: 8 per element of a matrix for the norms and 20 for the update.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.dispatch import on_device_of
from kernels.lars.settings import Settings
from kernels.multi_tensor import CHUNK, address_table, addresses, all_aligned, chunks

_CHUNK = tl.constexpr(CHUNK)
_BLOCK = 1024  # elements a program works on at a time: 8 per thread
_WARPS = 4


# --- device code --------------------------------------------------------------------------------


@triton.jit
def _pointer(table, row, tensors, tensor, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The ``tensor``-th of the ``row``-th list."""
    address = tl.load(table + row * tensors + tensor)
    pointer = address.to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _squares(weights, grads, index, inside, weight_decay, PAPER: tl.constexpr):
    w = tl.load(weights + index, mask=inside, other=0.0)
    g = tl.load(grads + index, mask=inside, other=0.0).to(tl.float32)
    if not PAPER:
        g += weight_decay * w
    return w * w, g * g


@triton.jit(do_not_specialize=["tensors", "chunk_count"])
def norms_kernel(
    table,
    plan,
    partial,
    tensors,
    chunk_count,
    weight_decay,
    GRAD: tl.constexpr,
    PAPER: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """float32 ``(2, C)``: sums of squares of w and of g + wd w (of g where PAPER), per chunk."""
    chunk = tl.program_id(0)
    tensor = tl.load(plan + chunk)
    begin = tl.load(plan + chunk_count + chunk).to(tl.int64) * _CHUNK
    count = tl.load(plan + 2 * chunk_count + chunk)
    weights = _pointer(table, 0, tensors, tensor, tl.float32, ALIGNED) + begin
    grads = _pointer(table, 1, tensors, tensor, GRAD, ALIGNED) + begin
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    grad_sum = tl.zeros((BLOCK,), tl.float32)
    # A mask by `count`, of which the compiler knows nothing, would take loads one by one: whole
    # blocks have none.
    whole = count // BLOCK * BLOCK
    lanes = tl.arange(0, BLOCK)
    for start in range(0, whole, BLOCK):
        w, g = _squares(weights, grads, start + lanes, lanes >= 0, weight_decay, PAPER)
        weight_sum += w
        grad_sum += g
    if whole < count:
        inside = lanes < count - whole
        w, g = _squares(weights, grads, whole + lanes, inside, weight_decay, PAPER)
        weight_sum += w
        grad_sum += g
    tl.store(partial + chunk, tl.sum(weight_sum, 0))
    tl.store(partial + chunk_count + chunk, tl.sum(grad_sum, 0))


@triton.jit(do_not_specialize=["chunk_count"])
def ratios_kernel(
    partial,
    first,
    ratios,
    chunk_count,
    weight_decay,
    trust_coefficient,
    eps,
    PAPER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """float32 ``(T,)``: the trust ratio of every tensor."""
    tensor = tl.program_id(0)
    begin = tl.load(first + tensor)
    end = tl.load(first + tensor + 1)
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    grad_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < end
        weight_sum += tl.load(partial + index, mask=inside, other=0.0)
        grad_sum += tl.load(partial + chunk_count + index, mask=inside, other=0.0)
    # The approximate root would cost every element of the tensor a digit.
    weight_norm = tl.sqrt_rn(tl.sum(weight_sum, 0))
    grad_norm = tl.sqrt_rn(tl.sum(grad_sum, 0))
    denominator = grad_norm
    if PAPER:
        denominator += weight_decay * weight_norm + eps
    adapt = (weight_norm > 0) & (grad_norm > 0)
    ratio = tl.div_rn(trust_coefficient * weight_norm, tl.where(adapt, denominator, 1.0))
    ratio = tl.where(adapt, ratio, 1.0)
    if PAPER:
        ratio = tl.where(grad_norm == 0, 0.0, ratio)
    tl.store(ratios + tensor, ratio)


@triton.jit
def _move(
    weights,
    grads,
    velocities,
    index,
    inside,
    scale,
    rate,
    momentum,
    weight_decay,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
):
    w = tl.load(weights + index, mask=inside, other=0.0)
    update = tl.load(grads + index, mask=inside, other=0.0).to(tl.float32)
    update = (update + weight_decay * w) * scale
    step = update
    if MOMENTUM:
        v = tl.load(velocities + index, mask=inside, other=0.0) * momentum + update
        tl.store(velocities + index, v, mask=inside)
        step = v
        if NESTEROV:
            step = v * momentum + update
    tl.store(weights + index, w - rate * step, mask=inside)


@triton.jit(do_not_specialize=["tensors", "chunk_count"])
def update_kernel(
    table,
    plan,
    ratios,
    found_inf,
    tensors,
    chunk_count,
    lr,
    momentum,
    weight_decay,
    GRAD: tl.constexpr,
    ADAPT: tl.constexpr,
    LR_INSIDE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    GUARDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Move weights and momenta in place, unless GUARDED and ``found_inf`` is set."""
    go = True
    if GUARDED:
        go = tl.load(found_inf) == 0.0
    if go:
        chunk = tl.program_id(0)
        tensor = tl.load(plan + chunk)
        begin = tl.load(plan + chunk_count + chunk).to(tl.int64) * _CHUNK
        count = tl.load(plan + 2 * chunk_count + chunk)
        weights = _pointer(table, 0, tensors, tensor, tl.float32, ALIGNED) + begin
        grads = _pointer(table, 1, tensors, tensor, GRAD, ALIGNED) + begin
        velocities = weights
        if MOMENTUM:
            velocities = _pointer(table, 2, tensors, tensor, tl.float32, ALIGNED) + begin
        scale = 1.0
        decay = 0.0
        if ADAPT:
            scale *= tl.load(ratios + tensor)
            decay = weight_decay
        rate = lr
        if LR_INSIDE:
            scale *= lr
            rate = 1.0
        whole = count // BLOCK * BLOCK
        lanes = tl.arange(0, BLOCK)
        for start in range(0, whole, BLOCK):
            index = start + lanes
            everywhere = lanes >= 0
            _move(
                weights,
                grads,
                velocities,
                index,
                everywhere,
                scale,
                rate,
                momentum,
                decay,
                MOMENTUM,
                NESTEROV,
            )
        if whole < count:
            index = whole + lanes
            inside = lanes < count - whole
            _move(
                weights,
                grads,
                velocities,
                index,
                inside,
                scale,
                rate,
                momentum,
                decay,
                MOMENTUM,
                NESTEROV,
            )


# --- host code ----------------------------------------------------------------------------------


def lars_triton_(
    weights: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    momenta: Sequence[torch.Tensor] | None,
    settings: Settings,
    *,
    adapt: bool,
    found_inf: torch.Tensor | None,
) -> None:
    """As :func:`kernels.lars.lars_update_`, on tensors that it has checked."""
    device = weights[0].device
    where = addresses([weights, grads] if momenta is None else [weights, grads, momenta])
    table = address_table(where, device)
    cut = chunks(tuple(weight.numel() for weight in weights), device)
    if not cut.count:
        return
    variant: dict[str, Any] = {
        "GRAD": _TYPES[grads[0].dtype],
        "ALIGNED": all_aligned(where),
        "BLOCK": _BLOCK,
    }
    with on_device_of(weights[0]):
        ratios = table  # a pointer that nobody follows
        if adapt:
            ratios = _trust_ratios(table, cut.plan, cut.first, settings, variant)
        update_kernel[(cut.count,)](
            table,
            cut.plan,
            ratios,
            table if found_inf is None else found_inf,
            len(weights),
            cut.count,
            settings.lr,
            settings.momentum,
            settings.weight_decay,
            ADAPT=adapt,
            LR_INSIDE=settings.variant == "simclr",
            MOMENTUM=momenta is not None,
            NESTEROV=settings.nesterov,
            GUARDED=found_inf is not None,
            num_warps=_WARPS,
            **variant,
        )


def _trust_ratios(
    table: torch.Tensor,
    plan_3C: torch.Tensor,
    first_T1: torch.Tensor,
    settings: Settings,
    variant: dict[str, Any],
) -> torch.Tensor:
    tensors, count = table.shape[1], plan_3C.shape[1]
    partial_2C = torch.empty((2, count), device=table.device)
    ratios_T = torch.empty(tensors, device=table.device)
    paper = settings.variant == "you"
    norms_kernel[(count,)](
        table,
        plan_3C,
        partial_2C,
        tensors,
        count,
        settings.weight_decay,
        PAPER=paper,
        num_warps=_WARPS,
        **variant,
    )
    ratios_kernel[(tensors,)](
        partial_2C,
        first_T1,
        ratios_T,
        count,
        settings.weight_decay,
        settings.trust_coefficient,
        settings.eps,
        PAPER=paper,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    return ratios_T


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
