"""Everything a run needs before its first step, put together in one place.

:func:`prepare` is the only way to make a :class:`~trainer.run.Run`: it joins the process group,
checks the settings against the data, builds model and loader, and restores the newest checkpoint.
What can be refused is refused here, on every rank, before anything is written.
"""

import contextlib
import logging
import os
from collections.abc import Iterator

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import fault_injection
from common.collectives import observe
from common.errors import ConfigError
from common.rendezvous import release, shutdown
from data_pipeline.augment import Augment
from data_pipeline.reading.beton import sample_count
from data_pipeline.reading.loader import TrainLoader
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.pool import LoaderConfig
from trainer.config import RunConfig, RunPlan, plan_run, refuse_unsupported
from trainer.features.online_knn import OnlineKnn
from trainer.health.collapse import CollapseAlarm
from trainer.health.damaged_samples import SubstituteLog
from trainer.health.non_finite import NumericalGuard
from trainer.health.phases import Phases
from trainer.health.stragglers import Stragglers
from trainer.health.watchdog import Watchdog
from trainer.models.encoders import build_encoder, seed_stochastic_layers
from trainer.objectives.base import blank_inputs
from trainer.parallel.machine import settle_threads, settled
from trainer.parallel.networks import training_objective
from trainer.parallel.sharding import Sharding
from trainer.parallel.strategy import launch_fabric, lay_out
from trainer.run import COMPUTE_DTYPE, Run
from trainer.state.announce import announce
from trainer.state.checkpoint import Checkpoint, CheckpointSaver, CheckpointStore
from trainer.state.run_folder import agreed_checkpoint, data_stamp, exclusive
from trainer.step import Gradients, InPieces, WholeBatch
from trainer.telemetry import JsonLines, LogLines, ProgressBar, Reader, Telemetry, TensorBoard
from trainer.telemetry.prometheus import Prometheus, RunFacts
from trainer.telemetry.scrape_targets import scraped
from trainer.telemetry.wandb_reader import WeightsAndBiases, refuse_missing

log = logging.getLogger(__name__)


@contextlib.contextmanager
def join(config: RunConfig) -> Iterator[Fabric]:
    """Join the process group that ``config`` runs on; leave it in the end.

    Raises:
        ConfigError: settings do not go together or with the data; a GPU or a library is missing.
        DataError: the data is no .beton.
    """
    refuse_missing(config.telemetry)
    refuse_unsupported(config)
    samples = sum(map(sample_count, config.data.train))
    plan_run(config, samples, int(os.environ.get("WORLD_SIZE", "1")))
    if ":" not in config.encoder.name:  # a model of the user's may not go without memory
        with torch.device("meta"):
            build_encoder(config.encoder)
    fabric = launch_fabric(
        config.device, config.precision, config.strategy, config.watchdog.join_timeout
    )
    with contextlib.ExitStack() as stack:
        stack.callback(shutdown)
        fault_injection.arm_from(os.environ, fabric.global_rank)
        yield fabric


@contextlib.contextmanager
def prepare(config: RunConfig, joined: Fabric | None = None) -> Iterator[Run]:
    """Build the run; leave everything closed behind.

    Args:
        config: the run.
        joined: of :func:`join`, which this does itself otherwise. A process group can be joined
            once, and serves several attempts at the run.

    Raises:
        ConfigError: settings contradict each other, the data or the folder's earlier run.
        DataError: a data file is damaged.
        CheckpointError: the folder holds a run, but no whole checkpoint.
        RankLostError: another process of the run ended or went another way.
    """
    with contextlib.ExitStack() as stack:
        fabric = joined or stack.enter_context(join(config))
        config = settled(config, fabric)
        models: list[nn.Module] = []
        stack.callback(lambda: release(*models))
        reading = settle_threads(config.loader, fabric.device)
        data = OpenData(config.data.train, config.data.max_substitutes)
        plan = plan_run(config, data.info.num_samples, fabric.world_size)
        if fabric.is_global_zero:
            stack.enter_context(exclusive(config.out))
        loader = _loader(config, data, reading, fabric)
        stack.callback(loader.close)
        store = CheckpointStore(config.out / "checkpoints", config.checkpoint.keep)
        checkpoint = agreed_checkpoint(config, plan, fabric, store, data)
        phases = stack.enter_context(_watched(config, fabric))
        saver = CheckpointSaver(store, config.checkpoint, fabric.is_global_zero)
        stack.callback(saver.close)
        facts = RunFacts(
            name=config.out.resolve().name,
            recipe=config.recipe,
            total_steps=plan.total_steps,
            global_batch=plan.global_batch,
            world_size=plan.world_size,
            steps_done=checkpoint.step if checkpoint else 0,
        )
        endpoint = stack.enter_context(scraped(config.telemetry, facts, config.out, fabric))
        run = _build(config, plan, fabric, loader, saver, phases, checkpoint, endpoint, stack)
        models.append(run.model)
        _settle_gradient_buckets(run)
        if fabric.is_global_zero and not run.is_done():
            announce(run, resumed=checkpoint is not None)
        yield run


def _loader(
    config: RunConfig, data: OpenData, reading: LoaderConfig, fabric: Fabric
) -> TrainLoader:
    return TrainLoader(
        data,
        config.view_plan(),
        reading,
        seed=config.seed,
        batch_size=config.batch,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        device=fabric.device,
    )


@contextlib.contextmanager
def _watched(config: RunConfig, fabric: Fabric) -> Iterator[Phases]:
    """Have this process's main thread watched; where it is, the phases say."""
    phases = Phases(fabric.device, timed=config.straggler.factor > 0)
    watchdog = Watchdog(
        config.watchdog,
        phases,
        config.out,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        speaks=fabric.local_rank == 0,
    )
    observe(phases)
    try:
        with watchdog.watching():
            yield phases
    finally:
        observe(None)


def _build(
    config: RunConfig,
    plan: RunPlan,
    fabric: Fabric,
    loader: TrainLoader,
    saver: CheckpointSaver,
    phases: Phases,
    checkpoint: Checkpoint | None,
    endpoint: Prometheus | None,
    stack: contextlib.ExitStack,
) -> Run:
    objective = training_objective(
        config,
        fabric.world_size,
        config.init_from if checkpoint is None else None,
        plan.num_samples,
        loader.data.num_classes,
    )
    if config.precision == "fp64":
        objective.double()  # before it takes a checkpoint's values, which float32 would round
    if checkpoint is not None:
        try:
            objective.load_state_dict(checkpoint.tensors("model"))
        except RuntimeError as error:
            first = str(error).splitlines()[1:2] or [str(error)]
            raise ConfigError(
                f"{checkpoint.path}: does not fit these settings and data ({first[0].strip()});"
                " what is kept of each sample goes on with the same files in the same order alone"
            ) from None
    sharding = lay_out(config.strategy, fabric, objective, config.encoder, config.optim)
    if _has_gradient_buckets(sharding.model):
        phases.watch_gradients(objective)
    augment = Augment(
        config.augment,
        config.seed,
        COMPUTE_DTYPE[config.precision],
        looks=[group.looks for group in config.view_plan()],
    )
    run = Run(
        config=config,
        plan=plan,
        fabric=fabric,
        data=loader.data,
        loader=loader,
        augment=augment,
        objective=objective,
        sharding=sharding,
        gradients=_gradients(config, plan, fabric, sharding, augment, phases),
        saver=saver,
        data_stamp=data_stamp(config.data.train),
        telemetry=Telemetry(config.telemetry, plan.global_batch, clock=phases.clock),
        knn=_online_knn(config, loader, fabric, stack),
        guard=NumericalGuard(
            config.max_skipped_steps,
            lambda step: run.sample_ids(step),
            config.out if fabric.is_global_zero else None,
            checkpoint.step if checkpoint else 0,
        ),
        collapse=CollapseAlarm(config.collapse, judges=fabric.is_global_zero),
        phases=phases,
    )
    if checkpoint is not None:
        run.restore(checkpoint)
    stack.callback(run.telemetry.close)
    _watch(run, endpoint, stack)
    return run


def _online_knn(
    config: RunConfig, loader: TrainLoader, fabric: Fabric, stack: contextlib.ExitStack
) -> OnlineKnn | None:
    if not config.data.test or not config.knn.every_epochs:
        return None
    knn = OnlineKnn(
        config.knn,
        loader.data,
        OpenData(config.data.test, config.data.max_substitutes),
        config.crop.size,
        loader.config,
        fabric.global_rank,
        fabric.world_size,
    )
    stack.callback(knn.close)
    return knn


def _watch(run: Run, endpoint: Prometheus | None, stack: contextlib.ExitStack) -> None:
    """Set up who looks at a step, and who reads the records that come of them."""
    config, done, rank_zero = run.config, run.state.step, run.fabric.is_global_zero
    stragglers = Stragglers(config.straggler, run.phases, run.fabric.device, speaks=rank_zero)
    substitutes = SubstituteLog(
        run.data,
        config.out,
        writes=rank_zero,
        steps_done=done,
    )
    readers = run.telemetry.readers
    readers.append(run.collapse)
    if rank_zero:
        total, seconds = run.plan.total_steps, config.telemetry.log_seconds
        shown = ProgressBar(total, done) if os.isatty(2) else LogLines(total, seconds, done)
        readers += [*_writers(config, done), shown]
    if endpoint is not None:
        endpoint.clock = run.phases.clock
        endpoint.collapsed = lambda: run.collapse.alarm
        stragglers.show = endpoint.show_ranks
        readers.append(endpoint)
    # After those that write: the records of the steps that end a run are on disk then.
    readers += [run.guard, substitutes, stragglers]
    run.watchers = [
        run.record,
        lambda step: run.collapse.measure(run.objective.embedding(step.outputs), step.number),
        lambda step: substitutes.step(step.number, step.batch),
    ]
    if config.log_samples:
        if rank_zero:
            run.samples = JsonLines(config.out / "samples.jsonl", keep_up_to=done)
            stack.callback(run.samples.close)
        run.watchers.append(run.log_samples)
    run.watchers.append(run.evaluate_if_due)


def _gradients(
    config: RunConfig,
    plan: RunPlan,
    fabric: Fabric,
    sharding: Sharding,
    augment: Augment,
    phases: Phases,
) -> Gradients:
    parts = (fabric, sharding.objective, sharding.model, augment, phases.enter)
    if not 0 < config.micro_batch < plan.local_batch:
        return WholeBatch(*parts)
    return InPieces(
        *parts,
        size=config.micro_batch,
        norm=config.micro_batch_norm,
        reseed=lambda step, piece: seed_stochastic_layers(
            config.seed, step, fabric.global_rank, piece
        ),
    )


def _writers(config: RunConfig, done: int) -> list[Reader]:
    watch = config.telemetry
    readers: list[Reader] = [JsonLines(config.out / "metrics.jsonl", keep_up_to=done)]
    if watch.tensorboard:
        readers.append(TensorBoard(config.out / "tensorboard", done))
    if watch.wandb is not None:
        readers.append(WeightsAndBiases(watch.wandb, config.out))
    return readers


def _has_gradient_buckets(model: nn.Module) -> bool:
    return any(isinstance(part, DistributedDataParallel) for part in model.modules())


def _settle_gradient_buckets(run: Run) -> None:
    """Make DDP lay out its gradient buckets before the first step counts.

    DDP rebuilds its buckets once, after its first backward pass, in the order in which gradients
    arrived. The place of a gradient in a bucket decides in which order ranks' values are added, so
    without this a resumed run's first step would round differently from the same step of a run
    that was never stopped. One pass over zeros, whose gradients are dropped, moves that rebuild to
    before step 1 in both.
    """
    if not _has_gradient_buckets(run.model):
        return
    buffers = {name: buffer.clone() for name, buffer in run.objective.named_buffers()}
    views, images = run.config.view_plan(), run.plan.local_batch
    inputs = blank_inputs(views, images, run.augment.dtype, run.fabric.device)
    for _ in range(2):  # the rebuild happens at the forward pass after the first backward pass
        rows = run.model(inputs).rows.values()
        run.fabric.backward(torch.stack([each.sum() for each in rows]).sum())
        run.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, buffer in run.objective.named_buffers():
            buffer.copy_(buffers[name])
