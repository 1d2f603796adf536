"""A plan for a person: what fits, what travels, what is waited for, what it costs."""

from pathlib import Path

import jinja2

from trainer.planner.plan import Plan

_WHAT = {
    "parameters": "weights of all networks, fp32",
    "gradients": "of what is trained",
    "optimizer": "velocities or moments",
    "buffers": "BatchNorm statistics, queue",
    "crops": "uint8, batches read ahead included",
    "views": "augmented, in the compute dtype",
    "activations": "kept for the backward pass, autocast's copies of weights included",
    "loss": "rows of all processes, projections of all pieces",
    "temporaries": "of the backward pass",
    "allocator": "rounding and fragments",
    "context": "libraries, workspaces, communication buffers",
}


def table(plan: Plan) -> str:
    """The whole plan, lines under headings: ``table.txt``, filled."""
    return _TEMPLATES.get_template("table.txt").render(plan=plan, what=_WHAT)


def _size(count: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            value = count / scale
            return f"{value:.4g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
    return f"{count:.0f} B"


def _duration(hours: float) -> str:
    if hours >= 2:
        return f"{hours:.3g} hours"
    return f"{60 * hours:.3g} minutes" if hours >= 2 / 60 else _seconds(3600 * hours)


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


_TEMPLATES = jinja2.Environment(  # noqa: S701  # plain text, where nothing is to be escaped
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
)
_TEMPLATES.filters |= {"size": _size, "duration": _duration, "seconds": _seconds, "f": format}
