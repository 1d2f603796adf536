"""What a run says of itself before its first step: in its folder, and to who watches."""

import logging

from common.files.atomic_file import write_atomically
from common.files.strict_json import dump_json
from trainer.config import absolute, to_json
from trainer.models.encoders import stochastic_layers
from trainer.run import Run
from trainer.state.provenance import versions
from trainer.state.run_readme import write_readme

log = logging.getLogger(__name__)


def announce(run: Run, resumed: bool) -> None:
    """Write config.json and README.md, and say before the first step what the run comes to."""
    info, made_with = run.loader.info, versions()
    facts = {
        "num_samples": run.plan.num_samples,
        "data_fingerprint": info.fingerprint,
        "data_identity": info.identity,
        "test_identity": run.knn.test.identity if run.knn is not None else None,
        "class_names": list(info.class_names),
        "steps_per_epoch": run.plan.steps_per_epoch,
        "total_steps": run.plan.total_steps,
        "warmup_steps": run.plan.warmup_steps,
        "peak_lr": run.plan.peak_lr,
        "world_size": run.plan.world_size,
        "versions": made_with,
    }
    text = dump_json({**to_json(absolute(run.config)), "run": facts}, indent=1) + "\n"
    write_atomically(run.config.out / "config.json", text.encode(), private=True)
    write_readme(run.config, run.plan, run.fabric.device, made_with, run.state.step)
    for line in run.plan.lines():
        log.info("%s", line)
    log.info(
        "run       %s on %s, %s, %s",
        run.config.out,
        run.fabric.device,
        run.config.precision,
        run.config.strategy.name if run.plan.world_size > 1 else "one process",
    )
    for caveat in (*run.plan.caveats(), *run.objective.caveats(run.config.sync_batch_norm)):
        log.warning("%s", caveat)
    if run.config.micro_batch and run.config.micro_batch_norm == "piece":
        log.warning(
            "BatchNorm statistics are those of a piece: another number of processes gives another"
            " run (--micro-batch-norm exact)"
        )
    random_layers = stochastic_layers(run.objective)
    if random_layers:
        log.warning(
            "%s and %d more draw their own random numbers: a resume is exact, but another number of"
            " processes gives another run",
            random_layers[0],
            len(random_layers) - 1,
        )
    if run.config.compile:
        log.info("compile   the first step compiles the encoder, which takes minutes (--compile)")
    if resumed:
        log.info("resumed   after step %d of %d", run.state.step, run.plan.total_steps)
