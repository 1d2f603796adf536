"""The scrape endpoint of a run, for Prometheus: what rank 0 knows of it.

Names follow Prometheus' conventions: base units, ``_total``, ``_ratio``. Which run a series is of,
the target's labels say (:mod:`trainer.telemetry.scrape_targets`); those of a rank, 8 each, have
``rank`` and ``node`` too.
"""

import math
import platform
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
    start_wsgi_server,
)

from common.errors import ConfigError
from trainer.telemetry import Reader, Record

# Record's key: metric and help. NaN until the first record that has it.
_GAUGES = {
    "epoch": ("widebatch_epoch", "Epoch of the newest step, from 0"),
    "loss": ("widebatch_loss", "Loss of the newest step"),
    "contrastive_top1": (
        "widebatch_contrastive_top1_ratio",
        "Anchors of the newest step that are nearest to their positive, 0 to 1",
    ),
    "lr": ("widebatch_learning_rate", "Learning rate of the newest step"),
    "images_per_second": ("widebatch_images_per_second", "Global throughput of the newest steps"),
    "gradient_norm": ("widebatch_gradient_norm", "L2 norm of the global gradient"),
    "knn_top1": ("widebatch_knn_top1_ratio", "Online kNN accuracy on the test data, 0 to 1"),
    "linear_top1": (
        "widebatch_linear_top1_ratio",
        "Online linear accuracy on the test data, 0 to 1",
    ),
    "knn_best_top1": ("widebatch_knn_best_top1_ratio", "The best online kNN accuracy, 0 to 1"),
    "feature_std": (
        "widebatch_feature_std_ratio",
        "Spread of the projections: 0 on a single point, 1 evenly over the sphere",
    ),
    "effective_rank": ("widebatch_effective_rank", "RankMe of the projections, from 1"),
    "stragglers": ("widebatch_stragglers", "Ranks of the run that are slower than the others"),
}
_COUNTERS = {
    "skipped": ("widebatch_skipped_steps_total", "Steps left out for non-finite gradients"),
    "substitutes": (
        "widebatch_substituted_samples_total",
        "Damaged samples in whose place another was shown",
    ),
}
# Upper bounds, seconds: a small network's step on a CPU takes 10 ms, a batch of 32,768 some 10 s.
_STEP_BOUNDS = (
    *(0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1, 1.5, 2, 3, 5, 7.5, 10, 15, 20, 30, 60),
)
_WAIT_BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What does not change while the run goes on, and the steps that an earlier part of it did."""

    name: str
    recipe: str
    total_steps: int
    global_batch: int
    world_size: int
    steps_done: int = 0


class Prometheus(Reader):
    """A scrape endpoint with the newest values; GET only, no path or environment in it.

    Args:
        host: address to bind.
        port: 0 chooses one.
        run: what does not change.
        nodes: name of each rank's machine.

    Raises:
        ConfigError: the port is taken, or the address is not this machine's.
    """

    collapsed: Callable[[], bool] | None = None
    """Asked at every reading whether the collapse alarm is on."""

    def __init__(self, host: str, port: int, run: RunFacts, nodes: Sequence[str]) -> None:
        disable_created_metrics()  # a second series for each counter, which no query here uses
        self._registry = CollectorRegistry()
        self._info(
            "widebatch_build",
            "Versions that this process runs on",
            version=version("widebatch"),
            torch=torch.__version__,
            python=platform.python_version(),
        )
        self._phase_seconds = Counter(
            "widebatch_phase_seconds_total",
            "Time of a rank's own work by part of a step; collectives: its waits for others",
            ["rank", "node", "phase"],
            registry=self._registry,
        )
        self._straggling = Gauge(
            "widebatch_rank_straggling",
            "1 for a rank that is slower than the others",
            ["rank", "node"],
            registry=self._registry,
        )
        self.clock: Callable[[], float] = time.perf_counter
        """Seconds; those that belong to no step do not count in it."""
        self._global_batch, self._nodes = run.global_batch, nodes
        self._step_began: float | None = None
        self._add_run(run)
        try:
            self._server, self._thread = start_wsgi_server(port, addr=host, registry=self._registry)
        except OSError as error:
            raise ConfigError(
                f"--telemetry.prometheus-port {port}: cannot listen on {host}:{port}"
                f" ({error.strerror}); choose another port, or 0 for none"
            ) from None

    def _add_run(self, run: RunFacts) -> None:
        """The numbers of the whole run."""
        self._info("widebatch_run", "Which run this is", name=run.name, recipe=run.recipe)
        self._gauge("widebatch_planned_steps", "Optimizer steps that the run has", run.total_steps)
        self._gauge("widebatch_ranks", "Processes of the run", run.world_size)
        self._gauge("widebatch_global_batch_images", "Images of a step", run.global_batch)
        self._step = self._gauge("widebatch_step", "Optimizer steps done", run.steps_done)
        self._read_at = self._gauge(
            "widebatch_last_reading_timestamp_seconds",
            "When the newest steps were read, or the run started; Unix time",
            time.time(),
        )
        self._collapsed = self._gauge("widebatch_collapsed", "1 while the collapse alarm is on", 0)
        self._gauges = {key: self._gauge(*names, math.nan) for key, names in _GAUGES.items()}
        self._counters = {
            key: Counter(*names, registry=self._registry) for key, names in _COUNTERS.items()
        }
        self._images = Counter(
            "widebatch_images_total",
            "Images of the steps done; views not counted",
            registry=self._registry,
        )
        self._steps = Histogram(
            "widebatch_step_seconds",
            "Time of a step on rank 0, evaluations and checkpoints left out",
            registry=self._registry,
            buckets=_STEP_BOUNDS,
        )
        self._waits = Histogram(
            "widebatch_loader_wait_seconds",
            "Time in which a step waited for the loader on rank 0",
            registry=self._registry,
            buckets=_WAIT_BOUNDS,
        )

    def _info(self, metric: str, text: str, **labels: str) -> None:
        Info(metric, text, registry=self._registry).info(labels)

    def _gauge(self, name: str, text: str, value: float) -> Gauge:
        gauge = Gauge(name, text, registry=self._registry)
        gauge.set(value)
        return gauge

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._server.server_port)

    def count(self) -> None:
        """Add the time since the step before to the histogram of steps."""
        now = self.clock()
        if self._step_began is not None:
            self._steps.observe(now - self._step_began)
        self._step_began = now

    def read(self, records: list[Record]) -> None:
        """Show the newest record; add up the counters."""
        for record in records:
            self._step.set(record["step"])
            self._images.inc(self._global_batch)
            if "loader_wait_seconds" in record:
                self._waits.observe(record["loader_wait_seconds"])
            for name, counter in self._counters.items():
                counter.inc(record.get(name, 0))
            for name in record:
                if name.endswith("_top1") and name not in self._gauges:
                    told = f"Right answers of the newest step, 0 to 1: {name.removesuffix('_top1')}"
                    self._gauges[name] = self._gauge(f"widebatch_{name}_ratio", told, math.nan)
            for name, gauge in self._gauges.items():
                if name in record:
                    gauge.set(record[name])
        self._collapsed.set(self.collapsed is not None and self.collapsed())
        self._read_at.set(time.time())

    def show_ranks(self, seconds: Mapping[str, Sequence[float]], slow: Container[int]) -> None:
        """Seconds since the last reading, by phase and rank, and the ranks that are slow."""
        for phase, values in seconds.items():
            for rank, value in enumerate(values):
                self._phase_seconds.labels(rank, self._nodes[rank], phase).inc(value)
        for rank, node in enumerate(self._nodes):
            self._straggling.labels(rank, node).set(rank in slow)

    def close(self) -> None:
        """Stop serving. May be called again."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
