"""The scrape endpoint of a node, for Prometheus: what its processes know of the run.

Names follow Prometheus' conventions: base units, ``_total``, ``_ratio``. Which run and node a
series is of, the target's labels say (:mod:`trainer.telemetry.scrape_targets`). The series
themselves have no labels but ``rank`` and ``phase``, 8 series a rank, each on the endpoint of the
rank's node.
"""

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
from trainer.telemetry import Record

# Record's key: metric and help. NaN until the first record that has it.
_GAUGES = {
    "epoch": ("widebatch_epoch", "Epoch of the newest step, from 0"),
    "loss": ("widebatch_loss", "Contrastive loss of the newest step, nats"),
    "contrastive_top1": (
        "widebatch_contrastive_top1_ratio",
        "Anchors of the newest step that are nearest to their positive, 0 to 1",
    ),
    "lr": ("widebatch_learning_rate", "Learning rate of the newest step"),
    "images_per_second": ("widebatch_images_per_second", "Global throughput of the newest steps"),
    "gradient_norm": ("widebatch_gradient_norm", "L2 norm of the global gradient"),
    "knn_top1": ("widebatch_knn_top1_ratio", "Online kNN accuracy on the test data, 0 to 1"),
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
    """What does not change while the run goes on."""

    name: str
    """Of its folder, without the path."""
    recipe: str
    total_steps: int
    global_batch: int
    """Images of a step."""
    world_size: int
    steps_done: int = 0
    """By an earlier part of the run."""


class Prometheus:
    """A scrape endpoint with the newest values; GET only, no path or environment in it.

    Args:
        host: address to bind.
        port: 0 chooses one.
        run: on rank 0, which has the numbers of the whole run; ``None`` elsewhere.

    Raises:
        ConfigError: the port is taken, or the address is not this machine's.
    """

    collapsed: Callable[[], bool] | None = None
    """Asked at every reading whether the collapse alarm is on."""
    ranks: Container[int] | None = None
    """Whose seconds are shown, those of the node; ``None``: all."""

    def __init__(self, host: str, port: int, run: RunFacts | None) -> None:
        disable_created_metrics()  # a second series for each counter, which no query here uses
        registry = CollectorRegistry()
        build = Info("widebatch_build", "Versions that this process runs on", registry=registry)
        build.info(
            {
                "version": version("widebatch"),
                "torch": torch.__version__,
                "python": platform.python_version(),
            }
        )
        self._by_rank = _RankMetrics(registry)
        self._run = None if run is None else _RunMetrics(registry, run)
        try:
            self._server, self._thread = start_wsgi_server(port, addr=host, registry=registry)
        except OSError as error:
            raise ConfigError(
                f"--telemetry.prometheus-port {port}: cannot listen on {host}:{port}"
                f" ({error.strerror}); choose another port, or 0 for none"
            ) from None

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._server.server_port)

    def read(self, records: list[Record]) -> None:
        """Show the newest record; add up the counters. For rank 0's endpoint."""
        if self._run is not None:
            self._run.read(records, self.collapsed is not None and self.collapsed())

    def show_steps(self, seconds: Sequence[float]) -> None:
        """See :class:`trainer.telemetry.StepListener`."""
        if self._run is not None:
            self._run.show_steps(seconds)

    def show_ranks(self, seconds: Mapping[str, Sequence[float]], slow: Container[int]) -> None:
        """See :class:`trainer.health.stragglers.Listener`."""
        self._by_rank.show(seconds, slow, self.ranks)

    def close(self) -> None:
        """Stop serving. May be called again."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _RunMetrics:
    """Numbers of the whole run, which rank 0 has."""

    def __init__(self, registry: CollectorRegistry, run: RunFacts) -> None:
        def gauge(name: str, text: str, value: float) -> Gauge:
            made = Gauge(name, text, registry=registry)
            made.set(value)
            return made

        Info("widebatch_run", "Which run this is", registry=registry).info(
            {"name": run.name, "recipe": run.recipe}
        )
        gauge("widebatch_planned_steps", "Optimizer steps that the run has", run.total_steps)
        gauge("widebatch_ranks", "Processes of the run", run.world_size)
        gauge("widebatch_global_batch_images", "Images of a step", run.global_batch)
        self._batch = run.global_batch
        self._step = gauge("widebatch_step", "Optimizer steps done", run.steps_done)
        self._read_at = gauge(
            "widebatch_last_reading_timestamp_seconds",
            "When the newest steps were read, or the run started; Unix time",
            time.time(),
        )
        self._collapsed = gauge("widebatch_collapsed", "1 while the collapse alarm is on", 0)
        self._gauges = {k: gauge(*names, float("nan")) for k, names in _GAUGES.items()}
        self._counters = {k: Counter(*names, registry=registry) for k, names in _COUNTERS.items()}
        self._images = Counter(
            "widebatch_images_total",
            "Images of the steps done; views not counted",
            registry=registry,
        )
        self._steps = Histogram(
            "widebatch_step_seconds",
            "Time of a step on rank 0, evaluations and checkpoints left out",
            registry=registry,
            buckets=_STEP_BOUNDS,
        )
        self._waits = Histogram(
            "widebatch_loader_wait_seconds",
            "Time in which a step waited for the loader on rank 0",
            registry=registry,
            buckets=_WAIT_BOUNDS,
        )

    def read(self, records: list[Record], collapsed: bool) -> None:
        for record in records:
            self._step.set(record["step"])
            self._images.inc(self._batch)
            if "loader_wait_seconds" in record:
                self._waits.observe(record["loader_wait_seconds"])
            for name, counter in self._counters.items():
                counter.inc(record.get(name, 0))
            for name, gauge in self._gauges.items():
                if name in record:
                    gauge.set(record[name])
        self._collapsed.set(collapsed)
        self._read_at.set(time.time())

    def show_steps(self, seconds: Sequence[float]) -> None:
        for value in seconds:
            self._steps.observe(value)


class _RankMetrics:
    """Numbers of single ranks, which every rank has of all others."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Counter(
            "widebatch_phase_seconds_total",
            "Time of a rank's own work by part of a step; collectives: its waits for others",
            ["rank", "phase"],
            registry=registry,
        )
        self._straggling = Gauge(
            "widebatch_rank_straggling",
            "1 for a rank that is slower than the others",
            ["rank"],
            registry=registry,
        )

    def show(
        self,
        seconds: Mapping[str, Sequence[float]],
        slow: Container[int],
        shown: Container[int] | None,
    ) -> None:
        for phase, values in seconds.items():
            for rank, value in enumerate(values):
                if shown is None or rank in shown:
                    self._seconds.labels(str(rank), phase).inc(value)
                    self._straggling.labels(str(rank)).set(rank in slow)
