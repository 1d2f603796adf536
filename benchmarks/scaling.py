"""How a step scales on this machine, and what the loss sends over a network.

    python benchmarks/scaling.py --parts steps
    sudo .venv/bin/python benchmarks/scaling.py --parts bytes links

- ``steps``: the training step of `digits-demo` with ResNet-18 on 1, 2 and 4 processes, by
  `widebatch pretrain` under torchrun, as a user starts it. Weak scaling keeps each process's batch,
  strong scaling the global one. Every process has one thread, and a run is held to as many cores
  as it has processes, or a single one would have its loader beside it for nothing; with more
  processes than cores the row says "oversubscribed". Data is embedded, nothing is downloaded.
- ``bytes``: what a process sends in the loss's forward and backward pass, counted at the network
  interface: ours beside a gather whose backward pass is a reduce-scatter or an all-reduce.
- ``links``: how long these take over links of several rates and delays, and what our overlap hides.

The last two give every process a network namespace of its own; they need root and iproute2, and
are left out, with the reason, where they cannot be had, unless they were asked for by name.
Contenders take turns within a round; the tables have medians. docs/scaling.md has the figures.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _loss_links import Link, as_json, bytes_table, count_bytes, time_links, times_table
from _shaped_link import LinkError

PARTS = ("steps", "bytes", "links")
LINKS = ("0", "10000", "1000-0.1", "100-1")


@dataclass(frozen=True)
class Steps:
    """Training on some processes."""

    kind: str
    """"weak" or "strong"."""
    world: int
    batch: int
    """Global."""
    seconds: list[float]
    """Of every step of every round, the first two of a run left out."""

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.batch / statistics.median(self.seconds)


def cores() -> int:
    return len(os.sched_getaffinity(0))


def measure_steps(worlds: Sequence[int], batch: int, steps: int, rounds: int) -> list[Steps]:
    """Weak and strong scaling, interleaved.

    Args:
        worlds: numbers of processes, of which the first is what the others are compared with.
        batch: images of a process where each keeps its own; the global batch of strong scaling is
            as large as that of the most processes.
        steps: of a run.
        rounds: runs of every kind.
    """
    kinds = [("weak", world, batch * world) for world in worlds]
    kinds += [("strong", world, batch * max(worlds)) for world in worlds]
    seconds: dict[tuple[int, int], list[float]] = {(world, size): [] for _, world, size in kinds}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "digits.beton")
        run([sys.executable, "-m", "launch", "pack", "embedded:digits:train", str(data)])
        for number in range(rounds):
            for (world, size), taken in seconds.items():
                out = Path(folder, f"{world}-{size}-{number}")
                taken += train(world, size, data, out, steps)
    return [Steps(kind, world, size, seconds[world, size]) for kind, world, size in kinds]


def train(world: int, batch: int, data: Path, out: Path, steps: int) -> list[float]:
    """Seconds of the steps of one run."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world))
    settings = {"data.train": data, "out": out, "batch": batch, "steps": steps, "device": "cpu"}
    settings |= {"encoder.name": "resnet18", "encoder.stem": "imagenet"}
    settings |= {"telemetry.log-every": 1, "knn.every-epochs": 0, "loader.workers": 1}
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    held = ",".join(map(str, sorted(os.sched_getaffinity(0))[:world]))
    pretrain = (sys.executable, *torchrun, "-m", "launch", "pretrain", "digits-demo")
    run(["taskset", "--cpu-list", held, *pretrain, *flags])
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [batch / record["images_per_second"] for record in records[2:]]


def run(command: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,  # Ctrl-C is for this process, which then ends it
    )
    try:
        _, errors = process.communicate()
    finally:
        process.terminate()  # torchrun ends its processes on this, but not when it is killed
        process.wait()
    if process.returncode:
        sys.exit(f"scaling: {' '.join(command)}\n{errors[-2000:]}")


def steps_table(found: Sequence[Steps]) -> str:
    """Markdown. Efficiency is by processes, and by the cores that they have."""
    lines = [
        "| scaling | processes | batch | step | fastest | images/s | efficiency | by cores |  |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        first = next(other for other in found if other.kind == row.kind)
        gain = row.rate / first.rate * first.world
        fastest, crowd = min(row.seconds), min(row.world, cores())
        lines.append(
            f"| {row.kind} | {row.world} | {row.batch} | {statistics.median(row.seconds):.3f} s |"
            f" {fastest:.3f} s | {row.rate:.0f} | {gain / row.world:.0%} | {gain / crowd:.0%} |"
            f" {'oversubscribed' if row.world > cores() else ''} |"
        )
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all that run here")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="of steps")
    parser.add_argument("--batch", type=int, default=32, help="of a process, weak scaling")
    parser.add_argument("--steps", type=int, default=8, help="of a training run")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="of bytes and links")
    parser.add_argument("--rows", type=int, default=4096, help="of the loss: 2 x images")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument(
        "--links",
        nargs="+",
        default=list(map(Link.parse, LINKS)),
        type=Link.parse,
        metavar="MBIT[-MS]",
        help=f"rate and one-way delay of each cable; 0: not shaped (default {' '.join(LINKS)})",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every measurement there")
    options = parser.parse_args(arguments)
    for world in options.ranks:
        if world < 2 or options.rows % (2 * world):
            parser.error(f"--ranks {world}: 2 or more, and --rows a multiple of twice that")
    if min(options.processes) < 1 or options.steps < 3 or options.rounds < 1:
        parser.error("--processes and --rounds are 1 or more, --steps 3 or more")
    return options


def measure_bytes(options: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    found = [row for w in options.ranks for row in count_bytes(w, options.rows, options.dim, 10)]
    return bytes_table(found), as_json(found)


def measure_links(options: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    sizes = (options.rows, options.dim, 5, options.rounds)
    found = [row for w in options.ranks for row in time_links(w, options.links, *sizes)]
    note = ""
    if any(link.delay_ms for link in options.links) and not any("ms" in r.link for r in found):
        note = "\n\nNo delays: this kernel has no netem (module sch_netem)."
    return times_table(found) + note, as_json(found)


def measure_training(options: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    found = measure_steps(options.processes, options.batch, options.steps, options.rounds)
    return steps_table(found), [asdict(row) for row in found]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    # An end by a signal is an exception too, so that namespaces are removed.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    measures: dict[str, Callable[..., tuple[str, list[dict[str, Any]]]]] = {
        "steps": measure_training,
        "bytes": measure_bytes,
        "links": measure_links,
    }
    titles = {
        "steps": f"digits-demo with ResNet-18, one thread a process, {cores()} cores",
        "bytes": f"sent by a process in a step of the loss, N = {options.rows}, D = {options.dim}",
        "links": f"the loss over links, N = {options.rows}, D = {options.dim}, one thread",
    }
    results = {}
    for part in options.parts or PARTS:
        try:
            table, results[part] = measures[part](options)
        except LinkError as error:
            print(f"scaling: {error}", file=sys.stderr)
            if options.parts:
                return 2
            continue
        print(f"{titles[part]}\n\n{table}\n", flush=True)
    if options.json:
        settings = {name: str(value) for name, value in vars(options).items() if name != "json"}
        options.json.write_text(json.dumps({"settings": settings, **results}, indent=1))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
