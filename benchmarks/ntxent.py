"""NT-Xent forward + backward: time and extra memory, ours beside plain torch and other libraries.

    python benchmarks/ntxent.py --rows 2048 4096 8192 --rounds 5

Contenders take turns within each round, so that a noisy neighbour disturbs all of them; the table
shows medians, how many times ours that is, and the largest extra memory. Values and gradients are
compared before anything is timed. Contenders that would not fit in the free memory are left out
and say so; those that take more than ten seconds run fewer rounds.

`lightly` and `pytorch-metric-learning` (the `bench` extra) join when they are installed.
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.ntxent import nt_xent

TEMPERATURE = 0.1
ENOUGH_S = 10.0
Loss = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Contender:
    name: str
    loss: Loss
    bytes_needed: Callable[[int], float]  # from the number of rows; measured, rounded up


def ours(z_VBD: torch.Tensor) -> torch.Tensor:
    return nt_xent(z_VBD, TEMPERATURE)[0]


def plain_torch(z_VBD: torch.Tensor) -> torch.Tensor:
    """What one writes: normalise, multiply, mask, cross-entropy."""
    unit_ND = torch.nn.functional.normalize(z_VBD.flatten(0, 1), dim=1)
    logits_NN = unit_ND @ unit_ND.T / TEMPERATURE
    logits_NN = logits_NN.masked_fill(
        torch.eye(len(unit_ND), dtype=torch.bool, device=z_VBD.device), float("-inf")
    )
    positive_N = torch.arange(len(unit_ND), device=z_VBD.device).roll(len(unit_ND) // 2)
    return torch.nn.functional.cross_entropy(logits_NN.float(), positive_N)


def contenders(compiled: bool) -> list[Contender]:
    found = [
        Contender("widebatch", ours, lambda n: 1.0e8),
        Contender("plain torch", plain_torch, lambda n: 4.0 * 3.2 * n * n),
    ]
    if compiled:
        loss: Loss = torch.compile(plain_torch, dynamic=False)
        found.append(Contender("torch.compile of it", loss, lambda n: 4.0 * 2.2 * n * n))
    if importlib.util.find_spec("lightly"):
        from lightly.loss import NTXentLoss

        lightly = NTXentLoss(temperature=TEMPERATURE)
        found.append(
            Contender("lightly", lambda z: lightly(z[0], z[1]), lambda n: 4.0 * 4.2 * n * n)
        )
    if importlib.util.find_spec("pytorch_metric_learning"):
        from pytorch_metric_learning.losses import NTXentLoss as MetricLearning

        metric = MetricLearning(temperature=TEMPERATURE)

        def metric_learning(z_VBD: torch.Tensor) -> torch.Tensor:
            labels = torch.arange(z_VBD.shape[1], device=z_VBD.device).repeat(2)
            return metric(z_VBD.flatten(0, 1), labels)

        found.append(Contender("pytorch-metric-learning", metric_learning, lambda n: 140.0 * n**3))
    return found


class ExtraMemory:
    """Peak bytes above those at entry: the allocator's on CUDA, the process's (Linux) on CPUs."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.bytes = 0

    def __enter__(self) -> "ExtraMemory":
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # or the heap's leftovers would serve unseen
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
            self._before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        peak = torch.cuda.max_memory_allocated() if self.cuda else _status("VmHWM")
        self.bytes = peak - self._before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise KeyError("MemAvailable")


def measure(loss: Loss, z: torch.Tensor) -> tuple[float, int]:
    """Seconds and extra peak bytes of one forward + backward."""
    leaf = z.detach().requires_grad_()
    synchronise = torch.cuda.synchronize if z.is_cuda else lambda: None
    with ExtraMemory(z.device) as extra:
        synchronise()
        start = time.perf_counter()
        loss(leaf).backward()
        synchronise()
        seconds = time.perf_counter() - start
    return seconds, extra.bytes


def check_equal(found: list[Contender], dtype: torch.dtype, device: torch.device) -> None:
    """All contenders compute one function, or the comparison means nothing."""
    z = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for contender in found[1:]:
        results = []
        for loss in (ours, contender.loss):
            leaf = z.detach().clone().requires_grad_()
            value = loss(leaf)
            value.backward()
            assert leaf.grad is not None
            results.append((value.detach().float(), leaf.grad.float()))
        (value, gradient), (other_value, other_gradient) = results
        assert (value - other_value).abs() <= tolerance * value.abs(), contender.name
        error = (gradient - other_gradient).norm() / gradient.norm()
        assert error <= tolerance, f"{contender.name}: gradient differs by {error:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", type=Path, help="write every measurement there")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    found = contenders(compiled=not args.no_compile)
    check_equal(found, dtype, device)
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {args.threads} thread(s)"
    )
    print(f"NT-Xent forward + backward, D = {args.dim}, {args.dtype}, {name}")
    headings = ("median s", "min s", "max s", "x ours", "extra MB")
    print(f"{'rows':>7}  {'':24}" + "".join(f"{heading:>10}" for heading in headings))
    records = []
    for rows in args.rows:
        z = torch.randn(2, rows // 2, args.dim, device=device).to(dtype)
        fitting = [c for c in found if c.bytes_needed(rows) < 0.9 * _free_bytes(device)]
        seconds: dict[str, list[float]] = {c.name: [] for c in fitting}
        extra: dict[str, int] = {c.name: 0 for c in fitting}
        for round_ in range(args.rounds + 1):  # the first warms up and does not count
            for contender in fitting:
                if sum(seconds[contender.name]) > ENOUGH_S:
                    continue
                taken, peak = measure(contender.loss, z)
                if round_:
                    seconds[contender.name].append(taken)
                    extra[contender.name] = max(extra[contender.name], peak)
        our_median = statistics.median(seconds[found[0].name])
        for contender in found:
            if contender not in fitting:
                need = contender.bytes_needed(rows) / 2**30
                print(f"{rows:>7}  {contender.name:24}   left out: needs about {need:.0f} GiB")
                continue
            taken_s = seconds[contender.name]
            print(
                f"{rows:>7}  {contender.name:24}{statistics.median(taken_s):>10.3f}"
                f"{min(taken_s):>10.3f}{max(taken_s):>10.3f}"
                f"{statistics.median(taken_s) / our_median:>10.1f}"
                f"{extra[contender.name] / 1e6:>10.0f}"
            )
            records.append(
                {
                    "rows": rows,
                    "contender": contender.name,
                    "seconds": taken_s,
                    "extra_bytes": extra[contender.name],
                }
            )
    if args.json:
        settings = {k: str(v) for k, v in vars(args).items() if k != "json"}
        args.json.write_text(json.dumps({"settings": settings, "records": records}, indent=1))


if __name__ == "__main__":
    main()
