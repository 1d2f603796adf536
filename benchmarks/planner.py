"""What `widebatch plan --calibrate` predicts, and what runs then use: memory and time.

    OMP_NUM_THREADS=2 python benchmarks/planner.py --steps 8 --rounds 3

Every recipe is calibrated on this machine at small batches, planned at a larger one, and then
trained at that one by the command line, as a user would; in every round anew, for a machine that
others use too may be twice as fast in one minute as in the next. Memory is the peak that the kernel
reports of the training process; time the median of its steps, the first left out. The last line of
a recipe has medians over its rounds: of what was planned, of what was used, and of the errors.
Images are generated.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from trainer.config import DataConfig, RunConfig
from trainer.planner.calibrate import calibrate, generate
from trainer.planner.plan import Plan, images_of, make_plan
from trainer.planner.rates import GPUS, Rates
from trainer.planner.traffic import Cluster
from trainer.recipes import RECIPES

MEMORY, TIME = 0.10, 0.25  # what the predictions are held to
BATCHES = {
    "simclr-cifar10-r18": 192,
    "mocov3-cifar10-r18": 96,
    "simclr-stl10-r18": 192,
    "rotation-cifar10-r18": 96,
    "npid-cifar10-r18": 192,
    "deepclusterv2-cifar10-r18": 96,
}


class Use(NamedTuple):
    """What a run took."""

    bytes: float
    seconds: float  # of a step


def train(config: RunConfig, out: Path, steps: int) -> Use:
    """Train by the command line, watching the process."""
    command = [
        *(sys.executable, "-m", "launch", "pretrain", config.recipe),
        *("--data.train", *map(str, config.data.train), "--out", str(out)),
        *("--batch", str(config.batch), "--steps", str(steps), "--precision", config.precision),
        *("--telemetry.log-every", "1", "--telemetry.no-tensorboard"),
        # One checkpoint on the way; these epochs of two steps would have one after each.
        *("--checkpoint.every-epochs", "0", "--checkpoint.every-steps", str(max(1, steps // 2))),
    ]
    peak = 0.0
    with (out.parent / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        while process.poll() is None:
            peak = max(peak, peak_of(process.pid))
            time.sleep(0.02)
    if process.returncode:
        sys.exit((out.parent / "log").read_text())
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds = [config.batch / record["images_per_second"] for record in records[1:]]
    return Use(peak, statistics.median(seconds))


def peak_of(pid: int) -> float:
    """Bytes; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((1024 * float(x.split()[1]) for x in lines if x.startswith("VmHWM")), 0.0)


def predict(config: RunConfig) -> Plan:
    rates = calibrate(config, known=True, rates=Rates(gpu=GPUS["a100-80g"]))
    return make_plan(config, Cluster(nodes=1, gpus=1, rates=rates), images_of(config))


class Pair(NamedTuple):
    """Of one quantity."""

    planned: float
    used: float

    @property
    def error(self) -> float:
        """Of the plan, as a fraction of what was used."""
        return self.planned / self.used - 1


class Round(NamedTuple):
    """One plan and one run."""

    mebibytes: Pair
    seconds: Pair


def compare(recipe: str, batch: int, precision: str, steps: int, folder: Path) -> Round:
    config = RECIPES[recipe]()
    count = max(256, 2 * batch, batch + config.objective.least_samples()[0])
    data = generate(folder, config.crop.size, count)
    config = dataclasses.replace(
        config,
        data=DataConfig(train=(data,)),
        batch=batch,
        steps=steps,
        precision=precision,
    )
    plan = predict(config)
    use = train(config, folder / "run", steps)
    return Round(
        Pair(plan.memory.total / 2**20, use.bytes / 2**20), Pair(plan.time.seconds, use.seconds)
    )


def row(rounds: Sequence[Round]) -> str:
    """The medians; of one round itself."""
    memory = beside([each.mebibytes for each in rounds], MEMORY, digits=0)
    return f"  {memory}  {beside([each.seconds for each in rounds], TIME, digits=2)}"


def beside(pairs: Sequence[Pair], bound: float, digits: int) -> str:
    planned, used, error = (
        statistics.median(values)
        for values in zip(*((pair.planned, pair.used, pair.error) for pair in pairs))
    )
    return f"{planned:8.{digits}f} {used:8.{digits}f} {error:+7.1%}{' !'[abs(error) > bound]}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=list(BATCHES), choices=list(RECIPES))
    parser.add_argument("--batch", type=int, help="of every recipe, instead of its own")
    parser.add_argument("--precision", choices=("bf16", "fp32"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    print(f"bounds: memory {MEMORY:.0%}, time {TIME:.0%}; '!' is beyond")
    print(f"  {'':33}  {'MiB at the peak':^26}  {'seconds a step':^26}")
    print(f"  {'recipe':20} batch          planned     used  error    planned     used  error")
    for recipe in options.recipes:
        batch = options.batch or BATCHES.get(recipe, 64)
        precision = options.precision or RECIPES[recipe]().precision
        rounds = []
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory() as folder:
                rounds.append(compare(recipe, batch, precision, options.steps, Path(folder)))
            print(f"  {recipe:20} {batch:5} {precision:>5}{row(rounds[-1:])}", flush=True)
        if len(rounds) > 1:
            print(f"  {'median':>32}{row(rounds)}", flush=True)


if __name__ == "__main__":
    main()
