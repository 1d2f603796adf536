"""Batch normalisation over the global batch, on CUDA and on CPU, at any number of processes.

On CUDA the work is done by torch's own ``nn.SyncBatchNorm``, which refuses CPU tensors. On CPU it
is done here: each process takes the accurate mean and variance of its rows, the processes exchange
``(mean, sum of squared deviations, count)`` in ONE collective and everyone combines them in the
same order in float64 (Chan, Golub & LeVeque 1979). No sum of squares is ever formed, so large means
do not cancel, and a process may hold any number of rows, none included. The backward pass needs ONE
all-reduce of two sums per channel. Statistics therefore depend on the number of processes by
rounding alone, about 1e-15 in float64.

Shapes: N samples, C channels, K parts of a batch (chunks or processes), W processes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from common.collectives import waiting
from common.errors import ConfigError

# Native CPU kernels add a channels_last batch row by row in float32; over this many rows that stays
# near the rounding of one addition, and the parts are joined in float64.
_CHUNK_ROWS = 4096

_CONVERTED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def convert_sync_batch_norm(
    module: nn.Module, group_size: int = 0, *, keep_synchronised: bool = False
) -> nn.Module:
    """Replace every ``nn.BatchNorm1d/2d/3d`` in ``module`` by a synchronised one.

    Parameters and buffers stay the same objects under the same names, so optimizers built before,
    ``state_dict`` keys and exports are not touched. Layers used in several places stay shared.
    Every process must call it at the same point: it creates process groups when ``group_size``
    asks for them.

    Args:
        module: changed in place, except when it is itself a batch norm.
        group_size: statistics are taken over groups of this many consecutive ranks; 0 is all of
            them (the global batch), 1 is each process on its own.
        keep_synchronised: leave layers as they are that were converted before.

    Returns:
        ``module``, or its replacement when it is itself a batch norm.

    Raises:
        ConfigError: ``group_size`` does not divide the number of processes, or a layer is a
            subclass of batch norm whose extra behaviour a replacement would lose.
    """
    group = _GroupHandle(_make_group(group_size), local=group_size == 1)
    replaced: dict[nn.Module, nn.Module] = {}
    if keep_synchronised:
        replaced = {m: m for m in module.modules() if isinstance(m, SyncBatchNorm)}
    return _convert(module, group, replaced, path="")


def is_plain_batch_norm(module: nn.Module) -> bool:
    """Whether a layer is torch's own batch norm, or one of ours."""
    return isinstance(module, SyncBatchNorm) or type(module) in _CONVERTED


def _convert(
    module: nn.Module, group: "_GroupHandle", replaced: dict[nn.Module, nn.Module], path: str
) -> nn.Module:
    known = replaced.get(module)
    if known is not None:
        return known
    if is_plain_batch_norm(module):
        result: nn.Module = SyncBatchNorm._adopt(module, group)
    elif isinstance(module, _BatchNorm):
        raise ConfigError(
            f"{path or 'the module'} is a {type(module).__name__}, a batch norm with behaviour of "
            "its own: it cannot be synchronised; build the encoder with plain nn.BatchNorm layers"
        )
    else:
        result = module
        for name, child in list(module._modules.items()):
            if child is not None:
                child_path = f"{path}.{name}" if path else name
                module._modules[name] = _convert(child, group, replaced, child_path)
    replaced[module] = result
    return result


def _make_group(group_size: int) -> dist.ProcessGroup | None:
    """This process's group of ``group_size`` consecutive ranks; None is the whole world."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if group_size < 0 or (group_size and world_size % group_size):
        fitting = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise ConfigError(
            f"batch norm group size {group_size} does not divide the {world_size} processes of "
            f"this run; use one of {fitting}, or 0 for the global batch"
        )
    if group_size in (0, 1, world_size):
        return None
    mine: dist.ProcessGroup | None = None
    bounds = range(0, world_size + 1, group_size)
    for first, end in pairwise(bounds):  # every rank creates every group, in the same order
        group = dist.new_group(list(range(first, end)))
        if first <= dist.get_rank() < end:
            mine = cast(dist.ProcessGroup, group)
    return mine


class _GroupHandle:
    """Which processes share statistics. Copies of a model (a key encoder) share the handle."""

    def __init__(self, group: dist.ProcessGroup | None, *, local: bool = False) -> None:
        self.group = group
        self.local = local

    def __deepcopy__(self, memo: dict[int, Any]) -> "_GroupHandle":
        return self  # process groups cannot be copied

    @property
    def size(self) -> int:
        if self.local or not dist.is_initialized():
            return 1
        return dist.get_world_size(self.group)

    def add_up(self, sums_2C: torch.Tensor) -> None:
        """Put all its processes' sums in the place of one's. A collective."""
        if self.size > 1:
            with waiting("batch norm: all-reduce of gradient sums"):
                dist.all_reduce(sums_2C, group=self.group)


class SyncBatchNorm(_BatchNorm):
    """``nn.BatchNorm1d/2d/3d`` with training statistics over all processes of its group.

    Input ``(N, C)`` or ``(N, C, ...)``, float64, float32, bfloat16 or float16, any memory format;
    N may differ between processes and be 0. Output: the same shape and dtype. Evaluation uses the
    running statistics and no communication. The running variance is the unbiased one of the global
    count. Gradients of weight and bias are this process's share of the sum; averaging by DDP makes
    them those of the global mean loss, as for any other layer. There is no double backward.

    Made by :func:`convert_sync_batch_norm`.

    Raises:
        ValueError: fewer than two values per channel in the whole group, or a wrong channel count.
    """

    handle: _GroupHandle
    """Which processes share its statistics."""
    normaliser: "Normaliser | None" = None
    """See :func:`normalised_by`."""

    @classmethod
    def _adopt(cls, source: nn.Module, handle: _GroupHandle) -> "SyncBatchNorm":
        assert isinstance(source, _BatchNorm)  # noqa: S101 - for the type checker
        new = cls(source.num_features, source.eps, source.momentum, False, False)
        new.affine, new.track_running_stats = source.affine, source.track_running_stats
        for name in ("weight", "bias"):
            new.register_parameter(name, source._parameters[name])
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            new.register_buffer(name, source._buffers[name])
        new.training = source.training
        new.handle = handle
        return new

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The group that shares statistics; None is the whole world."""
        return self.handle.group

    @torch.compiler.disable  # collectives, and arithmetic in float64 that is not to be fused
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name
        """Normalise ``input``; collective over the group while training."""
        self._check_input_dim(input)
        if self.training and self.normaliser is not None:
            return self.normaliser(self, _like_layout(input, input))
        if not self.training or (self.handle.local and input.device.type != "cpu"):
            return super().forward(input)
        if input.device.type != "cpu":
            return nn.SyncBatchNorm.forward(self, input)  # type: ignore[arg-type]
        # Also for one process: a run must not change its rounding with the number of processes.
        x = _like_layout(input, input)
        return normalise(self, x, self.statistics(x))

    def statistics(self, x: torch.Tensor, update_running: bool = True) -> "Statistics":
        """Those of the group's values, which running statistics then follow. A collective."""
        stats = over_group(local_moments(x), self.handle)
        if update_running:
            self.update_running(stats)
        return stats

    @torch.no_grad()
    def update_running(self, stats: "Statistics") -> None:
        """Let the running statistics follow those of a batch, where there are any."""
        if not self.track_running_stats:
            return
        assert self.running_mean is not None  # noqa: S101 - for the type checker
        assert self.running_var is not None  # noqa: S101
        assert self.num_batches_tracked is not None  # noqa: S101
        self.num_batches_tracked.add_(1)
        # No momentum means the plain average of all batches so far.
        rate = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = stats.var * (stats.values / (stats.values - 1))
        self.running_mean.lerp_(stats.mean.to(self.running_mean.dtype), rate)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), rate)

    def _check_input_dim(self, input: torch.Tensor) -> None:  # noqa: A002 - torch's name
        if input.dim() < 2:
            raise ValueError(f"batch norm expects (N, C, ...), got a {input.dim()}-d input")
        if input.shape[1] != self.num_features:
            raise ValueError(
                f"batch norm of {self.num_features} channels got an input with {input.shape[1]}"
            )

    def _check_non_zero_input_channels(self, input: torch.Tensor) -> None:  # noqa: A002
        """nn.SyncBatchNorm.forward calls it; :meth:`_check_input_dim` has looked already."""


Normaliser = Callable[[SyncBatchNorm, torch.Tensor], torch.Tensor]
"""A layer's output for an input."""


@contextmanager
def normalised_by(layers: Sequence[SyncBatchNorm], normaliser: Normaliser) -> Iterator[None]:
    """Within, ``normaliser`` does the layers' work: for pieces of a batch, or a repeated pass."""
    for layer in layers:
        layer.normaliser = normaliser
    try:
        yield
    finally:
        for layer in layers:
            layer.normaliser = None


class Moments(NamedTuple):
    """Of some of a batch's values, per channel."""

    mean: torch.Tensor  # (C,) float64
    m2: torch.Tensor  # (C,) float64: sum of squared deviations from the mean
    values: float  # per channel


class Statistics(NamedTuple):
    """Of all values of a batch, per channel."""

    mean: torch.Tensor  # (C,) float64
    var: torch.Tensor  # (C,) float64, biased
    values: float  # per channel, in the whole group


def over_group(moments: Moments, handle: _GroupHandle) -> Statistics:
    """Statistics of all processes' values. A collective, one.

    Raises:
        ValueError: fewer than two values per channel in the whole group.
    """
    mean_C, m2_C, count = moments
    if handle.size > 1:
        channels = mean_C.shape[0]
        packed = torch.cat([mean_C, m2_C, mean_C.new_full((1,), count)])
        gathered = packed.new_empty(handle.size * packed.shape[0])
        with waiting("batch norm: all-gather of statistics"):
            dist.all_gather_single(gathered, packed, group=handle.group)
        parts_WX = gathered.view(handle.size, -1)
        mean_C, m2_C, count = combine_moments(
            parts_WX[:, :channels], parts_WX[:, channels:-1], parts_WX[:, -1:]
        )
    if count < 2:
        raise ValueError(
            "batch norm needs more than one value per channel in the global batch to train, got "
            f"{int(count)}; use a larger batch"
        )
    return Statistics(mean_C, m2_C / count, count)


def local_moments(x: torch.Tensor) -> Moments:
    """Of this process's values, whatever their number; no gradient."""
    x = x.detach()
    channels = x.shape[1]
    if x.numel() == 0:
        zero = torch.zeros(channels, dtype=torch.float64, device=x.device)
        return Moments(zero, zero, 0.0)
    # The kernel gives its result in the dtype of these, which would otherwise be bfloat16's.
    scratch = torch.zeros(2, channels, dtype=_sum_dtype(x), device=x.device)
    chunks = _chunks(x)
    parts = [
        torch.batch_norm_update_stats(c.to(scratch.dtype), scratch[0], scratch[1], 0.0)
        for c in chunks
    ]
    counts = [[c.numel() // channels] for c in chunks]
    count_K1 = torch.tensor(counts, dtype=torch.float64, device=x.device)
    mean_KC = torch.stack([mean for mean, _ in parts]).double()
    m2_KC = torch.stack([var for _, var in parts]).double() * count_K1
    return combine_moments(mean_KC, m2_KC, count_K1)


def combine_moments(mean_KC: torch.Tensor, m2_KC: torch.Tensor, count_K1: torch.Tensor) -> Moments:
    """Join the moments of K parts; a part of count 0 adds nothing."""
    total = float(count_K1.sum())
    mean_C = (mean_KC * count_K1).sum(0) / max(total, 1.0)
    m2_C = (m2_KC + count_K1 * (mean_KC - mean_C).square()).sum(0)
    return Moments(mean_C, m2_C, total)


def normalise(
    layer: SyncBatchNorm,
    x: torch.Tensor,
    stats: Statistics,
    sums_2C: torch.Tensor | None = None,
) -> torch.Tensor:
    """The layer's output, with these statistics.

    Args:
        layer: gives weight, bias and eps.
        x: some of the values that the statistics are of.
        stats: of all of them; the backward pass differentiates them too.
        sums_2C: float64 sums of dy and of dy * xhat over all values, where they are known; without
            them the backward pass adds up those of all processes' ``x``.
    """
    output: torch.Tensor = _Normalize.apply(
        x, layer.weight, layer.bias, stats, layer.eps, layer.handle, sums_2C
    )
    return output


class _Normalize(torch.autograd.Function):
    """``y = weight * (x - mean) / sqrt(var + eps) + bias``, where mean and var depend on all x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        stats: Statistics,
        eps: float,
        handle: _GroupHandle,
        known_sums_2C: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stats, ctx.eps, ctx.handle = stats, eps, handle
        ctx.known_sums_2C = known_sums_2C
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _affine(x, stats, eps, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = _like_layout(grads[0], x)
        sums_2C = gradient_sums(dy, x, ctx.stats, ctx.eps)
        # Clones: what follows overwrites the local sums by the global ones.
        dbias = None if ctx.bias_dtype is None else sums_2C[0].to(ctx.bias_dtype, copy=True)
        dweight = None if weight is None else sums_2C[1].to(weight.dtype, copy=True)
        dx = _input_gradient(ctx, dy, x, weight, sums_2C) if ctx.needs_input_grad[0] else None
        return dx, dweight, dbias, None, None, None, None


def _input_gradient(
    ctx: Any,
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    sums_2C: torch.Tensor,
) -> torch.Tensor:
    """``dx = weight * rstd * (dy - mean(dy) - xhat * mean(dy * xhat))``, means over the group."""
    stats, eps, handle = ctx.stats, ctx.eps, ctx.handle
    if ctx.known_sums_2C is not None:
        sums_2C = ctx.known_sums_2C
    else:
        handle.add_up(sums_2C)
    scale_C = (stats.var + eps).rsqrt()
    if weight is not None:
        scale_C = scale_C * weight.double()
    pull_2C = sums_2C * (-scale_C / stats.values)
    no_mean = stats._replace(mean=torch.zeros_like(stats.mean))
    dx = torch.empty_like(x)
    # The native kernel on a chunk that stays in the cache, twice, beats broadcast arithmetic.
    for dx_chunk, dy_chunk, x_chunk in zip(_chunks(dx), _chunks(dy), _chunks(x)):
        pull = _affine(x_chunk, stats, eps, pull_2C[1], pull_2C[0])
        torch.add(_affine(dy_chunk, no_mean, eps, weight, None), pull, out=dx_chunk)
    return dx


def _affine(
    x: torch.Tensor,
    stats: Statistics,
    eps: float,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    dtype = _compute_dtype(x)
    return nn.functional.batch_norm(
        x,
        stats.mean.to(dtype),
        stats.var.to(dtype),
        None if weight is None else weight.to(dtype),
        None if bias is None else bias.to(dtype),
        eps=eps,
    )


def gradient_sums(dy: torch.Tensor, x: torch.Tensor, stats: Statistics, eps: float) -> torch.Tensor:
    """``[sum(dy), sum(dy * xhat)]`` over this process's values: (2, C) float64."""
    dy = _like_layout(dy, x)
    sums_2C = torch.zeros(2, x.shape[1], dtype=torch.float64, device=x.device)
    dtype = _sum_dtype(x)
    mean, rstd = (t.to(dtype) for t in (stats.mean, (stats.var + eps).rsqrt()))
    for dy_chunk, x_chunk in zip(_chunks(dy), _chunks(x)):
        # dtype comes from the third argument, a weight that these two sums do not use.
        _, dy_xhat, dy_sum = torch.ops.aten.native_batch_norm_backward(
            dy_chunk.to(dtype),
            x_chunk.to(dtype),
            rstd,
            None,
            None,
            mean,
            rstd,
            True,
            eps,
            [False, True, True],
        )
        sums_2C[0] += dy_sum
        sums_2C[1] += dy_xhat
    return sums_2C


def _chunks(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if x.numel() == 0:
        return ()
    rows_per_sample = x[0, 0].numel()
    return x.split(max(1, _CHUNK_ROWS // rows_per_sample))


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _sum_dtype(x: torch.Tensor) -> torch.dtype:
    """float64 for float32 too: sums that are rounded once are the same however they are split."""
    return torch.float64 if x.dtype == torch.float32 else _compute_dtype(x)


def _memory_format(x: torch.Tensor) -> torch.memory_format:
    for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dims and x.is_contiguous(memory_format=layout):
            return layout
    return torch.contiguous_format


def _like_layout(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return dy.contiguous(memory_format=_memory_format(x))
