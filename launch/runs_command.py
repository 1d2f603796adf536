"""``widebatch runs``: what became of the runs in a folder."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files.strict_json import dump_json
from launch.exit_codes import ExitCode
from launch.surroundings import printable

if TYPE_CHECKING:
    from trainer.state.run_list import RunFacts

_DESCRIPTION = """\
List the runs in folders, the newest first:

  running    a process of it lives
  finished   its last step is done and saved
  stopped    the same command goes on from its newest checkpoint
  failed     it ended by an error, or was killed before its first checkpoint; the reason is named
  unknown    nothing says whether it goes on, as where its node is out of reach
  damaged    a file of it cannot be read; the reason is named

Step, loss and images/s are those of the last record, age is the time since it was written; kNN is
the last one and the best one.
"""
_LEFT = ("run", "recipe", "state", "why")  # aligned so; numbers to the right


def add_parser(subparsers: Any) -> None:
    """Add ``runs`` to the command line."""
    parser = subparsers.add_parser(
        "runs",
        help="list runs with state, step, loss and kNN",
        description=_DESCRIPTION,
    )
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        default=[Path("runs")],
        metavar="FOLDER",
        help="where runs lie, or a run itself (default runs)",
    )
    parser.add_argument("--json", action="store_true", help="print all facts as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the list."""
    from trainer.state.run_list import list_runs

    found = list_runs(args.folders)
    if args.json:
        print(dump_json([dataclasses.asdict(facts) for facts in found], indent=1))
    elif found:
        print("\n".join(table([_row(facts) for facts in found])))
    else:
        print(f"no runs in {', '.join(map(str, args.folders))}", file=sys.stderr)
    return ExitCode.DONE


def table(rows: Sequence[dict[str, str]]) -> list[str]:
    """Lines of a table with a heading, of texts by column; columns without any text go."""
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    lines = {name: [name, *(row[name] for row in rows)] for name in columns}
    for name, cells in lines.items():
        width = max(map(len, cells))
        lines[name] = [c.ljust(width) if name in _LEFT else c.rjust(width) for c in cells]
    return ["  ".join(cells).rstrip() for cells in zip(*lines.values())]


def _row(facts: "RunFacts") -> dict[str, str]:
    steps = "" if facts.step is None else str(facts.step)
    return {
        "run": printable(facts.name),
        "recipe": printable(facts.recipe or ""),
        "state": facts.state,
        "step": f"{steps}/{facts.total_steps}" if facts.total_steps else steps,
        "epoch": _text(facts.epoch, "{:.1f}"),
        "loss": _text(facts.loss, "{:.3f}"),
        "kNN": _text(facts.knn_top1, "{:.1%}"),
        "best": _text(facts.knn_best_top1, "{:.1%}"),
        "img/s": _text(facts.images_per_second, "{:.0f}"),
        "ranks": _text(facts.ranks, "{}"),
        "age": "" if facts.age_seconds is None else _age(facts.age_seconds),
        "why": printable(facts.why),
    }


def _text(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
