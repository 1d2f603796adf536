"""Everything a run needs before its first step, put together in one place.

:func:`prepare` is the only way to make a :class:`Run`: it joins the process group, checks the
settings against the data, builds model and loader, and restores the newest checkpoint. What can be
refused is refused here, on every rank, before anything is written.
"""

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from data_pipeline.augment import Augment
from data_pipeline.beton import check_beton
from data_pipeline.loader import TrainLoader, train_loader
from data_pipeline.order import Position
from trainer.checkpoint import (
    Checkpoint,
    CheckpointStore,
    optimizer_tensors,
    restore_optimizer,
)
from trainer.config import RunConfig, RunPlan, differences, plan_run, to_json
from trainer.distributed import broadcast_json, shutdown
from trainer.encoders import build_encoder
from trainer.errors import CheckpointError, ConfigError
from trainer.guard import NumericalGuard
from trainer.heads import build_head
from trainer.objectives.simclr import SimCLR
from trainer.online_knn import OnlineKnn
from trainer.optim import build_optimizer
from trainer.provenance import versions
from trainer.samples import SampleLog
from trainer.schedule import lr_factor
from trainer.strategy import launch_fabric
from trainer.sync_batch_norm import convert_sync_batch_norm
from trainer.telemetry import (
    JsonLines,
    LogLines,
    ProgressBar,
    Prometheus,
    Reader,
    Telemetry,
    TensorBoard,
)

log = logging.getLogger(__name__)

_COMPUTE_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass
class TrainState:
    """What changes while a run goes on, beside weights and optimizer; saved as JSON."""

    step: int = 0
    """Optimizer steps done."""
    skipped_in_a_row: int = 0
    """Newest steps in a row that were left out for non-finite gradients."""
    knn_best_top1: float = 0.0
    """Best online kNN accuracy so far, 0 to 1."""

    def position(self, plan: RunPlan) -> Position:
        """Where in the data the next step stands."""
        epoch, step = divmod(self.step, plan.steps_per_epoch)
        return Position(epoch, step)


@dataclass
class Run:
    """A run ready for its next step."""

    config: RunConfig
    plan: RunPlan
    fabric: Fabric
    loader: TrainLoader
    augment: Augment
    objective: SimCLR
    model: nn.Module
    """``objective`` as Fabric wraps it: autocast, and gradients averaged over ranks."""
    optimizer: torch.optim.Optimizer
    store: CheckpointStore
    telemetry: Telemetry
    knn: OnlineKnn | None
    samples: SampleLog | None
    guard: NumericalGuard
    state: TrainState = field(default_factory=TrainState)
    _waited_before: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of the forward pass."""
        return _COMPUTE_DTYPE[self.config.precision]

    def waited(self) -> float:
        """Seconds that this process waited for the loader since the last call."""
        total = self.loader.wait_seconds
        waited, self._waited_before = total - self._waited_before, total
        return round(waited, 6)

    def lr_at(self, step: int) -> float:
        """Learning rate of the ``step``-th update, from 0."""
        return self.plan.peak_lr * lr_factor(
            self.config.schedule, step, self.plan.steps_per_epoch, self.plan.total_steps
        )

    def ends_epoch(self) -> bool:
        """Whether the step just done was its epoch's last."""
        return self.state.step % self.plan.steps_per_epoch == 0

    def is_done(self) -> bool:
        """Whether no step is left."""
        return self.state.step >= self.plan.total_steps

    def _epoch_interval(self, interval: int) -> bool:
        epochs_done = self.state.step // self.plan.steps_per_epoch
        return interval > 0 and self.ends_epoch() and epochs_done % interval == 0

    def evaluation_is_due(self) -> bool:
        """Whether the online kNN belongs to the step just done."""
        if self.knn is None or not self.config.knn.every_epochs:
            return False
        return self.is_done() or self._epoch_interval(self.config.knn.every_epochs)

    def checkpoint_is_due(self) -> bool:
        """Whether a checkpoint belongs to the step just done."""
        every = self.config.checkpoint.every_steps
        return (
            self.is_done()
            or self._epoch_interval(self.config.checkpoint.every_epochs)
            or (every > 0 and self.state.step % every == 0)
        )

    def evaluate(self) -> None:
        """Online kNN on all ranks, into the newest step's record; the best one is kept."""
        if self.knn is None:
            return
        with self.telemetry.pause():
            result = self.knn.evaluate(
                self.objective.encoder, self.augment, self.fabric.device, self.dtype
            )
        is_best = result["knn_top1"] > self.state.knn_best_top1
        self.state.knn_best_top1 = max(self.state.knn_best_top1, result["knn_top1"])
        self.telemetry.annotate(**result, knn_best_top1=self.state.knn_best_top1)
        if is_best:
            self.save()
            if self.fabric.is_global_zero:
                self.store.mark_best(self.state.step, **result)

    def save(self) -> None:
        """Write a checkpoint of the step just done. All ranks return when it is on disk."""
        self.telemetry.flush()
        self.state.skipped_in_a_row = self.guard.skipped_in_a_row
        with self.telemetry.pause():
            if self.fabric.is_global_zero:
                self.store.save(
                    {
                        **asdict(self.state),
                        "epoch": self.state.step / self.plan.steps_per_epoch,
                        "data_fingerprint": self.loader.info.fingerprint,
                        "world_size": self.plan.world_size,
                    },
                    {
                        "model": dict(self.objective.state_dict()),
                        "optimizer": optimizer_tensors(self.objective, self.optimizer),
                    },
                )
            self.fabric.barrier()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from ``checkpoint``; every rank reads it."""
        self.state = TrainState(
            **{key: checkpoint.state[key] for key in asdict(self.state) if key in checkpoint.state}
        )
        self.guard.skipped_in_a_row = self.state.skipped_in_a_row
        restore_optimizer(self.objective, self.optimizer, checkpoint.tensors("optimizer"))


@contextlib.contextmanager
def prepare(config: RunConfig) -> Iterator[Run]:
    """Join the process group and build the run; leave everything closed behind.

    Raises:
        ConfigError: settings contradict each other, the data or the folder's earlier run.
        DataError: a data file is damaged.
        CheckpointError: the folder holds a run, but no whole checkpoint.
    """
    fabric = launch_fabric(config.device, config.precision)
    with contextlib.ExitStack() as stack:
        models: list[nn.Module] = []
        stack.callback(lambda: shutdown(*models))
        if fabric.is_global_zero:
            stack.enter_context(_exclusive(config.out))
        plan = plan_run(config, check_beton(config.data.train).num_samples, fabric.world_size)
        loader = train_loader(
            config.data.train,
            config.crop,
            config.loader,
            views=SimCLR.views,
            seed=config.seed,
            batch_size=config.batch,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
            device=fabric.device,
        )
        stack.callback(loader.close)
        store = CheckpointStore(config.out / "checkpoints", config.checkpoint.keep)
        checkpoint = _agreed_checkpoint(config, fabric, store, loader.info.fingerprint)
        run = _build(config, plan, fabric, loader, store, checkpoint)
        models.append(run.model)
        stack.callback(run.telemetry.close)
        if run.knn is not None:
            stack.callback(run.knn.close)
        if run.samples is not None:
            stack.callback(run.samples.close)
        _settle_gradient_buckets(run)
        if fabric.is_global_zero:
            _describe(run, resumed=checkpoint is not None)
        yield run


def _build(
    config: RunConfig,
    plan: RunPlan,
    fabric: Fabric,
    loader: TrainLoader,
    store: CheckpointStore,
    checkpoint: Checkpoint | None,
) -> Run:
    objective = build_objective(config)
    # On one process too, for the same rounding; bf16's own is coarser than what that would save.
    if config.sync_batch_norm and (fabric.world_size > 1 or config.precision != "bf16"):
        convert_sync_batch_norm(objective, group_size=config.batch_norm_group)
    if checkpoint is not None:
        objective.load_state_dict(checkpoint.tensors("model"))
    objective = objective.to(memory_format=torch.channels_last)
    model = fabric.setup_module(objective)
    knn = None
    if config.data.test is not None and config.knn.every_epochs:
        knn = OnlineKnn(
            config.knn,
            config.data.train,
            config.data.test,
            config.crop.size,
            config.loader,
            fabric.global_rank,
            fabric.world_size,
        )
    done = int(checkpoint.state["step"]) if checkpoint else 0
    rank_zero = fabric.is_global_zero
    samples_path = config.out / "samples.jsonl"
    guard = NumericalGuard(config.max_skipped_steps)
    readers: list[Reader] = [guard]
    if rank_zero:
        readers += _readers(config, plan, done)
    run = Run(
        config=config,
        plan=plan,
        fabric=fabric,
        loader=loader,
        augment=Augment(config.augment, config.seed, _COMPUTE_DTYPE[config.precision]),
        objective=objective,
        model=model,
        optimizer=build_optimizer(objective, config.optim),
        store=store,
        telemetry=Telemetry(config.telemetry, plan.global_batch, readers),
        knn=knn,
        samples=SampleLog(samples_path if rank_zero else None, done)
        if config.log_samples
        else None,
        guard=guard,
    )
    if checkpoint is not None:
        run.restore(checkpoint)
    return run


def build_objective(config: RunConfig) -> SimCLR:
    """Encoder and head with the initial weights that the seed decides, on any world size."""
    torch.manual_seed(config.seed)
    encoder = build_encoder(config.encoder)
    return SimCLR(encoder, build_head(config.head, encoder.feature_dim), config.objective)


def _readers(config: RunConfig, plan: RunPlan, done: int) -> list[Reader]:
    watch = config.telemetry
    readers: list[Reader] = [JsonLines(config.out / "metrics.jsonl", keep_up_to=done)]
    if os.isatty(2):
        readers.append(ProgressBar(plan.total_steps, done))
    else:
        readers.append(LogLines(plan.total_steps, watch.log_seconds))
    if watch.tensorboard:
        readers.append(TensorBoard(config.out / "tensorboard", done))
    if watch.prometheus_port:
        readers.append(Prometheus(watch.prometheus_host, watch.prometheus_port))
    return readers


@contextlib.contextmanager
def _exclusive(out: Path) -> Iterator[None]:
    """Hold the run's folder: two runs that write one folder would ruin both."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: exists and is no folder")
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"--out {out}: another process is training there; stop it or choose another folder"
            ) from None
        yield
    finally:
        os.close(descriptor)


def _agreed_checkpoint(
    config: RunConfig, fabric: Fabric, store: CheckpointStore, fingerprint: str
) -> Checkpoint | None:
    """The checkpoint to go on from. Rank 0 decides for all, so that no rank starts elsewhere."""
    verdict: dict[str, Any] = {}
    if fabric.is_global_zero:
        try:
            _check_same_run(config)
            found = store.newest()
            if found is not None:
                _check_same_data(config, found, fingerprint)
                _check_may_resume(config)
            verdict = {"step": found.step if found else None}
        except CheckpointError as error:
            verdict = {"checkpoint_error": str(error)}
        except ConfigError as error:
            verdict = {"config_error": str(error)}
    verdict = broadcast_json(verdict)
    if "checkpoint_error" in verdict:
        raise CheckpointError(verdict["checkpoint_error"])
    if "config_error" in verdict:
        raise ConfigError(verdict["config_error"])
    return None if verdict["step"] is None else store.read(verdict["step"])


def _check_may_resume(config: RunConfig) -> None:
    if config.resume == "never":
        raise ConfigError(
            f"--out {config.out}: holds a run already and --resume never is set;"
            " choose another folder or leave --resume out"
        )


def _check_same_run(config: RunConfig) -> None:
    path = config.out / "config.json"
    if config.resume == "force" or not path.exists():
        return
    try:
        saved = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: unreadable ({error}); delete it to go on") from None
    saved.pop("run", None)
    changed = differences(saved, to_json(config))
    if changed:
        raise ConfigError(
            f"--out {config.out}: holds a run with other settings ({'; '.join(changed)});"
            " choose another folder, or --resume force to go on with the new ones"
        )


def _check_same_data(config: RunConfig, found: Checkpoint, fingerprint: str) -> None:
    saved = found.state.get("data_fingerprint")
    if saved != fingerprint and config.resume != "force":
        raise ConfigError(
            f"{config.data.train}: is not the data that {found.path} was trained on (fingerprint"
            f" {fingerprint[:12]}, then {str(saved)[:12]}); --resume force goes on with it anyway"
        )


def _settle_gradient_buckets(run: Run) -> None:
    """Make DDP lay out its gradient buckets before the first step counts.

    DDP rebuilds its buckets once, after its first backward pass, in the order in which gradients
    arrived. The place of a gradient in a bucket decides in which order ranks' values are added, so
    without this a resumed run's first step would round differently from the same step of a run
    that was never stopped. One pass over zeros, whose gradients are dropped, moves that rebuild to
    before step 1 in both.
    """
    if run.fabric.world_size == 1:
        return
    buffers = {name: buffer.clone() for name, buffer in run.objective.named_buffers()}
    side = run.config.crop.size
    blank = torch.zeros(
        SimCLR.views * run.plan.local_batch,
        3,
        side,
        side,
        dtype=run.augment.dtype,
        device=run.fabric.device,
    ).to(memory_format=torch.channels_last)
    for _ in range(2):  # the rebuild happens at the forward pass after the first backward pass
        run.fabric.backward(run.model(blank).sum())
        run.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, buffer in run.objective.named_buffers():
            buffer.copy_(buffers[name])


def _describe(run: Run, resumed: bool) -> None:
    """Write config.json and say before the first step what the run comes to."""
    info = run.loader.info
    facts = {
        "num_samples": run.plan.num_samples,
        "data_fingerprint": info.fingerprint,
        "class_names": list(info.class_names),
        "steps_per_epoch": run.plan.steps_per_epoch,
        "total_steps": run.plan.total_steps,
        "warmup_steps": run.plan.warmup_steps,
        "peak_lr": run.plan.peak_lr,
        "versions": versions(),
    }
    path = run.config.out / "config.json"
    temporary = path.with_name(".writing-config.json")
    temporary.write_text(json.dumps({**to_json(run.config), "run": facts}, indent=1) + "\n")
    temporary.chmod(0o600)
    temporary.replace(path)
    for line in run.plan.lines():
        log.info("%s", line)
    log.info("run       %s on %s, %s", run.config.out, run.fabric.device, run.config.precision)
    if run.plan.warmup_steps >= run.plan.total_steps:
        log.warning(
            "the run ends within its warm-up of %d steps; see --schedule.warmup-epochs",
            run.plan.warmup_steps,
        )
    if resumed:
        log.info("resumed   after step %d of %d", run.state.step, run.plan.total_steps)
