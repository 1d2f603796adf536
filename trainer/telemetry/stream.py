"""The stream of step records: from the device, through those that complete them, to the readers.

The trainer hands over device tensors each step and never waits for them; every ``log_every`` steps
they are read in one transfer and become one record a step.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from common.bounds import check_bounds

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
    wandb: str | None = None
    """Project, or ENTITY/PROJECT, of Weights & Biases that gets the run's records; the library must
    be installed. none: not used."""
    prometheus_port: int = 0
    """Port of a Prometheus endpoint on each node; 0: none."""
    prometheus_host: str = "127.0.0.1"
    """Address the endpoints bind; 0.0.0.0 shows them to the network."""
    prometheus_targets: Path | None = None
    """Folder for the file by which Prometheus finds the endpoints, one folder for many runs; none:
    the run's own."""

    def __post_init__(self) -> None:
        check_bounds(self, "--telemetry.", log_every="[1, 1e9]", log_seconds="[0, inf)")
        check_bounds(self, "--telemetry.", prometheus_port="[0, 65535]")


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


class StepCounter(Protocol):
    """Is told of each step as it is done, before the device is read."""

    def count(self) -> None:
        """One more step."""


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
    step_counters: list[StepCounter] = field(default_factory=list)

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
        for counter in self.step_counters:
            counter.count()

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
        columns = [torch.stack([p.tensors[n].detach() for p in pending]).double() for n in names]
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
