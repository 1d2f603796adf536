"""A few real steps of a recipe, measured: the process that :mod:`trainer.planner.calibrate` starts.

``python -m trainer.planner.probe`` reads JSON from standard input (``config``, ``steps``) and
prints a :class:`Reading` as JSON in its last line. It is a process of its own so that its peak of
memory is one run's, imports and all.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
    """Train ``steps`` steps as a run does, and one beside a checkpoint's writing; time the parts.

    Args:
        config: of one process; its folder is written to.
        steps: 2 or more.
    """
    with prepare(config) as run:
        batches = run.loader.starting_at(run.state.position(run.plan))
        timed = [_step(run, batches, step)[0] for step in range(steps)][1:]
        run.state.step = steps
        run.save()
        _, batch, outputs = _step(run, batches, steps)  # beside the checkpoint's writing
        name, memory, peak = _device(run)
        batches.close()  # type: ignore[attr-defined]
        augment = _timed(run, lambda: run.augment(batch.crops_BVHWC, batch.ids_B, 0))
        return Reading(
            batch=config.batch,
            device=run.fabric.device.type,
            name=name,
            memory=memory,
            peak_bytes=peak,
            step_seconds=statistics.median(each.seconds for each in timed),
            wait_seconds=statistics.median(each.wait for each in timed),
            augment_seconds=augment,
            loss_seconds=_timed(run, lambda: _loss(run, outputs)),
            update_seconds=statistics.median(each.update for each in timed),
            core_seconds=_core_seconds(run),
        )


@dataclass(frozen=True)
class _Took:
    """Seconds of one step, and of them those of its parts."""

    seconds: float
    wait: float
    update: float


def _step(run: Run, batches: Iterator[Batch], step: int) -> tuple[_Took, Batch, Outputs]:
    start = time.perf_counter()
    batch = next(batches)
    outputs, _ = run.gradients(batch, step)
    _settle(run)
    update = time.perf_counter()
    _update(run, outputs, step)
    _settle(run)
    end = time.perf_counter()
    return _Took(end - start, run.waited(), end - update), batch, outputs


def _update(run: Run, outputs: Outputs, step: int) -> None:
    skipped = apply_update(run.optimizer, run.lr_at(step), gradient_norm(run.optimizer))
    run.objective.after_step(outputs, step, run.plan.total_steps, skipped)
    run.optimizer.zero_grad(set_to_none=True)


def _loss(run: Run, outputs: Outputs) -> None:
    rows = {name: each.detach().requires_grad_() for name, each in outputs.rows.items()}
    torch.autograd.grad(run.objective.loss(Outputs(rows, outputs.fixed)).value, list(rows.values()))


def _timed(run: Run, work: Callable[[], Any]) -> float:
    work()
    seconds = []
    for _ in range(_REPEATS):
        _settle(run)
        start = time.perf_counter()
        work()
        _settle(run)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


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
    return "this CPU", machine_memory(), _peak_of_process()


def machine_memory() -> float:
    """Bytes of memory that this process may use: the machine's, or its control group's limit."""
    status = Path("/proc/meminfo").read_text().splitlines()
    total = next(float(line.split()[1]) * 1024 for line in status if line.startswith("MemTotal"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(file)
        text = path.read_text().strip() if path.is_file() else ""
        if text.isdigit():
            total = min(total, float(text))
    return total


def _peak_of_process() -> float:
    # Not getrusage: its peak begins with that of the process that started this one.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return float(line.split()[1]) * 1024
    return 0.0


def main() -> None:
    """Read a request, measure, print."""
    request = json.load(sys.stdin)
    reading = read(from_json(RunConfig, request["config"]), int(request["steps"]))
    print(dump_json(asdict(reading)))


if __name__ == "__main__":
    main()
