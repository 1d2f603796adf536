"""A table of parameters drawn on the GPU that uses it, from sample ids: nothing is copied there.

The generator is that of :mod:`common.randomness`, with which the host's tables are drawn: the two
agree bit for bit, held by a test, the blur's weights excepted. Those are exponentials, which
float64 libraries round differently; rounded to float32 they agree to the last digit but one.

Legend: B samples, V views, S settings of a view, P parameters of an image.
"""

from enum import IntEnum

import torch
import triton
import triton.language as tl

from common.randomness import GOLDEN, MULTIPLIER_1, MULTIPLIER_2, Stream
from kernels.augment.table import JITTER_STEPS, Column, Jitter
from kernels.dispatch import on_device_of


class Setting(IntEnum):
    """Columns of the settings of a view: the distributions of its parameters."""

    FLIP = 0  # probability of a horizontal flip
    JITTER = 1  # probability of colour jitter
    BRIGHTNESS = 2  # the factor is uniform in [max(0, 1 - x), 1 + x]; 0 turns it off
    CONTRAST = 3  # likewise
    SATURATION = 4  # likewise
    HUE = 5  # the shift is uniform in [-x, x] turns; 0 turns it off
    GRAYSCALE = 6  # probability of grayscale
    BLUR = 7  # probability of blur
    SIGMA_LOW = 8  # least standard deviation of the blur, pixels
    SIGMA_HIGH = 9  # greatest standard deviation of the blur, pixels
    RADIUS = 10  # of this view's blur, whole pixels
    SOLARIZE = 11  # probability of solarisation
    THRESHOLD = 12  # solarisation inverts values from here on


_SETTINGS = tl.constexpr(len(Setting))
_P_FLIP = tl.constexpr(int(Setting.FLIP))
_P_JITTER = tl.constexpr(int(Setting.JITTER))
_SPREADS = tl.constexpr(int(Setting.BRIGHTNESS) - int(Jitter.BRIGHTNESS))  # + code: its spread
_P_GRAYSCALE = tl.constexpr(int(Setting.GRAYSCALE))
_P_BLUR = tl.constexpr(int(Setting.BLUR))
_SIGMA_LOW = tl.constexpr(int(Setting.SIGMA_LOW))
_SIGMA_HIGH = tl.constexpr(int(Setting.SIGMA_HIGH))
_RADIUS = tl.constexpr(int(Setting.RADIUS))
_P_SOLARIZE = tl.constexpr(int(Setting.SOLARIZE))
_THRESHOLD = tl.constexpr(int(Setting.THRESHOLD))

_FLIP_STREAM = tl.constexpr(int(Stream.FLIP))
_JITTER_STREAM = tl.constexpr(int(Stream.JITTER))
_ORDER_STREAM = tl.constexpr(int(Stream.JITTER_ORDER))
_FACTOR_STREAMS = tl.constexpr(int(Stream.BRIGHTNESS) - int(Jitter.BRIGHTNESS))  # + code
_GRAYSCALE_STREAM = tl.constexpr(int(Stream.GRAYSCALE))
_BLUR_STREAM = tl.constexpr(int(Stream.BLUR))
_SIGMA_STREAM = tl.constexpr(int(Stream.BLUR_SIGMA))
_SOLARIZE_STREAM = tl.constexpr(int(Stream.SOLARIZE))

_FLIP = tl.constexpr(int(Column.FLIP))
_JITTER = tl.constexpr(int(Column.JITTER))
_STEPS = tl.constexpr(JITTER_STEPS)
_FACTORS = tl.constexpr(int(Column.BRIGHTNESS) - int(Jitter.BRIGHTNESS))  # + code
_GRAYSCALE = tl.constexpr(int(Column.GRAYSCALE))
_SOLARIZE = tl.constexpr(int(Column.SOLARIZE))
_BLUR = tl.constexpr(int(Column.BLUR))
_HUE = tl.constexpr(int(Jitter.HUE))

_GOLDEN = tl.constexpr(GOLDEN)
_MULTIPLIER_1 = tl.constexpr(MULTIPLIER_1)
_MULTIPLIER_2 = tl.constexpr(MULTIPLIER_2)
_2_TO_MINUS_53 = tl.constexpr(2.0**-53)

_BLOCK = 64  # samples per program: a batch of 4,096 with two views is 128 programs


# --- device code --------------------------------------------------------------------------------


@triton.jit
def _mix(x):
    """Finaliser of splitmix64, on uint64."""
    x = (x ^ (x >> 30)) * _MULTIPLIER_1
    x = (x ^ (x >> 27)) * _MULTIPLIER_2
    return x ^ (x >> 31)


@triton.jit
def _absorb(state, coordinate):
    return _mix(state ^ _mix(coordinate.to(tl.uint64) + _GOLDEN))


@triton.jit
def _uniform(key, stream, low, high):
    """float64 in [low, high), from the first number of the stream."""
    stream = tl.full(key.shape, stream, tl.uint64)
    bits = _mix(_absorb(key, stream) + _GOLDEN)
    unit = (bits >> 11).to(tl.float64) * _2_TO_MINUS_53
    return low + (high - low) * unit


@triton.jit
def _chance(key, stream, probability):
    return _uniform(key, stream, 0.0, 1.0) < probability


@triton.jit
def _permutation(number):
    """The ``number``-th permutation of (1, 2, 3, 4) in lexicographic order, from 0."""
    first = number // 6 + 1
    second = number % 6 // 2 + 1
    second += (second >= first).to(tl.int32)
    third = number % 2 + 1
    third += (third >= tl.minimum(first, second)).to(tl.int32)
    third += (third >= tl.maximum(first, second)).to(tl.int32)
    return first, second, third, 10 - first - second - third


@triton.jit
def _store_jitter(key, settings, row, inside):
    jittered = _chance(key, _JITTER_STREAM, tl.load(settings + _P_JITTER))
    number = (_uniform(key, _ORDER_STREAM, 0.0, 1.0) * 24.0).to(tl.int32)
    order = _permutation(number)
    for step in tl.static_range(_STEPS):
        code = order[step]
        busy = jittered & (tl.load(settings + _SPREADS + code) != 0.0)
        tl.store(row + _JITTER + step, tl.where(busy, code, 0).to(tl.float64), mask=inside)
        # Once per operation too: step + 1 runs through the four codes.
        spread = tl.load(settings + _SPREADS + step + 1)
        low = -spread
        high = spread
        if step + 1 != _HUE:
            low = tl.maximum(0.0, 1.0 - spread)
            high = 1.0 + spread
        factor = _uniform(key, _FACTOR_STREAMS + step + 1, low, high)
        tl.store(row + _FACTORS + step + 1, factor, mask=inside)


@triton.jit
def _store_blur(key, settings, row, inside, RADIUS: tl.constexpr):
    blurred = _chance(key, _BLUR_STREAM, tl.load(settings + _P_BLUR))
    low = tl.load(settings + _SIGMA_LOW)
    sigma = _uniform(key, _SIGMA_STREAM, low, tl.load(settings + _SIGMA_HIGH))
    radius = tl.load(settings + _RADIUS)  # the table has room for the widest of all views
    half = tl.zeros_like(sigma)
    for k in range(RADIUS + 1):
        scaled = k / sigma
        half += tl.where(k <= radius, tl.exp(-0.5 * (scaled * scaled)), 0.0)
    for k in range(RADIUS + 1):
        scaled = k / sigma
        weight = tl.exp(-0.5 * (scaled * scaled)) / (2.0 * half - 1.0)
        point = tl.where(k == 0, 1.0, tl.zeros_like(sigma))
        weight = tl.where(blurred, tl.where(k <= radius, weight, 0.0), point)
        tl.store(row + _BLUR + k, weight, mask=inside)


@triton.jit(do_not_specialize=["run_key", "samples", "first_view"])
def draw_kernel(
    ids,
    settings,
    table,
    run_key: tl.uint64,
    samples,
    first_view,
    RADIUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """int64 ids ``(B,)`` and float64 settings ``(V, S)`` to a table ``(V * B, P)``."""
    sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    view = tl.program_id(1)
    inside = sample < samples
    settings += view * _SETTINGS
    row = table + (view * samples + sample).to(tl.int64) * (_BLUR + RADIUS + 1)

    number = tl.load(ids + sample, mask=inside, other=0)
    key = _absorb(tl.full((BLOCK,), run_key, tl.uint64), number)
    key = _absorb(key, tl.full((BLOCK,), first_view + view, tl.uint64))

    flipped = _chance(key, _FLIP_STREAM, tl.load(settings + _P_FLIP))
    tl.store(row + _FLIP, flipped.to(tl.float64), mask=inside)
    _store_jitter(key, settings, row, inside)
    gray = _chance(key, _GRAYSCALE_STREAM, tl.load(settings + _P_GRAYSCALE))
    tl.store(row + _GRAYSCALE, gray.to(tl.float64), mask=inside)
    solarized = _chance(key, _SOLARIZE_STREAM, tl.load(settings + _P_SOLARIZE))
    threshold = tl.load(settings + _THRESHOLD)
    tl.store(row + _SOLARIZE, tl.where(solarized, threshold, float("inf")), mask=inside)
    _store_blur(key, settings, row, inside, RADIUS)


# --- host code ----------------------------------------------------------------------------------


def draw_table(
    run_key: int,
    ids_B: torch.Tensor,
    settings_VS: torch.Tensor,
    radius: int,
    dtype: torch.dtype = torch.float32,
    first_view: int = 0,
) -> torch.Tensor:
    """Parameters of every view of every sample, drawn on their device.

    Args:
        run_key: of the seed and the epoch, in [0, 2**64): ``common.randomness.run_key``.
        ids_B: int64 sample ids, on a GPU.
        settings_VS: float64, a :class:`Setting` a column, on the same device.
        radius: of the widest blur of any view, pixels; sets the width of the table.
        dtype: float32, which :func:`kernels.augment.augment` takes, or float64, which shows that
            the draws are the host's.
        first_view: number of the first view, whose draws its number decides.

    Returns:
        ``(V * B, P)``, view-major: as :mod:`kernels.augment.table` defines a table.

    Raises:
        ValueError: ids or settings are not as said.
    """
    if ids_B.dtype != torch.int64 or ids_B.ndim != 1:
        raise ValueError(f"draw_table: ids must be int64 (B,), got {ids_B.dtype} {ids_B.shape}")
    if settings_VS.dtype != torch.float64 or settings_VS.shape[1:] != (len(Setting),):
        raise ValueError(f"draw_table: settings must be float64 (V, {len(Setting)})")
    samples, views = len(ids_B), len(settings_VS)
    table_RP = ids_B.new_empty((views * samples, int(Column.BLUR) + radius + 1), dtype=dtype)
    if samples:
        with on_device_of(ids_B):
            draw_kernel[(triton.cdiv(samples, _BLOCK), views)](
                ids_B.contiguous(),
                settings_VS.contiguous(),
                table_RP,
                run_key,
                samples,
                first_view,
                RADIUS=radius,
                BLOCK=_BLOCK,
                num_warps=2,
                # A fused multiply-add rounds once where the host rounds twice.
                enable_fp_fusion=False,
            )
    return table_RP
