"""What `make demo` comes to over several seeds: mean and deviation, as README gives them.

    python benchmarks/demo.py --seeds 0 1 2 3 4 --json OUT.json

Each seed is a run of the demo's own commands up to its measurements, on as many processes as the
demo has. Times are of the training alone: on the clock, and of processors, which a busy machine
changes less.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from launch import demo

_SETS = ("AMX", "AVX512_BF16", "AVX512F", "AVX2")  # widest first


def run(command: Sequence[str]) -> tuple[float, float]:
    """Seconds on the clock and of processors that a command takes."""
    program = Path(sys.executable).with_name("widebatch")
    started, used = time.monotonic(), os.times()
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run([program, *command], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: status {done.returncode}\n{done.stderr}")
    now = os.times()
    processors = sum(
        getattr(now, f) - getattr(used, f) for f in ("children_user", "children_system")
    )
    return time.monotonic() - started, processors


def measure(out: Path, seed: int) -> dict[str, float]:
    """Accuracies in % and times of one seed."""
    out.mkdir()
    values = {}
    for command in demo.plan(out, quick=False):
        if command[0] == "pretrain":
            clock, processors = run((*command, "--seed", str(seed)))
            values |= {"minutes": clock / 60, "processor minutes": processors / 60}
        elif command[0] in ("pack", "evaluate"):
            run(command)
    for title, (method, _) in demo.METHODS.items():
        for source in demo.SOURCES:
            report = json.loads(demo.evaluation_file(out, method, source).read_text())
            values[f"{title}: {source}"] = 100 * report["top1"]
    return values


def processor() -> str:
    """Its name and widest instructions, where Linux says them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    flags = facts.get("flags", "").upper().split()
    widest = [name for name in _SETS if any(flag.startswith(name) for flag in flags)]
    return f"{facts.get('model name', 'unknown')}, {', '.join(widest)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--json", type=Path, help="write every measurement there, as it comes")
    args = parser.parse_args()
    print(processor(), f"({len(os.sched_getaffinity(0))} cores)", flush=True)
    found: list[dict[str, float]] = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            found.append(measure(Path(folder) / "demo", seed))
        print(f"  seed {seed}", {k: round(v, 1) for k, v in found[-1].items()}, flush=True)
        if args.json:
            args.json.write_text(json.dumps({"processor": processor(), "seeds": found}, indent=1))
    for name in found[0]:
        values = [each[name] for each in found]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{name:<50} {statistics.mean(values):6.1f} +- {deviation:.1f}")


if __name__ == "__main__":
    main()
