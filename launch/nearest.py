"""What somebody may have meant who mistyped a name, or knows it from another program."""

import difflib
from collections.abc import Iterable

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
