"""Whether a run whose processes have all ended is started again, and how often.

docs/resume.md has the table of exit codes. Of several processes the worst decides: one that failed
ends the run, though the others only lost it; one that was killed could not say why, and counts as
retryable. A process says how it ended in a file of its own (:func:`record`), because the launchers
do not: ``srun -K`` hides the tasks' exit codes, and torchrun starts its workers again whatever they
were.

Slurm: the job script gives the folder (``WIDEBATCH_ENDINGS``), asks this module, and requeues.
torchrun (``--max-restarts``): its own folder serves; a worker that is started again finds out how
the last attempt ended, and ends likewise if that was for good (:func:`refuse_hopeless`).
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.files.atomic_file import write_atomically
from common.files.strict_json import dump_json
from launch.exit_codes import ExitCode

ENDINGS_VARIABLE = "WIDEBATCH_ENDINGS"
BUDGET_VARIABLE = "WIDEBATCH_RESTARTS"
BUDGET = 3
_FOR_GOOD = (ExitCode.FATAL, ExitCode.USAGE)


@dataclass(frozen=True)
class Decision:
    """What becomes of a run whose processes have all ended."""

    again: bool
    why: str


def record(code: int, environ: Mapping[str, str] = os.environ) -> None:
    """Leave word of how this process ends, where the launcher has a place for that."""
    folder = _folder(environ)
    if folder is None or code == ExitCode.DONE:
        return
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"rank-{environ.get('RANK', '0')}"
    write_atomically(path, f"{int(code)}\n".encode(), private=True)


def script_decides(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a job script reads :func:`record`'s word, and not the exit code."""
    return ENDINGS_VARIABLE in environ


def refuse_hopeless(environ: Mapping[str, str] = os.environ) -> ExitCode | None:
    """What a worker that torchrun started again should end with at once: as the attempt before."""
    if script_decides(environ) or environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    folder = _folder(environ)
    codes = [] if folder is None else _recorded(folder)
    for code in (*_FOR_GOOD, ExitCode.PREEMPTED):
        if code in codes:
            return code
    return None


def decide(
    endings: Path, run: Path, status: int, signalled: bool, budget: int = BUDGET
) -> Decision:
    """Whether a run is to be started again; counts the starts in ``RUN/restarts.json``.

    Args:
        endings: the folder where its processes left word.
        run: the run's folder.
        status: of the launcher that waited for all of them; 0 when they all ended well.
        signalled: whether the run was told to stop.
        budget: starts after failures, without a newer checkpoint, that are allowed.
    """
    codes = _recorded(endings)
    failed = next((code for code in _FOR_GOOD if code in codes), None)
    if signalled and status:
        return Decision(True, "told to stop before it could save; the last checkpoint serves")
    if failed is not None:
        return Decision(False, f"a process ended with {int(failed)}: starting again will not help")
    if status:
        return _spend(run, budget)
    if ExitCode.PREEMPTED in codes:
        return Decision(True, "stopped with a checkpoint")
    return Decision(False, "the run is done")


def _spend(run: Path, budget: int) -> Decision:
    starts = run / "restarts.json"
    step = _integer(run / "checkpoints" / "latest.json", "step")
    failures = 1 + (_integer(starts, "failures") if _integer(starts, "step") == step else 0)
    if failures > budget:
        return Decision(
            False,
            f"it failed {failures} times without a newer checkpoint than step {step}'s; mend the"
            f" cause, delete {starts}, and submit it again",
        )
    run.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(starts, (dump_json({"step": step, "failures": failures}) + "\n").encode())
    return Decision(
        True, f"failed; start {failures} of {budget} from the checkpoint of step {step}"
    )


def _integer(path: Path, name: str) -> int:
    """A number of a small JSON file, 0 where there is none to read."""
    try:
        value = json.loads(path.read_bytes())[name]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return 0
    return value if isinstance(value, int) else 0


def _folder(environ: Mapping[str, str]) -> Path | None:
    if ENDINGS_VARIABLE in environ:
        return Path(environ[ENDINGS_VARIABLE])
    # .../RUN_ID/attempt_0/RANK/error.json: made by torchrun for its workers, and for nobody else
    error_file = environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file or environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return None
    return Path(error_file).parents[2] / "widebatch-endings"


def _recorded(folder: Path) -> list[int]:
    found = []
    for path in folder.glob("rank-*"):
        text = path.read_text().strip()
        found += [int(text)] if text.isdecimal() else []
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m launch.restarts ENDINGS --out RUN --status N [--signalled]``: for job scripts.

    Prints "again" or "end" and why, on two lines.
    """
    parser = argparse.ArgumentParser(prog="launch.restarts", description=main.__doc__)
    parser.add_argument("endings", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--status", type=int, required=True)
    parser.add_argument("--signalled", action="store_true")
    args = parser.parse_args(arguments)
    text = os.environ.get(BUDGET_VARIABLE, str(BUDGET))
    if not text.isdecimal():
        parser.error(f"{BUDGET_VARIABLE}={text!r} is not a number of starts")
    decision = decide(args.endings, args.out, args.status, args.signalled, int(text))
    print("again" if decision.again else "end")
    print(decision.why)
    return 0


if __name__ == "__main__":
    sys.exit(main())
