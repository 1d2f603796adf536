"""Fuzz readers: ``python -m tests.fuzz.run TARGET... --runs N --seed S``; deterministic.

An input that is refused for a reason not met before joins those that are mutated further, which
leads past one check to the next. The process's memory is capped; an input that takes longer than
:data:`PATIENCE` is a hang. The first finding ends the process; ``--input FILE`` reads it again.
"""

import argparse
import hashlib
import json
import random
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

from tests.fuzz.targets import TARGETS, Target

PATIENCE = 60  # seconds for one input: ten thousand times what it takes
_MOST_SEEDS = 300


def main() -> None:
    """Run, and print figures by target as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="+", choices=sorted(TARGETS))
    parser.add_argument("--runs", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--input", type=Path, help="read this file only, again")
    args = parser.parse_args()
    figures = {}
    for name in args.targets:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            target = TARGETS[name](Path(folder))
            for seed in target.seeds:
                refused = target.read(seed)  # what is compiled or imported on first use, is now
                assert not refused, f"a sound file is refused: {refused}"
            if args.input is not None:
                print(target.read(args.input.read_bytes()) or "taken")
                continue
            figures[name] = fuzz(target, name, args.runs, args.seed)
    print(json.dumps(figures))


def fuzz(target: Target, name: str, runs: int, seed: int) -> dict[str, Any]:
    """Figures of ``runs`` inputs.

    Raises:
        Exception: the first finding; the input lies in a file that its note names.
    """
    rng, pool, reasons = random.Random(seed), list(target.seeds), {""}
    taken, digest, start = 0, hashlib.sha256(), time.process_time()
    cap_memory(target.cap_mib)
    signal.signal(signal.SIGALRM, _too_long)
    for number in range(runs):
        data = target.mutate(rng, rng.choice(rng.choice((target.seeds, pool))))
        digest.update(data)
        signal.alarm(PATIENCE)
        try:
            refused = target.read(data)
        except BaseException as finding:
            kept = Path(tempfile.gettempdir()) / f"finding-{name}"
            kept.write_bytes(data)
            command = f"python -m tests.fuzz.run {name} --input {kept}"
            finding.add_note(f"input {number} of seed {seed}: {command}")
            raise
        finally:
            signal.alarm(0)
        taken += not refused
        if refused not in reasons:
            reasons.add(refused)
            if len(pool) < _MOST_SEEDS:
                pool.append(data)
    seconds = time.process_time() - start
    uncap_memory()
    return {
        "runs": runs,
        "taken": taken,
        "reasons": len(reasons),
        "cpu_seconds": round(seconds, 1),
        "digest": digest.hexdigest(),
    }


def cap_memory(mib: int) -> None:
    """Allow this process so much more address space than it has; more is a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (mib << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def uncap_memory() -> None:
    """For what the next target imports."""
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _too_long(signum: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"one input took longer than {PATIENCE} s")


if __name__ == "__main__":
    sys.exit(main())
