"""What a run says of itself before its first step: in its folder, and to who watches.

RUN/README.md tells what lies in the folder, how to go on with it, and what it was made with. The
command is put together from the configuration. Neither the command line that was typed nor any
environment variable is written down: they may hold secrets, the configuration does not.
"""

import importlib.metadata
import inspect
import logging
import os
import platform
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

import jinja2
import torch

from common.files.atomic_file import as_utf8, write_atomically
from common.files.strict_json import dump_json
from trainer.config import RunConfig, RunPlan, absolute, to_json
from trainer.models.encoders import is_torchvisions, stochastic_layers
from trainer.models.timm_encoder import is_timms
from trainer.recipes import RECIPES
from trainer.run import Run
from trainer.state.provenance import versions
from trainer.state.settings import changed, changed_from, settings

log = logging.getLogger(__name__)

_ALWAYS = ("data.train", "out")  # in the command, whatever the recipe says

_TEMPLATES = jinja2.Environment(  # noqa: S701  # Markdown, where nothing is to be escaped
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters["cell"] = lambda text: f"`{text}`".replace("|", "\\|")


def announce(run: Run, resumed: bool) -> None:
    """Write config.json and README.md, and say before the first step what the run comes to."""
    info, made_with = run.data.info, versions()
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
    text = readme(run.config, run.plan, run.fabric.device, made_with, run.state.step)
    write_readme(run.config.out, text)
    for line in run.plan.lines():
        log.info("%s", line)
    log.info(
        "run       %s on %s, %s, %s",
        run.config.out,
        run.fabric.device,
        run.config.precision,
        run.config.strategy.name if run.plan.world_size > 1 else "one process",
    )
    for caveat in _caveats(run):
        log.warning("%s", caveat)
    if run.config.compile:
        log.info("compile   the first step compiles the encoder, which takes minutes (--compile)")
    if resumed:
        log.info("resumed   after step %d of %d", run.state.step, run.plan.total_steps)


def _caveats(run: Run) -> Iterator[str]:
    """What keeps this run from being the same on another number of processes, or else odd."""
    yield from run.plan.caveats()
    yield from run.objective.caveats(run.config.sync_batch_norm)
    if run.config.micro_batch and run.config.micro_batch_norm == "piece":
        yield (
            "BatchNorm statistics are those of a piece: another number of processes gives another"
            " run (--micro-batch-norm exact)"
        )
    if random_layers := stochastic_layers(run.objective):
        yield (
            f"{random_layers[0]} and {len(random_layers) - 1} more draw their own random numbers: a"
            " resume is exact, but another number of processes gives another run"
        )


def write_readme(out: Path, text: str) -> None:
    """Write or replace ``out / "README.md"``. Rank 0 alone does; a full disk is no error."""
    path = out / "README.md"
    try:
        write_atomically(path, as_utf8(text), private=True)
    except OSError as error:  # nobody stops a run for its description
        log.warning("%s: cannot be written (%s)", path, error.strerror)


def readme(
    config: RunConfig,
    plan: RunPlan,
    device: torch.device,
    made_with: Mapping[str, str | None],
    steps_done: int,
) -> str:
    """The text of a run's README.md, by the template ``run_readme.md`` beside this file.

    Args:
        config: of the run.
        plan: what it came to.
        device: that rank 0 computes on.
        made_with: see :func:`trainer.state.provenance.versions`.
        steps_done: where this start of the run goes on.
    """
    words, out = command(config), shlex.quote(str(config.out.absolute()))
    recipe = RECIPES.get(config.recipe)
    commit = made_with.get("commit") or "none: this is no checkout"
    return _TEMPLATES.get_template("run_readme.md").render(
        config=config,
        plan=plan,
        made_with=made_with,
        steps_done=steps_done,
        out=out,
        command=shlex.join(words) if words else "",
        commands_after=next_commands(config, out),
        changes=changed(to_json(config)),
        about=inspect.cleandoc(recipe.__doc__ or "").partition("\n")[0] if recipe else "",
        commit=commit.replace("+changes", ", with changes that are not committed"),
        system=f"{platform.system()} {platform.machine()}",
        device=_device(device),
        job=os.environ.get("SLURM_JOB_ID", ""),
        packages=list(_packages()),
    )


def command(config: RunConfig) -> list[str] | None:
    """Words that start this run, or go on with it; None where no recipe leads to it."""
    if config.recipe not in RECIPES:
        return None
    base, config = RECIPES[config.recipe](), absolute(config)
    if type(base.objective) is not type(config.objective):
        return None
    chosen = [s for s in settings(config) if s.key in _ALWAYS]
    # How one start deals with an earlier run is no setting of the next.
    chosen += [s for s in changed_from(base, config) if s.key not in (*_ALWAYS, "resume")]
    words = [word for setting in chosen for word in setting.words()]
    return ["widebatch", "pretrain", config.recipe, *words]


def next_commands(config: RunConfig, out: str, program: str = "widebatch") -> list[str]:
    """What to do with a run when it has ended: measure it, look at it, hand it on.

    Args:
        config: of the run.
        out: its folder, as a shell takes it.
        program: how a shell finds this one.
    """
    method = "linear" if config.data.test else "diagnose"  # the second needs no labels
    of_timm = is_timms(config.encoder.name)
    known = of_timm or is_torchvisions(config.encoder.name)
    library = "timm" if of_timm else "torchvision"
    to, suffix = (library, "safetensors") if known else ("torch-export", "pt2")
    return [
        f"{program} evaluate {method} {out}",
        f"{program} report {out}",
        f"{program} export {out} --format {to} --out {out}/encoder.{suffix}",
    ]


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"CPU, {os.cpu_count()} threads"


def _packages() -> Iterator[str]:
    """Names and versions of what Widebatch needs to run."""
    needs = importlib.metadata.requires("widebatch") or []
    for name in (re.split(r"[^\w.-]", need)[0] for need in needs if "extra ==" not in need):
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{name} missing"
