"""Randomness as a coordinate: a counter-based generator without state.

A draw is a pure function of ``(seed, epoch, sample id, view, stream, k)``. No worker, rank or
device owns a stream, so a run draws the same numbers on any number of processes and after any
resume. The hash is the finaliser of splitmix64 (Steele, Lea & Flood, OOPSLA 2014), applied once per
coordinate and once per draw.

NumPy draws whole batches; torch draws the same bits where its tensors lie.
"""

from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch

U64Array = npt.NDArray[np.uint64]

# Constants of splitmix64. GOLDEN is 2**64 divided by the golden ratio.
GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIER_1 = 0xBF58476D1CE4E5B9
MULTIPLIER_2 = 0x94D049BB133111EB

_GOLDEN = np.uint64(GOLDEN)
_M1 = np.uint64(MULTIPLIER_1)
_M2 = np.uint64(MULTIPLIER_2)
_S30, _S27, _S31 = np.uint64(30), np.uint64(27), np.uint64(31)


SEEDS = range(-(1 << 63), 1 << 64)  # 64 bits, signed or not: what NumPy, torch and JSON files take


class Stream(IntEnum):
    """What a number is drawn for. Numbers are part of the format of a run: never renumber."""

    CROP = 1
    FLIP = 2
    JITTER = 3
    JITTER_ORDER = 4
    BRIGHTNESS = 5
    CONTRAST = 6
    SATURATION = 7
    HUE = 8
    GRAYSCALE = 9
    BLUR = 10
    BLUR_SIGMA = 11
    SOLARIZE = 12
    ORDER = 13
    SUBSTITUTE = 14
    SHUFFLE = 15
    NEGATIVE = 16
    CLUSTER = 17
    WEIGHTED = 18
    TILE = 19
    TILE_ORDER = 20
    TILE_COLOUR = 21
    NOISE = 22
    MASK = 23
    FRAME = 24
    FRAME_LOOK = 25
    WEIGHT = 26


def mix(x: U64Array) -> U64Array:
    """Finaliser of splitmix64: a bijection of ``uint64`` that avalanches every bit."""
    x = (x ^ (x >> _S30)) * _M1
    x = (x ^ (x >> _S27)) * _M2
    return x ^ (x >> _S31)


def absorb(state: U64Array, coordinate: U64Array) -> U64Array:
    """Fold one more coordinate into a key. Order matters: ``(a, b)`` and ``(b, a)`` differ."""
    return mix(state ^ mix(coordinate + _GOLDEN))


def _u64(x: npt.ArrayLike) -> U64Array:
    return np.asarray(x).astype(np.uint64)


def run_key(seed: int, epoch: int) -> U64Array:
    """Key of one epoch of one run, a 0-d ``uint64`` array."""
    with np.errstate(over="ignore"):  # wrapping modulo 2**64 is what a hash wants
        return _u64(absorb(absorb(_u64(0), _u64(seed)), _u64(epoch)))


def sample_keys(
    seed: int, epoch: int, ids: npt.ArrayLike, view: npt.ArrayLike, stream: Stream
) -> U64Array:
    """Keys of samples ``ids`` for one view and stream; shapes of ``ids`` and ``view`` broadcast."""
    with np.errstate(over="ignore"):
        key = absorb(absorb(run_key(seed, epoch), _u64(ids)), _u64(view))
        return _u64(absorb(key, _u64(int(stream))))


def uniforms(keys: U64Array, k: npt.ArrayLike = 0) -> npt.NDArray[np.float64]:
    """The ``k``-th uniform in [0, 1) of each key: 53 random bits in a float64."""
    with np.errstate(over="ignore"):
        bits = mix(_u64(keys) + (_u64(k) + np.uint64(1)) * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniforms_on_device(
    seed: int, epoch: int, ids_B: torch.Tensor, views_V: torch.Tensor, streams_S: torch.Tensor
) -> torch.Tensor:
    """The first uniform of each of :func:`sample_keys`, for int64 tensors on one device.

    Returns:
        float64 ``(V, B, S)`` there, of the bits that NumPy draws.
    """
    key_B = _absorb_signed(_signed(int(run_key(seed, epoch))), ids_B)
    key_VB = _absorb_signed(key_B, views_V[:, None])
    key_VBS = _absorb_signed(key_VB[..., None], streams_S)
    bits_VBS = _mix_signed(key_VBS + _signed(GOLDEN))
    return _shifted(bits_VBS, 11).double() * 2.0**-53


def _signed(number: int) -> int:
    """The same 64 bits as torch has them, whose unsigned integers lack the operations."""
    return number - (1 << 64) if number >> 63 else number


def _shifted(x: torch.Tensor, places: int) -> torch.Tensor:
    """Zeros come in from the left, not the sign."""
    return (x >> places) & ((1 << (64 - places)) - 1)


def _mix_signed(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(MULTIPLIER_1)
    x = (x ^ _shifted(x, 27)) * _signed(MULTIPLIER_2)
    return x ^ _shifted(x, 31)


def _absorb_signed(state: torch.Tensor | int, coordinate: torch.Tensor) -> torch.Tensor:
    return _mix_signed(_mix_signed(coordinate + _signed(GOLDEN)) ^ state)
