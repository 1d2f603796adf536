"""How the Triton kernels are launched: their tiles, the work they do, what is compiled ahead."""

from typing import NamedTuple

import torch

from kernels.compile_case import CompileCase
from kernels.ntxent.triton_device import cross_kernel, gradient_kernel, own_block_kernel

__all__ = ["TileConfig", "TileConfigs", "blocks_of", "compile_cases", "flop_count", "tile_config"]

TRITON_DTYPE = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


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
    own_block_light: TileConfig
    """With bounded logits and no rival: no maxima take registers, the tile may be larger."""
    cross: TileConfig
    gradient: TileConfig


def tile_config(size_d: int, dtype: torch.dtype, capability: tuple[int, int]) -> TileConfigs:
    """Tiles by size and GPU; a table, not a measurement: nothing is tuned while training.

    Chosen so that no register spills on compute capability 8.0, 9.0 and 10.0, and that shared
    memory fits (``python -m kernels.inspect``). Rows of 16 bits are held whole as far as that
    goes; float32 rows, whose products take three tensor-core passes, 32 or 64 dimensions at a time
    (the gradient kernel then recomputes the logits for every 64 dimensions of its result).

    Args:
        size_d: dimensions, up to 512.
        dtype: of the rows: bfloat16, float16 or float32.
        capability: of the GPU, as ``torch.cuda.get_device_capability`` says.
    """
    whole = max(16, 1 << (size_d - 1).bit_length())  # 16: the least a tensor core multiplies
    if dtype == torch.float32:
        forward = TileConfig(64, 64, min(whole, 32), 8, 3)
        return TileConfigs(forward, forward, forward, TileConfig(64, 32, min(whole, 64), 8, 2))
    if capability[0] == 12 or (capability[0] == 8 and capability[1] != 0):
        # 99 KiB of shared memory (GeForce and their like), not 163 or 227
        forward = TileConfig(64, 64, min(whole, 64), 8, 3)
        return TileConfigs(forward, forward, forward, TileConfig(64, 32, min(whole, 128), 8, 2))
    if whole <= 128:
        return TileConfigs(
            TileConfig(64, 64, whole, 8, 3),
            TileConfig(128, 128, whole, 8, 3),
            TileConfig(128, 128, whole, 8, 3),
            TileConfig(128, 64, whole, 8, 2),
        )
    return TileConfigs(
        TileConfig(64, 64, 64, 8, 3),
        TileConfig(128, 128, 64, 8, 3),
        TileConfig(128, 64, whole, 8, 2) if whole == 256 else TileConfig(64, 64, whole, 8, 2),
        TileConfig(64, 64, whole, 8, 2) if whole == 256 else TileConfig(64, 32, whole, 8, 2),
    )


class FlopCount(NamedTuple):
    """Work of a forward and a backward pass; a multiply-add is 2 FLOPs."""

    forward: int
    backward: int
    exponentials: int

    @property
    def total(self) -> int:
        """FLOPs of the products of both passes."""
        return self.forward + self.backward


def flop_count(
    rows: int, columns: int, size_d: int, *, symmetric: bool = True, block: int = 128
) -> FlopCount:
    """What NT-Xent of ``rows`` own rows among ``columns`` rows costs, tiles at the edge included.

    Per pair and dimension forward takes 2 FLOPs, backward 4 (the logit again, and the weighted
    sum): 6 N^2 D on one process. With symmetry forward takes half on the own block: 5 N^2 D. What
    autograd would do with the tile recomputed, two products for the two sides of ``s_ij``, takes
    2 + 6 = 8 N^2 D; sharing the tile in backward too would take 1 + 3 = 4 (the module says why it
    is not done).

    Args:
        rows: M, own rows.
        columns: N, all rows, the own ones among them.
        size_d: D.
        symmetric: whether the own block is computed by its upper triangle.
        block: rows and columns of a tile.

    Returns:
        FLOPs, and exponentials with bounded logits (twice as many below tau = 0.025).
    """
    own_blocks, others = blocks_of(rows, block), blocks_of(columns - rows, block)
    own_tiles = own_blocks * (own_blocks + 1) // 2 if symmetric else own_blocks**2
    forward_pairs = (own_tiles + own_blocks * others) * block**2
    backward_pairs = own_blocks * blocks_of(columns, block) * block**2
    # A tile of the own block is summed along both sides from one exponential per pair.
    return FlopCount(
        forward=2 * size_d * forward_pairs,
        backward=4 * size_d * backward_pairs,
        exponentials=forward_pairs + backward_pairs,
    )


def blocks_of(count: int, block: int) -> int:
    """Blocks that ``count`` rows take, the last one perhaps not full."""
    return -(-count // block)


_ARCHITECTURES = (80, 90, 100)
_COUNTS = {"row_count": "i32", "column_count": "i32", "row_stride": "i32", "column_stride": "i32"}
_SIGNATURES: dict[str, dict[str, str]] = {
    "own_block": {"count": "i32", "stride": "i32", "scale": "fp32", "blocks_per_group": "i32"},
    "cross": {**_COUNTS, "scale": "fp32", "columns_per_split": "i32"},
    "gradient": {**_COUNTS, "own_start": "i32", "scale": "fp32", "columns_per_split": "i32"},
}
_STATISTICS = {"positive": "*i64", "sums": "*fp32", "maxima": "*fp32", "rivals": "*fp32"}
_GRADIENT = {"row_lse": "*fp32", "column_lse": "*fp32", "gradient": "*fp32"}


def compile_cases() -> list[CompileCase]:
    """The configurations that training launches: SimCLR's and MoCo's dimensions, and the extremes.

    With the largest count of switches on, which takes the most registers, and with those of
    SimCLR's temperatures. D = 112 stands for all that
    are no power of two; the launcher pads to multiples of 16.
    """
    cases = []
    sizes = {torch.bfloat16: (64, 112, 128, 256, 512), torch.float16: (128,)}
    sizes[torch.float32] = (64, 128, 512)
    for dtype, dimensions in sizes.items():
        for size_d in dimensions:
            for online in (False, True):
                rival = online
                cases += [
                    _case("own_block", dtype, size_d, ONLINE=online, RIVAL=rival),
                    _case("cross", dtype, size_d, ONLINE=online, RIVAL=rival),
                    _case("gradient", dtype, size_d, ONLINE=online, TWO_SIDED=True),
                ]
    cases += [
        _case("own_block", torch.bfloat16, 128, ONLINE=False, RIVAL=True),
        _case("gradient", torch.bfloat16, 256, ONLINE=False, TWO_SIDED=False),  # MoCo v3
    ]
    return cases


def _case(kernel: str, dtype: torch.dtype, size_d: int, **switches: bool) -> CompileCase:
    # One table entry serves 8.0, 9.0 and 10.0.
    configs = tile_config(size_d, dtype, (9, 0))
    online, rival = switches["ONLINE"], switches.get("RIVAL", False)
    rows = f"*{TRITON_DTYPE[dtype]}"
    if kernel == "own_block":
        config = configs.own_block if online or rival else configs.own_block_light
        function, pointers = own_block_kernel, {"unit": rows, **_STATISTICS}
        tile: dict[str, int | bool] = {"BLOCK": config.rows}
    else:
        config = configs.cross if kernel == "cross" else configs.gradient
        function = cross_kernel if kernel == "cross" else gradient_kernel
        pointers = {"rows": rows, "columns": rows}
        pointers |= _STATISTICS if kernel == "cross" else _GRADIENT
        tile = {"BLOCK_M": config.rows, "BLOCK_N": config.columns}
    if kernel == "gradient":
        tile["EXCLUDE_SELF"] = switches["TWO_SIDED"]
    aligned = [*pointers, "stride", "row_stride", "column_stride", "columns_per_split"]
    signature = {**pointers, **_SIGNATURES[kernel]}
    named = ", ".join(name.lower() for name, on in switches.items() if on) or "plain"
    return CompileCase(
        name=f"ntxent.{kernel} {TRITON_DTYPE[dtype]} D={size_d} ({named})",
        kernel=function,
        signature=signature,
        constants={
            "SIZE_D": size_d,
            "CHUNK": config.chunk,
            "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee",
            "UPCAST": False,
            **tile,
            **switches,
        },
        aligned=tuple(name for name in aligned if name in signature),
        warps=config.warps,
        stages=config.stages,
        tensor_cores=True,
        architectures=_ARCHITECTURES,
    )
