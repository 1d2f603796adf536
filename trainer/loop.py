"""The training loop: the papers' algorithm 1, watched, and able to stop and go on."""

import logging
from collections.abc import Callable
from enum import Enum

import torch
from lightning_fabric import Fabric

from common import fault_injection
from common.collectives import AgreedFlags
from common.errors import ConfigError, NonFiniteError, NumericalError
from data_pipeline.reading.batch import Batch
from trainer.config import RunConfig
from trainer.models.encoders import seed_stochastic_layers
from trainer.optim.optimizers import apply_update, gradient_norm
from trainer.prepare import join, prepare
from trainer.run import Run, StopAskedError
from trainer.step import RunningStatistics, StepDone

log = logging.getLogger(__name__)

_CPU_FULL = "DefaultCPUAllocator: can't allocate memory"


class Outcome(Enum):
    """How :func:`fit` ended."""

    DONE = "done"
    STOPPED = "stopped"
    """Asked to stop; a checkpoint is on disk."""


def fit(config: RunConfig, stop_requested: Callable[[], bool] = lambda: False) -> Outcome:
    """Train until the run's last step, or until any rank is asked to stop.

    Args:
        config: the run. The same call goes on from the newest checkpoint in ``config.out``.
        stop_requested: polled once a step on every rank; one rank's yes stops all of them at the
            same step, with a checkpoint.

    Raises:
        ConfigError, DataError, CheckpointError: see :func:`trainer.prepare.prepare`; ConfigError
            also where the memory of a device does not suffice.
        NumericalError: too many steps in a row had non-finite gradients, or the projections
            collapsed and the run is to end for it.
        RankLostError: another process of the run ended or went another way.
        OSError: checkpoints could not be written, as often as settings allow; on all ranks.
    """
    rollbacks = config.guard.budget
    with join(config) as fabric:
        while True:
            try:
                return _train(config, fabric, stop_requested)
            except StopAskedError:
                log.info("stopped before an epoch's first step; the same command goes on from here")
                return Outcome.STOPPED
            except NonFiniteError as error:
                if not rollbacks:
                    raise
                rollbacks -= 1
                log.warning("%s; going on from it, %d more times if need be", error, rollbacks)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError) or _CPU_FULL in str(error):
                    raise ConfigError(_does_not_fit(config, error)) from error
                raise


def _does_not_fit(config: RunConfig, error: RuntimeError) -> str:
    """What to do where a device has too little memory; of torch's pages the figures alone."""
    figures = ". ".join(str(error).split(". ")[:2])
    if config.micro_batch:
        smaller = f"a --micro-batch below {config.micro_batch}"
    else:
        smaller = "--micro-batch (the same gradients, in pieces)"
    return (
        f"{figures}. Take {smaller}, --activation-checkpointing or more processes; `widebatch plan "
        f"{config.recipe} --batch {config.batch} --gpu ...` tells what fits"
    )


def _train(config: RunConfig, fabric: Fabric, stop_requested: Callable[[], bool]) -> Outcome:
    """One attempt at the run, from its newest checkpoint on."""
    with prepare(config, fabric) as run:
        if run.is_done():
            log.info("nothing to do: step %d is the run's last", run.state.step)
            return Outcome.DONE
        flags = AgreedFlags(("stop", "collapsed", "save_errno"), run.fabric.device)
        statistics = RunningStatistics(run.objective)
        run.stop_agreed = lambda: _agree(run, flags, stop_requested())
        run.phases.step(run.state.step + 1)
        for batch in run.remaining_batches():
            done = _step(run, statistics, batch)
            run.phases.enter("other")
            for watch in run.watchers:
                watch(done)
            stopping = run.stop_agreed()
            if stopping or run.checkpoint_is_due():
                run.save(finish=stopping or run.is_done())
            run.telemetry.flush_if_due()
            if stopping and not run.is_done():
                log.info("stopped after step %d; the same command goes on from here", done.number)
                return Outcome.STOPPED
            run.phases.step(run.state.step + 1)
        if run.knn_refused is not None:
            raise NumericalError(
                f"the run came to its end, step {run.state.step}, and its last checkpoint is saved,"
                f" but its encoder is of no use: {run.knn_refused}"
            ) from run.knn_refused
        return Outcome.DONE


def _step(run: Run, statistics: RunningStatistics, batch: Batch) -> StepDone:
    """Algorithm 1's step. Where a gradient is not finite nothing changes but the step's number."""
    step = run.state.step
    fault_injection.at("step.start")
    seed_stochastic_layers(run.config.seed, step, run.fabric.global_rank)
    statistics.keep()
    outputs, loss = run.gradients(batch, step)
    run.phases.enter("optimizer")
    norm, lr = gradient_norm(run.optimizer), run.lr_at(step)
    decay, clip = run.weight_decay_at(step), run.config.optim.clip_norm
    skipped = apply_update(run.optimizer, lr, norm, decay, clip, run.steady_lr_at(step))
    run.objective.after_step(outputs, step, run.plan.total_steps, skipped)
    statistics.restore(skipped)
    run.optimizer.zero_grad(set_to_none=True)
    run.state.step = step + 1
    return StepDone(step + 1, batch, outputs, loss, lr, norm, skipped)


def _agree(run: Run, flags: AgreedFlags, stop: bool) -> bool:
    """Whether any rank is asked to stop.

    Raises:
        NumericalError, OSError: what one rank found, which ends the run, on all.
    """
    flags.post(stop=stop, collapsed=run.collapse.stops, save_errno=run.saver.failure())
    agreed = flags.read()
    run.saver.raise_if_failing(int(agreed["save_errno"]))
    if agreed["collapsed"]:
        raise NumericalError(run.collapse.reason())
    return bool(agreed["stop"])
