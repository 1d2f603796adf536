"""What a run says of itself: one stream of step records, several readers.

The trainer hands over device tensors each step and never waits for them; every ``log_every`` steps
they are read in one transfer and become one record a step. Readers are a progress bar or log lines,
``metrics.jsonl``, TensorBoard and Prometheus.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

log = logging.getLogger(__name__)

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig:
    """How a run is watched. None of it changes a number."""

    log_every: int = 10
    """Steps between readings of the device; every step's loss is recorded all the same."""
    log_seconds: float = 10.0
    """Seconds between log lines where no terminal shows a progress bar."""
    tensorboard: bool = True
    """Write TensorBoard events to RUN/tensorboard."""
    prometheus_port: int = 0
    """Port of a Prometheus endpoint on each node; 0: none."""
    prometheus_host: str = "127.0.0.1"
    """Address the endpoints bind; 0.0.0.0 shows them to the network."""
    prometheus_targets: Path | None = None
    """Folder for the file by which Prometheus finds the endpoints, one folder for many runs; none:
    the run's own."""


class Reader(Protocol):
    """Takes records in the order of steps."""

    def read(self, records: list[Record]) -> None:
        """Records since the last call, one per step."""

    def close(self) -> None:
        """No record follows."""


class Completer(Protocol):
    """Knows something of each step that takes all ranks to say."""

    def complete(self, records: list[Record]) -> None:
        """Add it to the records, before they are read. A collective."""


class StepListener(Protocol):
    """Shows how long steps took."""

    def show_steps(self, seconds: Sequence[float]) -> None:
        """Of the steps since the last call; pauses, and the first step of all, are left out."""


@dataclass
class _Pending:
    """A step whose numbers are still on the device."""

    record: Record
    tensors: dict[str, torch.Tensor]
    seconds: float | None
    """Since the step before, on the host, which is at most a step ahead of the device."""


@dataclass
class Telemetry:
    """Collects steps; on rank 0 passes them to readers, elsewhere only keeps the rhythm."""

    config: TelemetryConfig
    images_per_step: int
    readers: list[Reader] = field(default_factory=list)
    completers: list[Completer] = field(default_factory=list)
    """The same on all ranks."""
    step_listeners: list[StepListener] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._pending: list[_Pending] = []
        self._clock = time.perf_counter()
        self._paused = 0.0
        self._step_began: float | None = None  # moved on by pauses

    def step(self, record: Record, **tensors: torch.Tensor) -> None:
        """Note one step: host values in ``record``, scalars that live on the device by keyword."""
        now = time.perf_counter()
        took = None if self._step_began is None else now - self._step_began
        self._step_began = now
        self._pending.append(_Pending(record, tensors, took))

    def annotate(self, **values: Any) -> None:
        """Add values to the newest step's record, before it is flushed."""
        if self._pending:
            self._pending[-1].record.update(values)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside does not count against the throughput."""
        start = time.perf_counter()
        yield
        took = time.perf_counter() - start
        self._paused += took
        if self._step_began is not None:
            self._step_began += took

    def flush_if_due(self) -> list[Record]:
        """Read the device every ``log_every`` steps; see :meth:`flush`."""
        return self.flush() if len(self._pending) >= self.config.log_every else []

    def flush(self) -> list[Record]:
        """Read the device once, complete the pending records and pass them on.

        Returns:
            The records, one per step since the last flush.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return []
        names = list(pending[0].tensors)
        columns = [torch.stack([p.tensors[n].detach().double() for p in pending]) for n in names]
        values = torch.stack(columns).tolist() if columns else []  # the one synchronisation
        now = time.perf_counter()
        elapsed = max(now - self._clock - self._paused, 1e-9)
        self._clock, self._paused = now, 0.0
        speed = self.images_per_step * len(pending) / elapsed
        for index, item in enumerate(pending):
            item.record.update({n: values[k][index] for k, n in enumerate(names)})
            item.record["images_per_second"] = round(speed, 2)
        records = [item.record for item in pending]
        for completer in self.completers:
            completer.complete(records)
        for listener in self.step_listeners:
            listener.show_steps([p.seconds for p in pending if p.seconds is not None])
        for reader in self.readers:
            reader.read(records)
        return records

    def close(self) -> None:
        """Flush and close all readers. Not a collective: other ranks may have failed."""
        self.completers = []
        self.flush()
        for reader in self.readers:
            reader.close()


class JsonLines:
    """``metrics.jsonl``: one object a line, flushed with every reading."""

    def __init__(self, path: Path, keep_up_to: int) -> None:
        keep_lines(path, keep_up_to)
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a")

    def read(self, records: list[Record]) -> None:
        """Append the records."""
        for record in records:
            self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Flush to disk and close."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def keep_lines(path: Path, last_step: int) -> None:
    """Drop lines of steps after ``last_step``, and a torn last line, that a resumed run repeats."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break  # a process was killed while it wrote this line; what follows is repeated
        if record.get("step", 0) > last_step:
            break
        kept.append(line + "\n")
    temporary = path.with_name(f".writing-{path.name}")
    temporary.write_text("".join(kept))
    temporary.chmod(0o600)
    temporary.replace(path)


def _headline(record: Mapping[str, Any]) -> str:
    parts = [f"loss {record['loss']:.4f}", f"lr {record['lr']:.4g}"]
    parts.append(f"{record['images_per_second']:.0f} img/s")
    if "knn_top1" in record:
        parts.append(f"kNN {record['knn_top1']:.1%} (best {record['knn_best_top1']:.1%})")
    return "  ".join(parts)


class ProgressBar:
    """A bar on the terminal: loss, learning rate, images per second, time left."""

    def __init__(self, total: int, done: int) -> None:
        self._total, self._done = total, done
        self._bar: Any = None
        self._knn = ""

    def _open(self) -> Any:
        from tqdm import tqdm

        has_width = os.isatty(2) and os.get_terminal_size(2).columns > 0  # some terminals say 0
        return tqdm(
            total=self._total,
            initial=self._done,
            unit="step",
            ncols=None if has_width else 100,
            dynamic_ncols=has_width,
            file=sys.stderr,
        )

    def read(self, records: list[Record]) -> None:
        """Advance the bar; it appears with the first records, below what the run says before."""
        if self._bar is None:
            self._bar = self._open()
        for record in records:
            if "knn_top1" in record:
                self._knn = f"{record['knn_top1']:.1%}"
        last = records[-1]
        facts = {
            "loss": f"{last['loss']:.3f}",
            "lr": f"{last['lr']:.3g}",
            "img/s": f"{last['images_per_second']:.0f}",
        }
        if self._knn:
            facts["knn"] = self._knn
        self._bar.set_postfix(facts, refresh=False)
        self._bar.update(len(records))

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


class LogLines:
    """One line per interval where there is no terminal."""

    def __init__(self, total: int, seconds: float) -> None:
        self._total, self._seconds = total, seconds
        self._said = self._started = time.monotonic()
        self._steps = 0

    def read(self, records: list[Record]) -> None:
        """Log the newest record if it is time, or it is the last, or it carries a kNN result."""
        self._steps += len(records)
        last, now = records[-1], time.monotonic()
        due = now - self._said >= self._seconds
        if due or last["step"] == self._total or "knn_top1" in last:
            left = (now - self._started) / self._steps * (self._total - last["step"])
            log.info(
                "step %d/%d  epoch %d  %s  ETA %s",
                last["step"],
                self._total,
                last["epoch"],
                _headline(last),
                time.strftime("%H:%M:%S", time.gmtime(left))
                if left < 86400
                else f"{left / 3600:.0f} h",
            )
            self._said = now

    def close(self) -> None:
        """Nothing to close."""


class TensorBoard:
    """TensorBoard events; a resumed run hides what it repeats."""

    def __init__(self, directory: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._writer = SummaryWriter(str(directory), purge_step=done + 1 if done else None)
        for events in directory.glob("events.*"):
            events.chmod(0o600)

    def read(self, records: list[Record]) -> None:
        """Write every number of every record under its own name."""
        for record in records:
            for name, value in record.items():
                if name != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()
