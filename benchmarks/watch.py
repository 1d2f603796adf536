"""What it costs to be watched: watchdog, times by phase, comparison of ranks, collapse figures.

    python benchmarks/watch.py
    torchrun --nproc-per-node 2 benchmarks/watch.py

Blocks of whole training steps with everything on and everything off, in turn and in changing
order, on the embedded digits; medians, and the ratio of each pair of neighbours. The difference is
smaller than the noise of most machines, so what a step pays is also timed alone: the calls that
watching adds to a step, made many times over, beside the median step.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from common.collectives import observe, waiting
from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.reading.pool import LoaderConfig
from trainer.config import DataConfig, RunConfig
from trainer.health.collapse import CollapseAlarm, CollapseConfig, figures
from trainer.health.phases import Phases
from trainer.health.stragglers import StragglerConfig, Stragglers
from trainer.health.watchdog import Watchdog, WatchdogConfig
from trainer.models.encoders import EncoderConfig
from trainer.optim.optimizers import apply_update, gradient_norm
from trainer.prepare import prepare
from trainer.recipes.simclr import digits_demo
from trainer.run import Run
from trainer.telemetry import TelemetryConfig

OFF = {
    "watchdog": WatchdogConfig(timeout=0),
    "straggler": StragglerConfig(factor=0),
    "collapse": CollapseConfig(every_steps=0),
}


class Watched:
    """A run's steps with all that watches, or with nothing."""

    def __init__(self, run: Run) -> None:
        self.run, self.device = run, run.fabric.device
        self.batches = run.loader.starting_at(run.state.position(run.plan))
        self.step = 0

    def steps(self, count: int, collapse: CollapseAlarm, phases: Phases | None) -> float:
        """Seconds of ``count`` steps."""
        enter = phases.enter if phases else lambda phase: None
        self.run.gradients._enter = enter  # type: ignore[attr-defined]
        started = time.perf_counter()
        for _ in range(count):
            self.step += 1
            if phases:
                phases.step(self.step)
            outputs, _ = self.run.gradients(next(self.batches), self.step - 1)
            enter("optimizer")
            skipped = apply_update(self.run.optimizer, 1e-3, gradient_norm(self.run.optimizer))
            self.run.objective.after_step(outputs, self.step - 1, 10**6, skipped)
            self.run.optimizer.zero_grad(set_to_none=True)
            enter("other")
            collapse.measure(outputs.queries, self.step)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    @contextlib.contextmanager
    def watching(self, folder: Path) -> Iterator[tuple[Phases, Stragglers, CollapseAlarm]]:
        """Everything on."""
        fabric, phases = self.run.fabric, Phases(self.device)
        watchdog = Watchdog(
            WatchdogConfig(),
            phases,
            folder,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
        )
        stragglers = Stragglers(StragglerConfig(), phases, self.device, speaks=False)
        observe(phases)
        with watchdog.watching():
            yield phases, stragglers, CollapseAlarm(CollapseConfig(), fabric.is_global_zero)
        observe(None)

    def block(self, count: int, on: bool, folder: Path) -> float:
        """Milliseconds of a step, with its part of a telemetry reading every 10."""
        nothing = CollapseAlarm(CollapseConfig(every_steps=0), judges=False)
        if not on:
            return 1000 * self.steps(count, nothing, None) / count
        with self.watching(folder) as (phases, stragglers, collapse):
            seconds = self.steps(count, collapse, phases)
            started = time.perf_counter()
            stragglers.complete([{"step": self.step}])
            collapse.read([{"step": step} for step in range(self.step - count, self.step + 1)])
            reading = time.perf_counter() - started
        return 1000 * (seconds + reading) / count


def alone(watched: Watched, folder: Path, waits: int) -> dict[str, float]:
    """Microseconds that each part adds to a step."""
    config = CollapseConfig()
    dimensions = watched.run.config.head.out_dim
    rows = 2 * watched.run.plan.local_batch
    projections = torch.randn(rows, dimensions, device=watched.device)

    def repeated(action: Callable[[], object], times: int) -> float:
        action()
        started = time.perf_counter()
        for _ in range(times):
            action()
        return 1e6 * (time.perf_counter() - started) / times

    with watched.watching(folder) as (phases, stragglers, _):
        phases.step(1)

        def marks() -> None:
            phases.step(2)
            for phase in ("augment", "forward", "backward", "optimizer", "other"):
                phases.enter(phase)
            for _ in range(waits):
                with waiting("x"):
                    pass

        def compare() -> None:
            for _ in range(10):
                marks()
            stragglers.complete([{}])

        def collapse() -> None:
            alarm = CollapseAlarm(config, judges=True)
            alarm.measure(projections, config.every_steps)
            (sums,) = alarm._moments.values()
            figures(sums.cpu(), dimensions)

        parts = {"phases and waits": repeated(marks, 200)}
        phases.harvest()
        readings = repeated(compare, 20) / 10
        parts["comparison of ranks, every 10th step"] = readings - parts["phases and waits"]
        parts["collapse figures, every 20th step"] = repeated(collapse, 10) / config.every_steps
    return parts


def config_for(folder: Path, encoder: str, batch: int) -> RunConfig:
    data = folder / "digits.beton"
    if int(os.environ.get("RANK", "0")) == 0:
        pack("embedded:digits:train", data, PackConfig(), progress=False)
        data.rename(folder / "ready.beton")
    while not (folder / "ready.beton").exists():
        time.sleep(0.1)
    return dataclasses.replace(
        digits_demo(),
        data=DataConfig(train=(folder / "ready.beton",)),
        out=folder / "run",
        batch=batch,
        encoder=EncoderConfig(name=encoder, zero_init_residual=True),
        loader=LoaderConfig(workers=1),
        telemetry=TelemetryConfig(tensorboard=False),
        **OFF,
    )


def count_waits(watched: Watched) -> int:
    """Collectives that a step waits in, as far as this code can see them."""
    seen: list[str] = []

    class Counter:
        def begin(self, name: str) -> None:
            seen.append(name)

        def end(self) -> None:
            pass

    observe(Counter())
    watched.block(1, False, Path())
    observe(None)
    return len(seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--batch", type=int, default=128, help="global batch")
    parser.add_argument("--rounds", type=int, default=12, help="pairs of blocks")
    parser.add_argument("--steps", type=int, default=5, help="steps of a block")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        first = int(os.environ.get("RANK", "0")) == 0
        # All processes of a launch have the port in common, and no other launch has it.
        folder = Path(tempfile.gettempdir()) / f"watch-{os.environ.get('MASTER_PORT', os.getpid())}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if first:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        run = stack.enter_context(prepare(config_for(folder, args.encoder, args.batch)))
        watched = Watched(run)
        waits = count_waits(watched)
        watched.block(2, False, folder)
        times: dict[bool, list[float]] = {True: [], False: []}
        for round_ in range(args.rounds):
            for on in (True, False) if round_ % 2 else (False, True):
                times[on].append(watched.block(args.steps, on, folder))
        parts = alone(watched, folder, waits)
        if dist.is_initialized():
            dist.barrier()
        step = statistics.median(times[False])
        ratios = [on / off for on, off in zip(times[True], times[False])]
        result = {
            "step_ms_off": step,
            "step_ms_on": statistics.median(times[True]),
            "median_ratio": statistics.median(ratios),
            "waits": waits,
            "parts_us": parts,
            "parts_share": sum(parts.values()) / (1000 * step),
        }
        if first:
            _print(result, args.json)


def _print(result: dict[str, object], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=1))
        return
    print(f"a step, nothing on     {result['step_ms_off']:8.1f} ms")
    print(f"a step, everything on  {result['step_ms_on']:8.1f} ms")
    print(f"on / off               {result['median_ratio']:8.4f}  median of neighbouring blocks")
    print(f"timed alone, with {result['waits']} waits in a step:")
    for name, microseconds in result["parts_us"].items():  # type: ignore[attr-defined]
        print(f"  {name:<40}{microseconds:8.1f} us a step")
    print(f"  together                                {100 * result['parts_share']:7.3f} % of it")


if __name__ == "__main__":
    main()
