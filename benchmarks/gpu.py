"""The GPU kernels beside eager torch, torch.compile and other libraries: time and memory.

    python benchmarks/gpu.py --rows 8192 32768 65536 --rounds 20

Needs a GPU. Times are of CUDA events; contenders take turns in every round, and medians count.
NT-Xent is forward and backward; contenders that run out of memory say so. `inf-cl` and
`siglip-kernel` join where they are installed: they compute other losses (InfoNCE between two sets
of rows without self-exclusion; pairwise sigmoids) of half as many rows on each side, so that they
see a quarter of the pairs, and their times are no equal's.
"""

import argparse
import importlib.util
import logging
import statistics
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from data_pipeline.augment import Augment, simclr_views
from kernels.ntxent import nt_xent

TEMPERATURE = 0.1


class Contender(NamedTuple):
    name: str
    run: Callable[[], object]


def eager_nt_xent(z_VBD: torch.Tensor) -> torch.Tensor:
    unit_ND = torch.nn.functional.normalize(z_VBD.flatten(0, 1), dim=1)
    logits_NN = (unit_ND @ unit_ND.T).float() / TEMPERATURE
    logits_NN.fill_diagonal_(float("-inf"))
    positive_N = torch.arange(len(unit_ND), device=z_VBD.device).roll(len(unit_ND) // 2)
    return torch.nn.functional.cross_entropy(logits_NN, positive_N)


def loss_contenders(rows: int, dim: int, dtype: torch.dtype) -> list[Contender]:
    z = torch.randn(2, rows // 2, dim, device="cuda", dtype=dtype, requires_grad=True)
    unit = torch.nn.functional.normalize(z.detach(), dim=-1).requires_grad_()

    def backward(loss: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Callable[[], object]:
        return lambda: loss(*inputs).backward()

    found = [
        Contender("widebatch", backward(lambda x: nt_xent(x, TEMPERATURE)[0], z)),
        Contender(
            "widebatch, plain torch",
            backward(lambda x: nt_xent(x, TEMPERATURE, implementation="blocked")[0], z),
        ),
        Contender("eager", backward(eager_nt_xent, z)),
        Contender("torch.compile", backward(torch.compile(eager_nt_xent, dynamic=False), z)),
    ]
    if importlib.util.find_spec("inf_cl"):
        from inf_cl import cal_flash_loss

        def inf_cl(x: torch.Tensor) -> torch.Tensor:
            scale = 1 / TEMPERATURE
            one, other = x[0], x[1]
            both = cal_flash_loss(one, other, scale=scale) + cal_flash_loss(other, one, scale=scale)
            return both.mean() / 2

        found.append(Contender("inf-cl (other loss)", backward(inf_cl, unit)))
    if importlib.util.find_spec("siglip_kernel"):
        from siglip_kernel import fused_siglip_loss

        scale = torch.tensor(float(np.log(1 / TEMPERATURE)), device="cuda", requires_grad=True)
        bias = torch.tensor(-10.0, device="cuda", requires_grad=True)

        def siglip(x: torch.Tensor) -> torch.Tensor:
            loss: torch.Tensor = fused_siglip_loss(x[0], x[1], scale, bias)
            return loss

        found.append(Contender("siglip-kernel (other loss)", backward(siglip, unit)))
    return found


def augment_contenders(images: int, side: int, dtype: torch.dtype) -> list[Contender]:
    shape = (images // 2, 2, side, side, 3)
    crops = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
    ids = torch.arange(images // 2)
    ours = Augment(simclr_views(), 0, dtype)
    plain = Augment(simclr_views(), 0, dtype, implementation="reference")
    return [
        Contender("widebatch", lambda: ours(crops, ids, 0)),
        Contender("plain torch", lambda: plain(crops, ids, 0)),
    ]


def milliseconds(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def compare(title: str, contenders: list[Contender], rounds: int) -> None:
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    memory: dict[str, int] = {}
    failed: dict[str, str] = {}
    for round_ in range(rounds + 3):  # three to compile and warm up
        for name, run in contenders:
            if name in failed:
                continue
            try:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                taken = milliseconds(run)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                failed[name] = "out of memory"
                continue
            if round_ >= 3:
                times[name].append(taken)
                memory[name] = torch.cuda.max_memory_allocated() - before
    print(f"\n{title}")
    ours = statistics.median(times[contenders[0].name])
    for name, values in times.items():
        if name in failed:
            print(f"  {name:28}{failed[name]:>12}")
            continue
        median = statistics.median(values)
        print(
            f"  {name:28}{median:>10.3f} ms  ({min(values):.3f} to {max(values):.3f})"
            f"{median / ours:>8.2f} x ours{memory[name] / 2**20:>10.0f} MiB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[8192, 32768, 65536])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--images", type=int, default=512, help="views to augment")
    parser.add_argument("--side", type=int, default=224, help="of a view, pixels")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this measures a GPU, and torch sees none; benchmarks/ntxent.py is for CPUs")
    dtype = getattr(torch, args.dtype)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("kernels").setLevel(logging.DEBUG)  # which implementations run
    print(torch.cuda.get_device_name(), args.dtype)
    for rows in args.rows:
        title = f"NT-Xent, {rows} rows, D = {args.dim}, forward + backward"
        compare(title, loss_contenders(rows, args.dim, dtype), args.rounds)
    title = f"augmentation, {args.images} views of {args.side} pixels"
    compare(title, augment_contenders(args.images, args.side, dtype), args.rounds)


if __name__ == "__main__":
    main()
