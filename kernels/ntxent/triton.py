"""Statistics and gradient on CUDA, tile by tile: the N x N matrix never exists, nor do atomics.

Of the own block, where the matrix is symmetric, only tiles on and above the diagonal are computed:
a tile's sums along rows go to its rows, its sums along columns to its columns, so that every
product and (above tau = 0.025) every exponential serves twice.

**No atomics.** Programs write partial results to slots of their own, which torch adds in a fixed
order; the grid depends on shapes alone. The same input gives the same bits on any GPU of a kind.
The own block's slots: rows are cut into at most 64 groups; the program of groups (A, B), A <= B,
adds to slot B of A's rows and to slot A of B's rows, and no other program touches those. That is
64 times two or three floats per row at most.

**Bounded logits.** Rows are unit vectors, so a logit lies within +-1/tau. Above tau = 0.025 the
shift 1/tau serves all rows: ``exp(s - 1/tau) >= exp(-2/tau) >= 2^-118`` neither over- nor
underflows, no maximum is kept, and ``p_ij + p_ji = exp(s - 1/tau) (f_i + f_j)`` with
``f = exp(1/tau - lse)`` takes one exponential. Below, every row keeps its own running maximum
(online softmax, arXiv 1805.02867) and every pair takes two.

**Backward is not symmetric,** though its tiles are: sharing them would save a quarter of the FLOPs,
and move ``128 x D`` floats per tile: at D = 128 that is 6 TB/s at an H100's 600 TFLOP/s, above what
its L2 delivers; and, without atomics, it would take one N x D float32 buffer per group.

Shapes: M rows against N columns, D dimensions, m x n a tile, S slots.
"""

import math
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from kernels.dispatch import on_device_of
from kernels.ntxent.triton_kernels import gradient_kernel, own_block_kernel, rectangle_kernel

MAX_DIMENSIONS = 512
MAX_GROUPS = 64
# Programs that fill any GPU up to B200's 148 multiprocessors twice. Not asked of the device: the
# order of a sum must not depend on it.
PROGRAMS = 296
# 2 * 41 * log2(e) < 120 with the rounding of 16-bit unit rows: exponents stay normal numbers.
BOUNDED_INVERSE_TEMPERATURE = 40.0


class TileConfig(NamedTuple):
    """One kernel's tile: its size, the dimensions held of it at a time, and who computes it."""

    rows: int
    columns: int
    chunk: int
    warps: int
    stages: int


class TileConfigs(NamedTuple):
    """The tiles of the three kernels."""

    own_block: TileConfig
    rectangle: TileConfig
    gradient: TileConfig


def tile_config(size_d: int, dtype: torch.dtype, capability: tuple[int, int]) -> TileConfigs:
    """Tiles by size and GPU; a table, not a measurement: nothing is tuned while training.

    Chosen so that no register spills on compute capability 8.0, 9.0 and 10.0, and that shared
    memory fits (``python -m tests.kernels.machine_code``). Rows of 16 bits are held whole as far as
    that goes; float32 rows, whose products take three tensor-core passes, 32 or 64 dimensions at a
    time (the gradient kernel then recomputes the logits for every 64 dimensions of its result).

    Args:
        size_d: dimensions, up to 512.
        dtype: of the rows: bfloat16, float16 or float32.
        capability: of the GPU, as ``torch.cuda.get_device_capability`` says.
    """
    whole = max(16, 1 << (size_d - 1).bit_length())  # 16: the least a tensor core multiplies
    if dtype == torch.float32:
        forward = TileConfig(64, 64, min(whole, 32), 8, 3)
        return TileConfigs(forward, forward, TileConfig(64, 32, min(whole, 64), 8, 2))
    if capability[0] == 12 or (capability[0] == 8 and capability[1] != 0):
        # 99 KiB of shared memory (GeForce and their like), not 163 or 227
        forward = TileConfig(64, 64, min(whole, 64), 8, 3)
        return TileConfigs(forward, forward, TileConfig(64, 32, min(whole, 128), 8, 2))
    own_block = TileConfig(64, 64, whole if whole <= 128 else 64, 8, 3)
    if whole <= 128:
        rectangle = TileConfig(128, 128, whole, 8, 3)
        return TileConfigs(own_block, rectangle, TileConfig(128, 64, whole, 8, 2))
    if whole == 256:
        return TileConfigs(own_block, TileConfig(128, 64, 256, 8, 2), TileConfig(64, 64, 256, 8, 2))
    return TileConfigs(own_block, TileConfig(64, 64, 512, 8, 2), TileConfig(64, 32, 512, 8, 2))


def unsupported(device: torch.device, dtype: torch.dtype, size_d: int) -> str:
    """What keeps these kernels from such rows, as a phrase; empty where nothing does."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the Triton kernels take bfloat16, float16 and float32, not {dtype}"
    if not 1 <= size_d <= MAX_DIMENSIONS:
        return f"the Triton kernels take 1 to {MAX_DIMENSIONS} dimensions, not {size_d}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the Triton kernels need compute capability 8.0 (A100) or newer"
    return ""


def statistics(
    rows_MD: torch.Tensor,
    columns_ND: torch.Tensor,
    positive_M: torch.Tensor,
    inv_temperature: float,
    *,
    symmetric: bool = False,
    block_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`kernels.ntxent.cpu.statistics`, for rows that :func:`unsupported` lets by.

    They are copied where D or the distance of rows is no multiple of 16 or elements are strided.
    ``block_size`` is 16, 32, 64 or 128; ``None`` takes :func:`tile_config`'s.
    """
    configs = _configs(rows_MD, block_size)
    rows_MD, columns_ND = _readable(rows_MD, columns_ND)
    if symmetric:
        kernel, config = own_block_kernel, configs.own_block
        blocks = _blocks(len(rows_MD), config.rows)
        share = max(1, _blocks(blocks, MAX_GROUPS))
        grid = (_blocks(blocks, share), _blocks(blocks, share))
    else:
        kernel, config = rectangle_kernel, configs.rectangle
        grid, share = _splits(len(rows_MD), len(columns_ND), config)
    online = inv_temperature > BOUNDED_INVERSE_TEMPERATURE
    sums_SM = torch.zeros((max(1, grid[1]), len(rows_MD)), device=rows_MD.device)
    hardest_SM = torch.full_like(sums_SM, float("-inf"))
    maxima_SM = hardest_SM.clone() if online else sums_SM  # a pointer that nobody follows
    _launch(
        kernel,
        (grid, config, share),
        rows_MD,
        columns_ND,
        inv_temperature,
        positive=positive_M.contiguous(),
        sums=sums_SM,
        maxima=maxima_SM,
        hardests=hardest_SM,
    )
    if online:
        lse_M = (sums_SM.log() + maxima_SM * math.log(2)).logsumexp(0)
    else:
        lse_M = sums_SM.sum(0).log() + inv_temperature
    return lse_M, hardest_SM.amax(0) * math.log(2)


def gradient(
    rows_MD: torch.Tensor,
    columns_ND: torch.Tensor,
    lse: torch.Tensor,
    inv_temperature: float,
    *,
    own: slice | None = None,
    block_size: int | None = None,
) -> torch.Tensor:
    """As :func:`kernels.ntxent.cpu.gradient`; rows and tiles as in :func:`statistics`."""
    size_d = rows_MD.shape[1]
    config = _configs(rows_MD, block_size).gradient
    rows_MD, columns_ND = _readable(rows_MD, columns_ND)
    grid, share = _splits(len(rows_MD), len(columns_ND), config)
    partial_SMD = torch.zeros((max(1, grid[1]), *rows_MD.shape), device=rows_MD.device)
    _launch(
        gradient_kernel,
        ((*grid, _blocks(rows_MD.shape[1], config.chunk)), config, share),
        rows_MD,
        columns_ND,
        inv_temperature,
        row_lse=lse if own is None else lse[own].clone(),  # aligned, which a slice need not be
        column_lse=lse.contiguous(),
        gradient=partial_SMD,
        own_start=0 if own is None else own.start,
        OWN=own is not None,
    )
    gradient_MD = partial_SMD[0] if len(partial_SMD) == 1 else partial_SMD.sum(0)
    return gradient_MD[:, :size_d].contiguous()


def _launch(
    kernel: Any,
    cut: tuple[tuple[int, ...], TileConfig, int],
    rows_MD: torch.Tensor,
    columns_ND: torch.Tensor,
    inv_temperature: float,
    **more: Any,
) -> None:
    """Run a kernel on those arguments that it names, unless there is nothing to do."""
    grid, config, share = cut
    arguments = {
        "row_pointer": rows_MD,
        "row_count": len(rows_MD),
        "row_stride": rows_MD.stride(0),
        "column_pointer": columns_ND,
        "column_count": len(columns_ND),
        "column_stride": columns_ND.stride(0),
        "scale": inv_temperature / math.log(2),
        "share": share,
        "SIZE_D": rows_MD.shape[1],
        "CHUNK": config.chunk,
        "BLOCK_M": config.rows,
        "BLOCK_N": config.columns,
        "ONLINE": inv_temperature > BOUNDED_INVERSE_TEMPERATURE,
        "PRECISION": _precision(rows_MD.dtype),
        **more,
    }
    named = {name: arguments[name] for name in kernel.arg_names}
    if 0 not in grid:
        with on_device_of(rows_MD):
            kernel[grid](**named, num_warps=config.warps, num_stages=config.stages)


def _readable(rows_MD: torch.Tensor, columns_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that the kernels can read 16 bytes at a time, copied and padded with zeros if need be.

    Unaligned loads take registers until they spill; a copy is nothing beside N products per row.
    """
    if (rows_MD.dtype, rows_MD.shape[1]) != (columns_ND.dtype, columns_ND.shape[1]):
        raise ValueError(
            f"ntxent: rows of {rows_MD.shape[1]} {rows_MD.dtype} against columns of "
            f"{columns_ND.shape[1]} {columns_ND.dtype}"
        )
    if reason := unsupported(rows_MD.device, rows_MD.dtype, rows_MD.shape[1]):
        raise ValueError(f"ntxent: {reason}; use implementation='auto'")
    return _aligned(rows_MD), _aligned(columns_ND)


def _aligned(rows: torch.Tensor) -> torch.Tensor:
    if not rows.is_cuda and rows.dtype == torch.bfloat16:
        rows = rows.float()  # Triton's interpreter multiplies bfloat16 as if it were integers
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


def _splits(rows: int, columns: int, config: TileConfig) -> tuple[tuple[int, int], int]:
    """Blocks of rows against splits of the columns, and the columns of a split."""
    row_blocks, column_blocks = _blocks(rows, config.rows), _blocks(columns, config.columns)
    wanted = max(1, min(column_blocks, _blocks(PROGRAMS, max(1, row_blocks))))
    per_split = max(1, _blocks(column_blocks, wanted)) * config.columns
    return (row_blocks, _blocks(columns, per_split)), per_split


def _blocks(count: int, block: int) -> int:
    """Blocks that ``count`` rows take, the last one perhaps not full."""
    return -(-count // block)


def _precision(dtype: torch.dtype) -> str:
    """How float32 factors are multiplied; 16-bit ones have no choice.

    ``torch.set_float32_matmul_precision("high")`` allows TF32's 10 bits; without it three TF32
    passes give float32's 23, where ``"ieee"`` would leave the tensor cores idle and spill.
    """
    if dtype != torch.float32:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
