"""What a GPU must at least do for every kernel: multiply-adds, exponentials, bytes, and their time.

    python benchmarks/roofline.py

prints the tables of ``docs/kernels.md``. Every figure is arithmetic from the counts below and the
vendors' peak rates; none was measured.
"""

from typing import NamedTuple

import torch

from kernels.augment.plan import FLOAT, bytes_moved, plan_launch

# Sides of NT-Xent's tiles for 16-bit rows of up to 128 dimensions (kernels.ntxent.triton), and the
# groups that its own block is cut into.
OWN_BLOCK = 64
BLOCK = 128
GROUPS = 64


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
    """Between device memory and the GPU, columns being read once per tile of rows out of a cache
    that holds nothing in between."""
    memory: int
    """Beside the rows and their gradient."""

    def seconds(self, gpu: Gpu) -> tuple[float, float]:
        """The least: the slowest of the three alone; and products and exponentials in turn."""
        products, powers = self.flops / gpu.flops, self.exponentials / gpu.exponentials
        traffic = self.bytes / gpu.bandwidth
        return max(products, powers, traffic), max(products + powers, traffic)


class Work(NamedTuple):
    """Of a forward and a backward pass; a multiply-add is 2 FLOPs."""

    forward: int
    backward: int
    exponentials: int

    @property
    def total(self) -> int:
        """FLOPs of the products of both passes."""
        return self.forward + self.backward


def flop_count(rows: int, columns: int, size_d: int, *, symmetric: bool = True) -> Work:
    """What NT-Xent of ``rows`` own rows among ``columns`` rows costs, tiles at the edge included.

    Per pair and dimension forward takes 2 FLOPs, backward 4 (the logit again, and the weighted
    sum): 6 N^2 D on one process. With symmetry forward takes half on the own block: 5 N^2 D. What
    autograd would do with the tile recomputed, two products for the two sides of ``s_ij``, takes
    2 + 6 = 8 N^2 D; sharing the tile in backward too would take 1 + 3 = 4 (kernels.ntxent.triton
    says why it is not done). Exponentials are those of bounded logits; below tau = 0.025 it is
    twice as many.
    """
    own_blocks, blocks = -(-rows // OWN_BLOCK), -(-rows // BLOCK)
    own_tiles = own_blocks * (own_blocks + 1) // 2 if symmetric else own_blocks**2
    others = blocks * -(-(columns - rows) // BLOCK)
    forward_pairs = own_tiles * OWN_BLOCK**2 + others * BLOCK**2
    backward_pairs = blocks * -(-columns // BLOCK) * BLOCK**2
    # A tile of the own block is summed along both sides from one exponential per pair.
    return Work(
        forward=2 * size_d * forward_pairs,
        backward=4 * size_d * backward_pairs,
        exponentials=forward_pairs + backward_pairs,
    )


class Traffic(NamedTuple):
    """Bytes between a GPU and its memory for one call of the augmentation."""

    floor: int
    """Every pixel read once and written once: no implementation moves less."""
    planned: int
    """As the kernel means to: what is read again comes from the L2 cache. Parameters included."""
    uncached: int
    """If the L2 cache kept nothing at all: the bound on the other side."""
    cache: int
    """Bytes in work at once, which the L2 cache has to keep for ``planned`` to hold: the images of
    all running programs and, in the share that blurs, their rings and strips."""


def augmentation(
    rows: int, side: int, dtype: torch.dtype, p_blur: float = 0.5, p_contrast: float = 0.8
) -> Traffic:
    """Expected traffic of ``rows`` square images, of which shares are blurred and contrasted."""
    radius = side // 20  # SimCLR's
    launch = plan_launch(side, side, radius)
    pixels = rows * side * side
    strips = -(-side // launch.strip)
    # A plane's rows: written to the ring once, read from there by every strip that needs them,
    # written to the strip, read from there.
    ring_rows = 2 * side + 2 * radius * (strips - 1)
    blur = rows * 3 * FLOAT * side * (ring_rows + 2 * side)
    running = min(rows, launch.programs(132))  # an H100's processors
    in_work = running * (3 * side * side + p_blur * FLOAT * launch.scratch_floats(side))
    planned = bytes_moved(rows, side, side, dtype)
    return Traffic(
        floor=pixels * (3 + 3 * dtype.itemsize),
        planned=planned,
        uncached=planned + round(p_contrast * 3 * pixels + p_blur * blur),
        cache=round(in_work),
    )


def ntxent(rows: int, size_d: int = 128) -> NTXent:
    """Counts for bfloat16 rows and a temperature of at least 0.025."""
    work = flop_count(rows, rows, size_d)
    own_blocks, blocks = -(-rows // OWN_BLOCK), -(-rows // BLOCK)
    row_bytes = 2 * size_d
    # Forward reads the upper triangle's columns, backward all of them; both read each row block.
    columns_read = own_blocks * (own_blocks + 1) // 2 * OWN_BLOCK + blocks * blocks * BLOCK
    columns_read *= row_bytes
    gradient = 4 * size_d * rows
    # float32 partial sums, and hardest negatives, of the symmetric forward pass
    partial = 2 * 4 * rows * min(own_blocks, GROUPS)
    return NTXent(
        flops=work.total,
        exponentials=work.exponentials,
        bytes=columns_read + 2 * rows * row_bytes + gradient + 2 * partial,
        memory=partial + 2 * 4 * rows,
    )


def tables() -> str:
    """Markdown."""
    return "\n\n".join((_ntxent_table(), _augment_table()))


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
        traffic = augmentation(rows, side, dtype)
        rates = ", ".join(f"{rows * g.bandwidth / traffic.planned / 1e6:.1f} M" for g in GPUS)
        lines.append(
            f"| {str(dtype)[6:]} | {traffic.floor / rows / side / side:.0f} |"
            f" {traffic.planned / traffic.floor:.4f} | {rates} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the tables."""
    print(tables())


if __name__ == "__main__":
    main()
