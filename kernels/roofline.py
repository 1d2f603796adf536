"""What a GPU must at least do for every kernel: multiply-adds, exponentials, bytes, and their time.

``python -m kernels.roofline`` prints the tables of ``docs/kernels.md``. Every figure is arithmetic
from the counts below and the vendors' peak rates; none was measured.
"""

from typing import NamedTuple

import torch

from kernels.augment.plan import bytes_moved
from kernels.ntxent.triton_plan import flop_count

__all__ = ["GPUS", "Gpu", "NTXent", "main", "ntxent", "tables"]

RESNET50_PARAMETERS = 27_967_000
"""ResNet-50 without its classifier and SimCLR's head 2048-2048-128, rounded."""


class Gpu(NamedTuple):
    """Peak rates from the vendor's data sheets, dense, at boost clock."""

    name: str
    flops: float
    """bfloat16 products with float32 sums, per second."""
    exponentials: float
    """16 per clock and multiprocessor, per second."""
    bandwidth: float
    """Device memory, bytes per second."""
    processors: int


GPUS = (
    Gpu("A100", 312e12, 108 * 16 * 1.41e9, 2.04e12, 108),
    Gpu("H100", 989e12, 132 * 16 * 1.83e9, 3.35e12, 132),
    Gpu("B200", 2250e12, 148 * 16 * 1.85e9, 8.0e12, 148),
)


class NTXent(NamedTuple):
    """Forward and backward of N rows on one process."""

    flops: int
    exponentials: int
    bytes: int
    """Between device memory and the GPU, tiles of 128 columns being read once per 128 rows out of
    a cache that holds nothing in between."""
    memory: int
    """Beside the rows and their gradient."""

    def seconds(self, gpu: Gpu) -> tuple[float, float]:
        """The least: the slowest of the three alone; and products and exponentials in turn."""
        products, powers = self.flops / gpu.flops, self.exponentials / gpu.exponentials
        traffic = self.bytes / gpu.bandwidth
        return max(products, powers, traffic), max(products + powers, traffic)


def ntxent(rows: int, size_d: int = 128) -> NTXent:
    """Counts for bfloat16 rows and a temperature of at least 0.025."""
    work = flop_count(rows, rows, size_d)
    blocks = -(-rows // 128)
    row_bytes = 2 * size_d
    # Forward reads the upper triangle's columns, backward all of them; both read each row block.
    columns_read = (blocks * (blocks + 1) // 2 + blocks * blocks) * 128 * row_bytes
    gradient = 4 * size_d * rows
    groups = min(blocks, 64)
    partial = 4 * rows * groups  # float32 partial sums of the symmetric forward pass
    return NTXent(
        flops=work.total,
        exponentials=work.exponentials,
        bytes=columns_read + 2 * rows * row_bytes + gradient + 2 * partial,
        memory=partial + 2 * 4 * rows,
    )


def tables() -> str:
    """Markdown."""
    return "\n\n".join((_ntxent_table(), _augment_table(), _update_table()))


def _ntxent_table() -> str:
    names = [gpu.name for gpu in GPUS]
    lines = [
        "| rows N | TFLOP | 10^9 exp | GB moved | memory | eager's matrices | "
        + " | ".join(names)
        + " |",
        "|" + "---|" * (6 + len(names)),
    ]
    for rows in (4096, 8192, 16384, 32768, 65536, 131072, 262144):
        count = ntxent(rows)
        times = []
        for gpu in GPUS:
            least, in_turn = count.seconds(gpu)
            times.append(f"{1e3 * least:.2f} to {1e3 * in_turn:.2f} ms")
        lines.append(
            f"| {rows:,} | {count.flops / 1e12:.3f} | {count.exponentials / 1e9:.2f} |"
            f" {count.bytes / 1e9:.2f} | {count.memory / 2**20:.1f} MiB |"
            f" {3 * 4 * rows**2 / 2**30:.1f} GiB | " + " | ".join(times) + " |"
        )
    return "\n".join(lines)


def _augment_table() -> str:
    lines = [
        "| output | floor, bytes a pixel | plan / floor | images/s at peak bandwidth: "
        + ", ".join(gpu.name for gpu in GPUS)
        + " |",
        "|---|---|---|---|",
    ]
    for dtype in (torch.bfloat16, torch.float32):
        rows, side = 8192, 224
        traffic = bytes_moved(rows, side, side, dtype)
        rates = ", ".join(f"{rows * g.bandwidth / traffic.planned / 1e6:.1f} M" for g in GPUS)
        lines.append(
            f"| {str(dtype)[6:]} | {traffic.floor / rows / side / side:.0f} |"
            f" {traffic.planned / traffic.floor:.4f} | {rates} |"
        )
    return "\n".join(lines)


def _update_table() -> str:
    lines = [
        "| kernel | bytes a parameter | " + " | ".join(gpu.name for gpu in GPUS) + " |",
        "|---|---|" + "---|" * len(GPUS),
    ]
    # Norms read weight and gradient; the update reads both and the momentum, writes two of them.
    for name, size in (("LARS, norms and update", 8 + 20), ("moving average of the keys", 12)):
        times = [f"{1e3 * size * RESNET50_PARAMETERS / g.bandwidth:.2f} ms" for g in GPUS]
        lines.append(f"| {name} | {size} | " + " | ".join(times) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables."""
    print(tables())


if __name__ == "__main__":
    main()
