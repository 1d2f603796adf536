"""``widebatch pretrain RECIPE``: settings from a recipe and the command line, then the trainer."""

import logging
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import ConfigError
from launch import cluster, devices, restarts
from launch.arguments import Parser
from launch.exit_codes import ExitCode, exit_code_for
from launch.preemption import EndAtOnce, StopSignal
from launch.settings_arguments import check_recipe, parse_settings, recipes, refuse_unknown

if TYPE_CHECKING:
    from trainer.config import RunConfig

log = logging.getLogger(__name__)

_USAGE = """\
usage: widebatch pretrain RECIPE --data.train FILE.beton ... [--batch N] [--out RUN] [settings]

Pretrain an encoder. The same command goes on from the newest checkpoint in RUN.

recipes:
{recipes}

every setting of a recipe with its unit and default:
  widebatch pretrain RECIPE --help

several processes (the numbers do not depend on how many):
  widebatch pretrain RECIPE --devices 8 ...
  sbatch slurm/simclr_r50.sh ...
"""


def main(arguments: Sequence[str]) -> ExitCode:
    """Run the command; ``arguments`` are those after ``pretrain``."""
    recipe = arguments[0] if arguments else "--help"
    if recipe in ("-h", "--help"):
        width = max(map(len, recipes()))
        rows = (f"  {name:<{width}}  {what}" for name, what in recipes().items())
        print(_USAGE.format(recipes="\n".join(rows)), end="")
        return ExitCode.DONE if arguments else ExitCode.USAGE
    check_recipe(recipe)
    overrides = list(arguments[1:])
    if not {"-h", "--help"}.isdisjoint(overrides):
        with EndAtOnce():
            _settings(recipe, overrides)  # answers, and leaves by SystemExit
    try:
        with StopSignal() as stop:  # before the slow imports: a signal during them is not lost
            return _run(recipe, overrides, stop)
    except KeyboardInterrupt:  # a signal that was waiting for this, or came before the settings
        return ExitCode.PREEMPTED


def _run(recipe: str, overrides: list[str], stop: StopSignal) -> ExitCode:
    cluster.take_place()
    hopeless = restarts.refuse_hopeless()
    if hopeless is not None:
        log.warning("the attempt before ended with %d: not trying again", hopeless)
        return hopeless
    try:
        code = _train(recipe, overrides, stop)
    except KeyboardInterrupt:
        code = ExitCode.PREEMPTED  # the signal came before the first step, and has been told
    except SystemExit:  # tyro has said what is wrong
        restarts.record(ExitCode.USAGE)
        raise
    except BaseException as error:
        restarts.record(exit_code_for(error))
        raise
    restarts.record(code)
    if code is ExitCode.PREEMPTED and restarts.script_decides():
        return ExitCode.DONE  # a failing task would have srun -K kill the others as they leave
    return code


def _train(recipe: str, overrides: list[str], stop: StopSignal) -> ExitCode:
    config = _settings(recipe, overrides)
    from trainer.loop import Outcome, fit  # Fabric takes seconds: after --help and wrong settings

    if fit(config, stop) is not Outcome.DONE:
        return ExitCode.PREEMPTED
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(_conclusion(config)))
    return ExitCode.DONE


def _conclusion(config: "RunConfig") -> list[str]:
    """What came of a run that has ended, and what to do with it, as a shell takes it."""
    from trainer.state.announce import next_commands
    from trainer.state.run_list import read_run

    facts, out = read_run(config.out), shlex.quote(str(config.out))
    if facts.step is None:
        return [f"done, but {config.out} is {facts.state}: {facts.why}"]
    lines = [
        f"done      step {facts.step} of {facts.total_steps}",
        f"saved     {config.out / 'checkpoints' / f'step-{facts.step:08d}'}",
    ]
    if facts.loss is not None:
        lines[0] += f", loss {facts.loss:.4f}"
    if facts.knn_top1 is not None and facts.knn_best_top1 is not None:
        lines.append(f"kNN       {facts.knn_top1:.1%}, best {facts.knn_best_top1:.1%}")
    return [*lines, "next", *(f"  {line}" for line in next_commands(config, out, _program()))]


def _program() -> str:
    """What a shell calls this program by."""
    if shutil.which("widebatch"):
        return "widebatch"
    return shlex.quote(str(Path(sys.executable).with_name("widebatch")))


def _settings(recipe: str, overrides: list[str]) -> "RunConfig":
    prog = f"widebatch pretrain {recipe}"
    refuse_unknown(prog, overrides, ["--devices"])
    _refuse_files(prog, overrides)
    text = f"--devices N: {devices.HELP}"
    return parse_settings("pretrain", recipe, overrides, other_options=["--devices"], text=text)


def _refuse_files(prog: str, words: Sequence[str]) -> None:
    """Before torch is imported, which takes seconds: data files that are none, an impossible RUN.

    Raises:
        ConfigError, DataError: names the file and what to do.
    """
    if {"-h", "--help"} & set(words):
        return
    parser = Parser(prog=prog, passes_on=True, add_help=False, allow_abbrev=False)
    parser.add_argument("--data.train", metavar="FILE", dest="train", nargs="+")
    parser.add_argument("--data.test", metavar="FILE", dest="test", nargs="*", default=[])
    parser.add_argument("--out", metavar="RUN", type=Path)
    args, _ = parser.parse_known_args(words)
    if args.train is None:
        raise ConfigError(f"--data.train FILE is required; see '{prog} --help'")
    from data_pipeline.reading.beton import sample_count

    for file in (*args.train, *args.test):
        sample_count(file)
    if args.out is None:
        return
    place = args.out.absolute()
    while not place.exists() and not place.is_symlink():
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"--out {args.out}: {place} exists and is no folder; choose another name")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--out {args.out}: {place} cannot be written by this user; choose another folder"
        )
