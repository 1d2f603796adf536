"""argparse whose errors are one line and name the nearest thing that there is."""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from common.errors import ConfigError

# Options of other training programs, and ours that mean the same; the first that a command has.
_ELSEWHERE = {
    ("--lr", "--learning-rate", "--base-learning-rate"): ("--optim.base-lr", "--base-lr"),
    ("--momentum",): ("--optim.momentum",),
    ("--wd", "--decay"): ("--optim.weight-decay", "--weight-decay"),
    ("--optimizer", "--opt"): ("--optim.name",),
    ("--batch-size", "--bs", "-b", "--global-batch-size"): ("--batch",),
    ("--workers", "--num-workers", "-j", "--threads"): ("--loader.workers", "--workers"),
    ("--arch", "-a", "--model", "--backbone", "--encoder"): ("--encoder.name",),
    ("--data", "--dataset", "--data-dir", "--data-path", "--train", "--train-dir"): (
        "--data.train",
    ),
    ("--val", "--test", "--val-dir", "--data.val", "--data.valid"): ("--data.test",),
    ("--output", "--output-dir", "-o", "--save-dir", "--log-dir", "--logdir", "--run"): ("--out",),
    ("--max-epochs", "--num-epochs", "-e"): ("--epochs",),
    ("--max-steps", "--num-steps", "--iterations", "--iters"): ("--steps",),
    ("--temperature", "--temp", "--tau"): ("--objective.temperature", "--temperature"),
    ("--image-size", "--img-size", "--input-size", "--crop-size"): ("--crop.size", "--size"),
    ("--warmup", "--warmup-epochs"): ("--schedule.warmup-epochs",),
    ("--dim", "--proj-dim", "--projection-dim"): ("--head.out-dim",),
    ("--queue-size", "--queue"): ("--objective.queue",),
    ("--amp", "--fp16", "--bf16", "--fp32"): ("--precision",),
    ("--accumulate-grad-batches", "--grad-accum", "--gradient-accumulation-steps"): (
        "--micro-batch",
    ),
    ("--pretrained", "--weights", "--init"): ("--init-from",),
    ("--wandb", "--project"): ("--telemetry.wandb",),
}
_OURS = {name: ours for names, ours in _ELSEWHERE.items() for name in names}
# These mean processes: of this machine, or of several, which a launcher starts; `plan` plans them.
_GPUS = (
    *("--gpus", "--gpu", "--devices", "--ngpus", "--num-gpus", "--gpus-per-node"),
    *("--nproc", "--nproc-per-node", "--num-processes", "--world-size"),
)
_NODES = ("--nodes", "--nnodes", "--num-nodes")
_OURS |= dict.fromkeys(_GPUS, ("--gpus", "--devices")) | dict.fromkeys(_NODES, ("--nodes",))


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name that ``word`` is most like, if any.

    A flag without its group is like the one with it: ``--base-lr`` is ``--optim.base-lr``.
    """
    known = list(names)
    flag = word.replace("_", "-")
    meant = [name for name in _OURS.get(flag, ()) if name in known]
    tail = flag.lstrip("-")
    in_a_group = [name for name in known if name.endswith(f".{tail}")]
    near = meant or in_a_group or difflib.get_close_matches(word, known, n=1)
    return near[0] if near else None


def unknown(what: str, word: str, names: Iterable[str], otherwise: str = "") -> str:
    """The one line about a name that is none of ``names``.

    Args:
        what: kind of name: "option", "recipe", "setting".
        word: what was written.
        names: those that there are.
        otherwise: where to look when none is near; by default all names.
    """
    known = list(names)
    near = nearest(word, known)
    if word.replace("_", "-") in _NODES and near != "--nodes":
        hint = "several nodes are started by Slurm or torchrun: docs/many-gpus.md"
    elif near:
        hint = f"did you mean {near}?"
    else:
        hint = otherwise or f"choose from {', '.join(known)}"
    return f"unknown {what} {word!r}; {hint}"


class Parser(argparse.ArgumentParser):
    """Like argparse's, with descriptions as they are written; sub-commands are of the same kind.

    Unknown words are errors, told by the command that they belong to, unless it ``passes_on`` them.
    """

    def __init__(self, *args: Any, passes_on: bool = False, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)
        self._passes_on = passes_on
        self._words: list[str] = []

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse; ConfigError takes the place of argparse's usage text and SystemExit."""
        self._words = list(args or ())
        found, rest = super().parse_known_args(args, namespace)
        if rest and not self._passes_on:
            self.error(f"unexpected {' '.join(rest)!r}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Raise; an option that does not exist is told before what is missing for want of it."""
        mistyped = None if self._passes_on else self._mistyped()
        name = self.prog.partition(" ")[2]
        help_words = f"see '{self.prog} --help'"
        if mistyped is not None:
            message = unknown("option", mistyped, self._options(), help_words)
        elif "did you mean" not in message:
            message = f"{message}; {help_words}"
        raise ConfigError(f"{name}: {message}" if name else message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """What argparse asks of a value that must be one of several."""
        if action.choices is None or value in action.choices:
            return
        names = [str(choice) for choice in action.choices]
        if isinstance(action, argparse._SubParsersAction):
            kind = str(action.metavar).lower()
            raise argparse.ArgumentError(None, unknown(kind, str(value), names))
        raise argparse.ArgumentError(action, unknown("value", str(value), names))

    def _options(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]

    def _mistyped(self) -> str | None:
        """The first option that is none, nor the beginning of one."""
        has_commands = any(isinstance(a, argparse._SubParsersAction) for a in self._actions)
        for word in self._words:
            # What follows a sub-command is for that to judge.
            if word == "--" or (has_commands and not word.startswith("-")):
                return None
            name = word.partition("=")[0]
            if name.startswith("--") and not any(o.startswith(name) for o in self._options()):
                return name
        return None
