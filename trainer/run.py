"""A run ready for its next step: what it is made of, and what belongs to a step besides training.

:func:`trainer.prepare.prepare` makes it; :func:`trainer.loop.fit` drives it.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from common.collectives import gather_rows
from common.errors import DataError, NumericalError
from common.progress import Progress
from data_pipeline.augment import Augment
from data_pipeline.reading.batch import Batch
from data_pipeline.reading.loader import TrainLoader
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.order import EpochOrder, Position
from trainer.config import RunConfig, RunPlan, lr_at
from trainer.features.online_knn import OnlineKnn
from trainer.health.collapse import CollapseAlarm
from trainer.health.non_finite import NumericalGuard
from trainer.health.phases import Phases
from trainer.objectives.base import Objective, Outputs
from trainer.optim.optimizers import Updatable
from trainer.optim.schedule import weight_decay_at
from trainer.parallel.sharding import Sharding
from trainer.state.checkpoint import Checkpoint, CheckpointSaver
from trainer.step import Gradients, StepDone
from trainer.telemetry import JsonLines, Telemetry

log = logging.getLogger(__name__)

COMPUTE_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
"""Dtype of views and forward pass, by the name of a precision."""


@dataclass
class TrainState:
    """What changes while a run goes on, beside weights and optimizer; saved as JSON."""

    step: int = 0
    """Optimizer steps done."""
    skipped_in_a_row: int = 0
    """Newest steps in a row that were left out for non-finite gradients."""
    knn_best_top1: float = 0.0
    """Best online kNN accuracy so far, 0 to 1."""
    knn_best_of: str = ""
    """What that was measured on: see :attr:`trainer.features.online_knn.OnlineKnn.identity`."""

    def position(self, plan: RunPlan) -> Position:
        """Where in the data the next step stands."""
        epoch, step = divmod(self.step, plan.steps_per_epoch)
        return Position(epoch, step)


class StopAskedError(Exception):
    """A pass before an epoch was broken off, on all ranks, because one was asked to stop."""


Watcher = Callable[[StepDone], None]
"""Looks at a step that is done, and changes no number."""


@dataclass
class Run:
    """A run ready for its next step."""

    config: RunConfig
    plan: RunPlan
    fabric: Fabric
    data: OpenData
    loader: TrainLoader
    augment: Augment
    objective: Objective
    sharding: Sharding
    """What each process holds of ``objective`` and its optimizer."""
    gradients: Gradients
    """Leaves a batch's gradients in the parameters: all at once, or in pieces."""
    saver: CheckpointSaver
    data_stamp: list[int]
    """See :func:`trainer.state.run_folder.data_stamp`."""
    telemetry: Telemetry
    knn: OnlineKnn | None
    guard: NumericalGuard
    collapse: CollapseAlarm
    phases: Phases
    """Where this process is, for the watchdog, and the time that it takes."""
    watchers: list[Watcher] = field(default_factory=list)
    """Called after each step, in order, on all ranks."""
    state: TrainState = field(default_factory=TrainState)
    samples: JsonLines | None = None
    """Where :meth:`log_samples` writes; on rank 0."""
    stop_agreed: Callable[[], bool] = lambda: False
    """Whether any rank is asked to stop; a collective, for passes that are no steps."""
    knn_refused: NumericalError | None = None
    """Why the newest online kNN has no figure; on all ranks."""
    _waited_before: float = 0.0

    @property
    def model(self) -> nn.Module:
        """``objective`` as Fabric wraps it: autocast, and gradients averaged over ranks."""
        return self.sharding.model

    @property
    def optimizer(self) -> Updatable:
        """What moves the parameters."""
        return self.sharding.optimizer

    def remaining_batches(self) -> Iterator[Batch]:
        """Batches of the steps that are left, in order.

        Raises:
            StopAskedError: between two epochs, when a pass of the objective's was broken off.
            DataError, OSError: the file has become unreadable. A process that is alone saves its
                last step before; of several the others do not know, and are in the next one.
        """
        before = self.state.step
        try:
            yield from self._batches()
        except (DataError, OSError):
            if self.plan.world_size == 1 and self.state.step > before:
                with contextlib.suppress(OSError):  # which has been told
                    self.save(finish=True)
                    log.info("the data cannot be read on; step %d is saved", self.state.step)
            raise

    def _batches(self) -> Iterator[Batch]:
        """Read ahead over an epoch's end, unless the objective has yet to give the next order."""
        ahead: Iterator[Batch] | None = None
        while not self.is_done():
            position = self.state.position(self.plan)
            self.begin_epoch_if_due(position)
            order = self.order()
            if order is None:
                batches = ahead = ahead or self.loader.starting_at(position)
            else:
                batches, ahead = self.loader.epoch(position, order), None
            left = self.plan.total_steps - self.state.step
            yield from islice(batches, min(left, self.plan.steps_per_epoch - position.step))

    def order(self) -> EpochOrder | None:
        """Of the present epoch's samples, where the objective gives one."""
        return self.objective.order(self.plan.num_samples)

    def sample_ids(self, step: int) -> list[int]:
        """Samples of the global batch of a step of the present epoch, from 1."""
        position = Position(*divmod(step - 1, self.plan.steps_per_epoch))
        ids: list[int] = self.loader.global_ids(position, self.order()).tolist()
        return ids

    def begin_epoch_if_due(self, position: Position) -> None:
        """What the objective makes anew for an epoch, before its first step. A collective."""
        if position.step == 0:
            if self.state.step and self.order() is not None:
                self.telemetry.flush()  # while it is known which samples the last steps had
            with self.phases.aside("epoch"):
                self.objective.before_epoch(position.epoch, partial(self._whole_epoch, position))

    def _whole_epoch(self, position: Position) -> Iterator[Outputs]:
        """Outputs of every batch of an epoch, without gradient.

        Raises:
            StopAskedError: some rank is asked to stop.
        """
        if self.state.step:
            self.save()  # a pass is long, and what it has come to cannot be saved
        title = f"before epoch {position.epoch}: a pass without training"
        images = self.plan.steps_per_epoch * self.plan.global_batch
        with Progress(title, images, "images", self.fabric.is_global_zero) as bar:
            for batch in self.loader.epoch(position):
                if self.stop_agreed():
                    raise StopAskedError
                yield self.gradients.outputs(batch, self.state.step)
                bar.advance(self.plan.global_batch)

    def waited(self) -> float:
        """Seconds that this process waited for the loader since the last call."""
        total = self.loader.wait_seconds
        waited, self._waited_before = total - self._waited_before, total
        return round(waited, 6)

    def record(self, done: StepDone) -> None:
        """A watcher: one record in the stream of telemetry."""
        self.telemetry.step(
            {
                "step": done.number,
                "epoch": done.batch.position.epoch,
                "lr": done.lr,
                "loader_wait_seconds": self.waited(),
            },
            loss=done.loss.value,
            **done.loss.metrics,
            gradient_norm=done.gradient_norm,
            skipped=done.skipped,
        )

    def log_samples(self, done: StepDone) -> None:
        """A watcher: the sample ids that the ranks really had, in global order.

        The evidence behind "the same run". A collective, and a host synchronisation.
        """
        ids = gather_rows(done.batch.ids_B.to(self.fabric.device)).tolist()
        if self.samples is not None:
            self.samples.read([{"step": done.number, "ids": ids}])

    def lr_at(self, step: int) -> float:
        """Learning rate of the ``step``-th update, from 0."""
        return lr_at(self.config, self.plan, step)

    def steady_lr_at(self, step: int) -> float:
        """That of what is steady: the peak, once it is reached."""
        return self.lr_at(min(step, self.plan.warmup_steps))

    def weight_decay_at(self, step: int) -> float | None:
        """Weight decay of the ``step``-th update; None: that of the first."""
        start = self.config.optim.weight_decay
        return weight_decay_at(self.config.schedule, start, step, self.plan.total_steps)

    def is_done(self) -> bool:
        """Whether no step is left."""
        return self.state.step >= self.plan.total_steps

    def _ends_epochs(self, every: int) -> bool:
        """Whether the step just done ends one of every so many epochs; 0: none does."""
        epochs, steps = divmod(self.state.step, self.plan.steps_per_epoch)
        return every > 0 and not steps and epochs % every == 0

    def checkpoint_is_due(self) -> bool:
        """Whether a checkpoint belongs to the step just done."""
        every = self.config.checkpoint.every_steps
        return (
            self.is_done()
            or self._ends_epochs(self.config.checkpoint.every_epochs)
            or (every > 0 and self.state.step % every == 0)
        )

    def evaluate_if_due(self, done: StepDone) -> None:
        """A watcher: online kNN on all ranks, into the step's record; the best one is kept.

        Features that are not finite have no neighbours: that is noted, and the run goes on to what
        its guard says of it, or to its last checkpoint.
        """
        if self.knn is None or not (
            self.is_done() or self._ends_epochs(self.config.knn.every_epochs)
        ):
            return
        with self.phases.aside("evaluation"):
            try:
                result = self.knn.evaluate(
                    self.sharding.whole_encoder(),
                    self.augment,
                    self.fabric.device,
                    COMPUTE_DTYPE[self.config.precision],
                )
                self.knn_refused = None
            except NumericalError as error:  # of the features of all ranks: all of them meet it
                if self.fabric.is_global_zero:
                    log.warning("step %d: no online kNN: %s", self.state.step, error)
                result, self.knn_refused = dict.fromkeys(("knn_top1", "knn_top5"), math.nan), error
        self.state.knn_best_of = self.knn.identity
        is_best = result["knn_top1"] > self.state.knn_best_top1
        self.state.knn_best_top1 = max(self.state.knn_best_top1, result["knn_top1"])
        self.telemetry.annotate(**result, knn_best_top1=self.state.knn_best_top1)
        if is_best:
            self.save(best=result)

    def save(self, *, finish: bool = False, best: Mapping[str, Any] | None = None) -> None:
        """Save a checkpoint of the step just done, unless that has happened.

        Args:
            finish: all ranks return when it is on disk; else it is written behind the next steps.
            best: facts to mark it as the best one with.

        Raises:
            OSError: with ``finish``, on all ranks: it could not be written.
        """
        is_new = self.saver.step != self.state.step
        if is_new:
            self.telemetry.flush()
            self.state.skipped_in_a_row = self.guard.skipped_in_a_row
        with self.phases.aside("checkpoint"):
            if is_new:
                self._save(best)
            if finish:
                self.saver.finish()

    def _save(self, best: Mapping[str, Any] | None) -> None:
        parts = {
            "model": self.sharding.model_tensors(),
            "optimizer": self.sharding.optimizer_tensors(),
        }
        state = {
            **asdict(self.state),
            "epoch": self.state.step / self.plan.steps_per_epoch,
            "data_fingerprint": self.data.info.fingerprint,
            "data_identity": self.data.info.identity,
            "data_stamp": self.data_stamp,
            "world_size": self.plan.world_size,
        }
        self.saver.save(state, parts, best)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from ``checkpoint``; every rank reads it."""
        self.state = TrainState(
            **{key: checkpoint.state[key] for key in asdict(self.state) if key in checkpoint.state}
        )
        if self.knn is not None and self.state.knn_best_of not in ("", self.knn.identity):
            if self.fabric.is_global_zero:
                log.warning("online kNN: other data or settings than before; the best begins anew")
            self.state.knn_best_top1 = 0.0
        self.guard.skipped_in_a_row = self.state.skipped_in_a_row
        self.sharding.restore_optimizer(checkpoint.tensors("optimizer"))
