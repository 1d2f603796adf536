"""The stream of step records: from the device, through those that complete them, to the readers.

The trainer hands over device tensors each step and never waits for them; every ``log_every`` steps
they are read in one transfer and become one record a step.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    """Port of a Prometheus endpoint on rank 0; 0: none."""
    prometheus_host: str = "127.0.0.1"
    """Address that it binds; 0.0.0.0 shows it to the network."""
    prometheus_targets: Path | None = None
    """Folder for the file by which Prometheus finds it, one folder for many runs; none: the run's
    own."""

    def __post_init__(self) -> None:
        check_bounds(self, "--telemetry.", log_every="[1, 1e9]", log_seconds="[0, inf)")
        check_bounds(self, "--telemetry.", prometheus_port="[0, 65535]")


class Reader:
    """Is told of steps, in their order. What it does not care for, it leaves as it is here."""

    def count(self) -> None:
        """One more step is done; the device is not read yet."""

    def complete(self, records: list[Record]) -> None:
        """Add to the records what takes all ranks to say, before they are read. A collective."""

    def read(self, records: list[Record]) -> None:
        """Records since the last call, one per step."""

    def close(self) -> None:
        """No record follows."""


@dataclass
class Telemetry:
    """Collects steps and passes them to readers: other ones on rank 0 than elsewhere.

    Those that complete records are on all ranks, in the same order.
    """

    config: TelemetryConfig
    images_per_step: int
    readers: list[Reader] = field(default_factory=list)
    clock: Callable[[], float] = time.perf_counter
    """Seconds; those that belong to no step do not count in it."""

    def __post_init__(self) -> None:
        self._pending: list[tuple[Record, dict[str, torch.Tensor]]] = []
        self._flushed = self.clock()

    def step(self, record: Record, **tensors: torch.Tensor) -> None:
        """Note one step: host values in ``record``, scalars that live on the device by keyword."""
        self._pending.append((record, tensors))
        for reader in self.readers:
            reader.count()

    def annotate(self, **values: Any) -> None:
        """Add values to the newest step's record, before it is flushed."""
        if self._pending:
            self._pending[-1][0].update(values)

    def flush_if_due(self) -> None:
        """Read the device every ``log_every`` steps; see :meth:`flush`."""
        if len(self._pending) >= self.config.log_every:
            self.flush()

    def flush(self, *, together: bool = True) -> None:
        """Read the device once, complete the pending records and pass them on.

        Args:
            together: all ranks call, a collective; else the records are not completed.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        names = list(pending[0][1])
        columns = [torch.stack([t[name].detach() for _, t in pending]).double() for name in names]
        values = torch.stack(columns).T.tolist() if columns else []  # the one synchronisation
        now = self.clock()
        elapsed = max(now - self._flushed, 1e-9)
        self._flushed = now
        speed = round(self.images_per_step * len(pending) / elapsed, 2)
        records = [record for record, _ in pending]
        for record, numbers in zip(records, values):
            record |= dict(zip(names, numbers), images_per_second=speed)
        for reader in self.readers if together else ():
            reader.complete(records)
        for reader in self.readers:
            reader.read(records)

    def close(self) -> None:
        """Flush and close all readers. Not a collective: other ranks may have failed."""
        self.flush(together=False)
        for reader in self.readers:
            reader.close()
