"""NT-Xent and InfoNCE on CUDA, tile by tile: the N x N matrix never exists, nor do atomics.

Three kernels, each a loop of tiles of ``u_i . u_j / tau``:

``own_block_kernel``
    log-sum-exps among the own rows, where the matrix is symmetric: only tiles on and above the
    diagonal. A tile's sums along rows go to its rows, its sums along columns to its columns, so
    that every product and (above tau = 0.025) every exponential serves twice.
``cross_kernel``
    log-sum-exps of rows over other columns: other ranks' rows, MoCo's keys, MoCo's queue.
``gradient_kernel``
    ``sum_j w_ij u_j`` with the tile recomputed; ``w = p_ij + p_ji`` (NT-Xent) or ``p_ij`` (MoCo).

**No atomics.** Programs write partial results to slots of their own, which torch adds in a fixed
order; the grid depends on shapes alone. The same input gives the same bits on any GPU of a kind.
The own block's slots: rows are cut into at most 64 groups; the program of groups (A, B), A <= B,
adds to slot B of A's rows and to slot A of B's rows, and no other program touches those. That is
64 floats per row at most: the memory of the rows themselves at D = 128 in 16 bits.

**Bounded logits.** Rows are unit vectors, so a logit lies within +-1/tau. Above tau = 0.025 the
shift 1/tau serves all rows: ``exp(s - 1/tau) >= exp(-2/tau) >= 2^-118`` neither over- nor
underflows, no maximum is kept, and ``p_ij + p_ji = exp(s - 1/tau) (f_i + f_j)`` with
``f = exp(1/tau - lse)`` takes one exponential. Below, every row keeps its own running maximum
(online softmax, arXiv 1805.02867) and every pair takes two.

**Backward is not symmetric,** though its tiles are. Per pair (i, j) and dimension a plain pass
spends 2 FLOPs on the logit and 2 on ``w_ij u_j``; sharing the tile saves half of the former only,
a quarter of the whole. It would cost a second accumulator of a tile's width and an addition of
``128 x D`` floats to memory per tile: at D = 128 that is 128 KiB moved per 12.6 MFLOP, 6 TB/s at
an H100's 600 TFLOP/s, above what its L2 delivers; and, without atomics, one N x D float32 buffer
per group. :func:`kernels.ntxent.triton_plan.flop_count` counts it all.

Shapes: M rows against N columns, D dimensions, m x n a tile, S slots. See ``blocked.py`` for the
functions' contract.
"""

import math
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad
from triton.runtime.interpreter import InterpretedFunction

from kernels.ntxent.triton_device import cross_kernel, gradient_kernel, own_block_kernel
from kernels.ntxent.triton_plan import (
    TRITON_DTYPE,
    TileConfig,
    TileConfigs,
    blocks_of,
    compile_cases,
    tile_config,
)

__all__ = [
    "compile_cases",
    "cross_gradient",
    "cross_statistics",
    "row_gradient",
    "row_logsumexp",
    "row_statistics",
    "unsupported",
]

MAX_DIMENSIONS = 512
MAX_GROUPS = 64
# Programs that fill any GPU up to B200's 148 multiprocessors twice. Not asked of the device: the
# order of a sum must not depend on it.
PROGRAMS = 296
# 2 * 41 * log2(e) < 120 with the rounding of 16-bit unit rows: exponents stay normal numbers.
BOUNDED_INVERSE_TEMPERATURE = 40.0

_INTERPRETED = isinstance(own_block_kernel, InterpretedFunction)


def unsupported(device: torch.device, dtype: torch.dtype, size_d: int) -> str | None:
    """What keeps these kernels from such rows, as a phrase; ``None`` where nothing does."""
    if device.type != "cuda" and not _INTERPRETED:
        return f"Triton needs a CUDA device, the rows are on {device.type}"
    if dtype not in TRITON_DTYPE:
        return f"the Triton kernels take bfloat16, float16 and float32, not {dtype}"
    if not 1 <= size_d <= MAX_DIMENSIONS:
        return f"the Triton kernels take 1 to {MAX_DIMENSIONS} dimensions, not {size_d}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the Triton kernels need compute capability 8.0 (A100) or newer"
    return None


def row_logsumexp(
    all_ND: torch.Tensor, own: slice, inv_temperature: float, block_size: int | None = None
) -> torch.Tensor:
    """``log sum_{j != i} exp(u_i . u_j / tau)`` for the own rows i, over all rows j.

    As :func:`kernels.ntxent.blocked.row_logsumexp`, for unit rows on CUDA.

    Args:
        all_ND: unit rows of all ranks, bfloat16, float16 or float32, D up to 512. They are copied
            where D or the distance of rows is no multiple of 16 or a row's elements are strided.
        own: this rank's rows among them.
        inv_temperature: 1 / tau.
        block_size: rows and columns of a tile, a power of two from 16 to 128; ``None`` takes
            :func:`kernels.ntxent.triton_plan.tile_config`'s.

    Returns:
        ``(M,)`` float32.

    Raises:
        ValueError: device, dtype, dimensions or block size are not supported.
    """
    return row_statistics(all_ND, own, inv_temperature, block_size=block_size)[0]


def row_statistics(
    all_ND: torch.Tensor,
    own: slice,
    inv_temperature: float,
    positive_M: torch.Tensor | None = None,
    block_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`row_logsumexp`, and each row's largest logit but its positive's, in the same pass.

    A row is told from its negatives ("top-1") where its positive's logit is the larger one.

    Args:
        all_ND: as in :func:`row_logsumexp`.
        own: as there.
        inv_temperature: as there.
        positive_M: int64, each own row's positive, counted from the first own row; the positive of
            a row's positive is the row.
        block_size: as there.

    Returns:
        ``(M,)`` float32 log-sum-exps, and ``(M,)`` float32 rivals' logits, ``None`` without
        ``positive_M``.
    """
    rows_MD = all_ND[own]
    statistics = [_own_block(_checked(rows_MD), inv_temperature, positive_M, block_size)]
    for columns in (all_ND[: own.start], all_ND[own.stop :]):
        if len(columns):
            # No column there is a positive: -1 is no index.
            nowhere = None if positive_M is None else torch.full_like(positive_M, -1)
            statistics.append(
                cross_statistics(rows_MD, columns, inv_temperature, nowhere, block_size)
            )
    lse_M, rival_M = statistics[0]
    for other_lse_M, other_rival_M in statistics[1:]:
        lse_M = torch.logaddexp(lse_M, other_lse_M)
        if rival_M is not None and other_rival_M is not None:
            rival_M = torch.maximum(rival_M, other_rival_M)
    return lse_M, rival_M


def cross_statistics(
    rows_MD: torch.Tensor,
    columns_ND: torch.Tensor,
    inv_temperature: float,
    positive_M: torch.Tensor | None = None,
    block_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``log sum_j exp(u_i . v_j / tau)``, and each row's largest logit but its positive's.

    As :func:`kernels.ntxent.rectangle.cross_statistics`; limits as in :func:`row_logsumexp`.

    Args:
        rows_MD: unit rows: queries.
        columns_ND: unit rows of the same dtype: keys.
        inv_temperature: 1 / tau.
        positive_M: int64, each row's positive among the columns; -1 where it is none of them.
        block_size: as in :func:`row_logsumexp`.

    Returns:
        As :func:`row_statistics`.
    """
    rows_MD, columns_ND = _checked_pair(rows_MD, columns_ND)
    config = _configs(rows_MD, block_size).cross
    grid, per_split = _grid(len(rows_MD), len(columns_ND), config)
    partial = _Partial.empty(grid[1], rows_MD, inv_temperature, positive_M)
    if rows_MD.numel() and len(columns_ND):
        _launch(
            cross_kernel,
            grid,
            config,
            rows=rows_MD,
            columns=columns_ND,
            **partial.arguments(positive_M),
            row_count=len(rows_MD),
            column_count=len(columns_ND),
            row_stride=rows_MD.stride(0),
            column_stride=columns_ND.stride(0),
            scale=inv_temperature / math.log(2),
            columns_per_split=per_split,
            **_constants(rows_MD, config, partial.online),
            BLOCK_M=config.rows,
            BLOCK_N=config.columns,
            RIVAL=positive_M is not None,
        )
    return partial.combine(inv_temperature)


def _own_block(
    rows_MD: torch.Tensor,
    inv_temperature: float,
    positive_M: torch.Tensor | None,
    block_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    configs = _configs(rows_MD, block_size)
    light = inv_temperature <= BOUNDED_INVERSE_TEMPERATURE and positive_M is None
    config = configs.own_block_light if light else configs.own_block
    blocks = blocks_of(len(rows_MD), config.rows)
    per_group = max(1, blocks_of(blocks, MAX_GROUPS))
    groups = blocks_of(blocks, per_group)
    partial = _Partial.empty(groups, rows_MD, inv_temperature, positive_M)
    if len(rows_MD):
        _launch(
            own_block_kernel,
            (groups, groups),
            config,
            unit=rows_MD,
            **partial.arguments(positive_M),
            count=len(rows_MD),
            stride=rows_MD.stride(0),
            scale=inv_temperature / math.log(2),
            blocks_per_group=per_group,
            **_constants(rows_MD, config, partial.online),
            BLOCK=config.rows,
            RIVAL=positive_M is not None,
        )
    return partial.combine(inv_temperature)


class _Partial(NamedTuple):
    """Statistics by slot, each ``(S, M)``, in powers of two, neutral until written."""

    sums: torch.Tensor
    maxima: torch.Tensor | None
    rivals: torch.Tensor | None

    @classmethod
    def empty(
        cls,
        slots: int,
        rows_MD: torch.Tensor,
        inv_temperature: float,
        positive_M: torch.Tensor | None,
    ) -> "_Partial":
        shape = (max(1, slots), len(rows_MD))
        zeros = torch.zeros(shape, device=rows_MD.device, dtype=torch.float32)
        online = inv_temperature > BOUNDED_INVERSE_TEMPERATURE
        return cls(
            zeros,
            torch.full_like(zeros, float("-inf")) if online else None,
            None if positive_M is None else torch.full_like(zeros, float("-inf")),
        )

    @property
    def online(self) -> bool:
        return self.maxima is not None

    def arguments(self, positive_M: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The kernels' pointers; those that its switches leave unused point to the sums."""
        return {
            "positive": self.sums if positive_M is None else positive_M.contiguous(),
            "sums": self.sums,
            "maxima": self.sums if self.maxima is None else self.maxima,
            "rivals": self.sums if self.rivals is None else self.rivals,
        }

    def combine(self, inv_temperature: float) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Natural log-sum-exps and rivals' logits, ``(M,)``."""
        if self.maxima is None:
            lse_M = self.sums.sum(0).log() + inv_temperature
        else:
            lse_M = (self.sums.log() + self.maxima * math.log(2)).logsumexp(0)
        return lse_M, None if self.rivals is None else self.rivals.amax(0) * math.log(2)


def row_gradient(
    all_ND: torch.Tensor,
    own: slice,
    lse_N: torch.Tensor,
    inv_temperature: float,
    block_size: int | None = None,
) -> torch.Tensor:
    """``sum_{j != i} (p_ij + p_ji) u_j`` for the own rows i, ``(M, D)`` float32.

    As :func:`kernels.ntxent.blocked.row_gradient`; limits as in :func:`row_logsumexp`.
    """
    return _gradient(all_ND[own], all_ND, lse_N[own], lse_N, own.start, inv_temperature, block_size)


def cross_gradient(
    rows_MD: torch.Tensor,
    columns_ND: torch.Tensor,
    lse_M: torch.Tensor,
    inv_temperature: float,
    block_size: int | None = None,
) -> torch.Tensor:
    """``sum_j exp(u_i . v_j / tau - lse_i) v_j`` over all columns j, ``(M, D)`` float32.

    As :func:`kernels.ntxent.rectangle.cross_gradient`; limits as in :func:`row_logsumexp`.
    """
    return _gradient(rows_MD, columns_ND, lse_M, None, 0, inv_temperature, block_size)


def _gradient(
    rows_MD: torch.Tensor,
    columns_ND: torch.Tensor,
    lse_M: torch.Tensor,
    lse_N: torch.Tensor | None,
    own_start: int,
    inv_temperature: float,
    block_size: int | None,
) -> torch.Tensor:
    dimensions = rows_MD.shape[1]
    rows_MD, columns_ND = _checked_pair(rows_MD, columns_ND)
    lse_M = lse_M.clone()  # aligned, which a slice of all ranks' need not be
    size_d = rows_MD.shape[1]  # padded
    config = _configs(rows_MD, block_size).gradient
    grid, per_split = _grid(len(rows_MD), len(columns_ND), config)
    shape = (max(1, grid[1]), len(rows_MD), size_d)
    partial_SMD = torch.zeros(shape, device=rows_MD.device, dtype=torch.float32)
    if rows_MD.numel() and len(columns_ND):
        _launch(
            gradient_kernel,
            (*grid, blocks_of(size_d, config.chunk)),
            config,
            rows=rows_MD,
            columns=columns_ND,
            row_lse=lse_M,
            column_lse=lse_M if lse_N is None else lse_N.contiguous(),
            gradient=partial_SMD,
            row_count=len(rows_MD),
            column_count=len(columns_ND),
            row_stride=rows_MD.stride(0),
            column_stride=columns_ND.stride(0),
            own_start=own_start,
            scale=inv_temperature / math.log(2),
            columns_per_split=per_split,
            **_constants(rows_MD, config, inv_temperature > BOUNDED_INVERSE_TEMPERATURE),
            BLOCK_M=config.rows,
            BLOCK_N=config.columns,
            TWO_SIDED=lse_N is not None,
            EXCLUDE_SELF=lse_N is not None,
        )
    gradient_MD = partial_SMD[0] if len(partial_SMD) == 1 else partial_SMD.sum(0)
    return gradient_MD[:, :dimensions].contiguous()


def _checked_pair(
    rows_MD: torch.Tensor, columns_ND: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if (rows_MD.dtype, rows_MD.shape[1]) != (columns_ND.dtype, columns_ND.shape[1]):
        raise ValueError(
            f"ntxent: rows of {rows_MD.shape[1]} {rows_MD.dtype} against columns of "
            f"{columns_ND.shape[1]} {columns_ND.dtype}"
        )
    return _checked(rows_MD), _checked(columns_ND)


def _checked(rows: torch.Tensor) -> torch.Tensor:
    """Rows that the kernels can read 16 bytes at a time, copied and padded with zeros if need be.

    Unaligned loads take registers until they spill; a copy is nothing beside N products per row.
    """
    reason = unsupported(rows.device, rows.dtype, rows.shape[1])
    if reason is not None:
        raise ValueError(f"ntxent: {reason}; use implementation='auto'")
    if rows.shape[1] % 16:
        return pad(rows, (0, -rows.shape[1] % 16))
    aligned = rows.stride(1) == 1 and rows.stride(0) % 16 == 0 and rows.data_ptr() % 16 == 0
    return rows if aligned else rows.clone(memory_format=torch.contiguous_format)


def _configs(rows_MD: torch.Tensor, block_size: int | None) -> TileConfigs:
    on_gpu = rows_MD.is_cuda
    capability = torch.cuda.get_device_capability(rows_MD.device) if on_gpu else (9, 0)
    configs = tile_config(rows_MD.shape[1], rows_MD.dtype, capability)
    if block_size is None:
        return configs
    if block_size not in (16, 32, 64, 128):
        raise ValueError(f"ntxent: a Triton tile has 16, 32, 64 or 128 rows, not {block_size}")
    return TileConfigs(*(c._replace(rows=block_size, columns=block_size) for c in configs))


def _grid(rows: int, columns: int, config: TileConfig) -> tuple[tuple[int, int], int]:
    """Blocks of rows and splits of the columns, and the columns of one split."""
    row_blocks, column_blocks = blocks_of(rows, config.rows), blocks_of(columns, config.columns)
    wanted = max(1, min(column_blocks, blocks_of(PROGRAMS, max(1, row_blocks))))
    per_split = max(1, blocks_of(column_blocks, wanted)) * config.columns
    return (row_blocks, blocks_of(columns, per_split)), per_split


def _constants(rows_MD: torch.Tensor, config: TileConfig, online: bool) -> dict[str, Any]:
    return {
        "SIZE_D": rows_MD.shape[1],
        "CHUNK": config.chunk,
        "ONLINE": online,
        "PRECISION": _precision(rows_MD.dtype),
        "UPCAST": _INTERPRETED and rows_MD.dtype == torch.bfloat16,
    }


def _precision(dtype: torch.dtype) -> str:
    """How float32 factors are multiplied; 16-bit ones have no choice.

    ``torch.set_float32_matmul_precision("high")`` allows TF32's 10 bits; without it three TF32
    passes give float32's 23, where ``"ieee"`` would leave the tensor cores idle and spill.
    """
    if dtype != torch.float32:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _launch(kernel: Any, grid: tuple[int, ...], config: TileConfig, **arguments: Any) -> None:
    device = next(v.device for v in arguments.values() if isinstance(v, torch.Tensor))
    if device.type != "cuda":
        kernel[grid](**arguments)
        return
    with torch.cuda.device(device):
        kernel[grid](**arguments, num_warps=config.warps, num_stages=config.stages)
