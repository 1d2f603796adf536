"""A few real steps of a recipe, measured: the process that :mod:`trainer.planner.calibrate` starts.

``python -m trainer.planner.probe`` reads JSON from standard input (``config``, ``steps``) and
prints a :class:`Reading` as JSON in its last line. It is a process of its own so that its peak of
memory is one run's, imports and all.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common.files.strict_json import dump_json
from data_pipeline.reading.batch import Batch
from data_pipeline.reading.order import Position
from trainer.config import RunConfig, from_json
from trainer.objectives.base import Outputs
from trainer.optim.optimizers import apply_update, gradient_norm
from trainer.prepare import prepare
from trainer.run import Run

_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What some steps at one batch took."""

    batch: int
    device: str
    """"cpu" or "cuda"."""
    name: str
    """Of the device."""
    memory: float
    """Bytes of the device, or of the machine."""
    peak_bytes: float
    """Taken of it at the peak."""
    step_seconds: float
    """Median of the steps after the first, from batch to batch."""
    wait_seconds: float
    """Of these, waiting for the loader."""
    augment_seconds: float
    loss_seconds: float
    """Forward and backward, of the loss alone."""
    update_seconds: float
    core_seconds: float
    """Of a core, to decode an image and cut its views."""


def read(config: RunConfig, steps: int) -> Reading:
    """Train 2 or more steps as a run does, and one beside a checkpoint's writing; time the parts.

    The run's folder is written to.
    """
    with prepare(config) as run:
        batches = run.loader.starting_at(run.state.position(run.plan))
        timed = [_step(run, batches, step).took for step in range(steps)][1:]
        run.state.step = steps
        run.save()
        batch, outputs, _ = _step(run, batches, steps)  # beside the checkpoint's writing
        name, memory, peak = _device(run)
        batches.close()  # type: ignore[attr-defined]
        seconds, wait, update = (statistics.median(values) for values in zip(*timed, strict=True))

        def loss() -> None:
            rows = {name: each.detach().requires_grad_() for name, each in outputs.rows.items()}
            found = run.objective.loss(Outputs(rows, outputs.fixed), steps)
            torch.autograd.grad(found.value, list(rows.values()))

        return Reading(
            batch=config.batch,
            device=run.fabric.device.type,
            name=name,
            memory=memory,
            peak_bytes=peak,
            step_seconds=seconds,
            wait_seconds=wait,
            augment_seconds=_timed(
                run, lambda: run.augment.groups(batch.crops, batch.drawn_by_B, 0)
            ),
            loss_seconds=_timed(run, loss),
            update_seconds=update,
            core_seconds=_core_seconds(run),
        )


class _Step(NamedTuple):
    batch: Batch
    outputs: Outputs
    took: tuple[float, float, float]
    """Seconds from batch to batch, and of them for the loader and for the update."""


def _step(run: Run, batches: Iterator[Batch], step: int) -> _Step:
    start = time.perf_counter()
    batch = next(batches)
    run.begin_epoch_if_due(batch.position)
    outputs, _ = run.gradients(batch, step)
    _settle(run)
    update = time.perf_counter()
    skipped = apply_update(run.optimizer, run.lr_at(step), gradient_norm(run.optimizer))
    run.objective.after_step(outputs, step, run.plan.total_steps, skipped)
    run.optimizer.zero_grad(set_to_none=True)
    _settle(run)
    end = time.perf_counter()
    return _Step(batch, outputs, (end - start, run.waited(), end - update))


def _timed(run: Run, work: Callable[[], Any]) -> float:
    """The median of some times, the first left out."""
    seconds = []
    for _ in range(_REPEATS + 1):
        _settle(run)
        start = time.perf_counter()
        work()
        _settle(run)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _core_seconds(run: Run) -> float:
    """Processor time of the loader alone, per image, while it is the one that is waited for."""
    batches = run.loader.starting_at(Position(1, 0))
    for _ in range(run.config.loader.prefetch + 1):
        next(batches)
    start, images = time.process_time(), 0
    for _ in range(2 * _REPEATS):  # as much is begun as is handed out
        images += len(next(batches).ids_B)
    spent = time.process_time() - start
    batches.close()  # type: ignore[attr-defined]
    return spent / images


def _settle(run: Run) -> None:
    if run.fabric.device.type == "cuda":
        torch.cuda.synchronize(run.fabric.device)


def _device(run: Run) -> tuple[str, float, float]:
    if run.fabric.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(run.fabric.device)
        unused = torch.cuda.memory_reserved() - torch.cuda.max_memory_reserved()
        name = torch.cuda.get_device_name(run.fabric.device)
        return name, float(total), float(total - free - unused)
    return "this CPU", _machine_memory(), _peak_of_process()


def _machine_memory() -> float:
    """Bytes of memory that this process may use: the machine's, or its control group's limit."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(file)
        text = path.read_text().strip() if path.is_file() else ""
        if text.isdigit():
            total = min(total, float(text))
    return total


def _peak_of_process() -> float:
    # Not getrusage: its peak begins with that of the process that started this one.
    status = Path("/proc/self/status").read_text().splitlines()
    return next((1024 * float(line.split()[1]) for line in status if line.startswith("VmHWM")), 0.0)


def main() -> None:
    """Read a request, measure, print."""
    request = json.load(sys.stdin)
    reading = read(from_json(RunConfig, request["config"]), int(request["steps"]))
    print(dump_json(asdict(reading)))


if __name__ == "__main__":
    main()
