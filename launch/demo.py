"""What ``make demo`` runs: the whole way of an encoder, by the commands that a user would type.

Each is printed before it runs, and passed over where a demo that was stopped has done it. Nothing
is asserted about accuracy: the table says what was measured.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.exit_codes import ExitCode

SOURCES = {"raw pixels": "pixels:32", "untrained encoder": "untrained:{run}", "pretrained": "{run}"}
METHODS = {
    "10 labels per class, linear": ("linear", ["--labels-per-class", "10"]),
    "all labels, kNN": ("knn", []),
}


def plan(out: Path, *, quick: bool) -> list[tuple[str, ...]]:
    """The words of each ``widebatch`` command, in order; the last one is the file that it makes.

    ``pretrain`` and ``report``, which end in a number, run each time: the one goes on from its
    newest checkpoint.
    """
    train, test, run = (str(out / name) for name in ("train.beton", "test.beton", "run"))
    data = ("--data.train", train, "--data.test", test)
    length = ("--batch", "64", "--steps", "4") if quick else ()
    methods = list(METHODS.values())[: 1 if quick else None]
    page = ("--out", str(out / "report.html"), "--figures", str(out / "figures"))
    return [
        ("pack", "embedded:digits:train", train),
        ("pack", "embedded:digits:test", test),
        ("pretrain", "digits-demo", *data, "--out", run, *length, "--devices", "2"),
        *(
            (
                *("evaluate", method, source.format(run=run), *data, *options),
                *("--json", str(evaluation_file(out, method, name))),
            )
            for method, options in methods
            for name, source in SOURCES.items()
        ),
        ("export", run, "--format", "torch-export", "--out", str(out / "encoder.pt2")),
        ("report", run, *page, "--max-images", "100" if quick else "1000"),
    ]


def evaluation_file(out: Path, method: str, name: str) -> Path:
    """Where one measurement is written; ``widebatch report`` looks there."""
    return out / "run" / "evaluation" / f"{method}-{name.replace(' ', '-')}.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m launch.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="its folder (default demo)")
    parser.add_argument("--quick", action="store_true", help="4 steps: the way, not the result")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    for command in plan(args.out, quick=args.quick):
        print(f"\n$ widebatch {shlex.join(command)}", flush=True)
        if Path(command[-1]).is_file():
            print("  (done before)")
        elif status := run_command(command):
            stopped = status in (ExitCode.PREEMPTED, ExitCode.INTERRUPTED)
            what = "stopped" if stopped else f"failed with status {status}, the lines above say why"
            print(f"\ndemo: {what}; the same command goes on from here", file=sys.stderr)
            return ExitCode.INTERRUPTED if stopped else status
    print("\n".join(table(args.out)))
    print(f"\nLook at {args.out / 'report.html'} first.")
    return ExitCode.DONE


def run_command(command: Sequence[str]) -> int:
    """Run ``widebatch`` with these words; its output and progress bars go where ours go."""
    program = Path(sys.executable).with_name("widebatch")
    environ = {"OMP_NUM_THREADS": "1", **os.environ}  # two processes on two cores: a thread each
    process = subprocess.Popen([program, *command], env=environ)
    previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        while True:
            # The terminal's Ctrl-C has reached the command too, which ends in its own time.
            with contextlib.suppress(KeyboardInterrupt):
                status = process.wait()
                return status if status >= 0 else 128 - status
    finally:
        signal.signal(signal.SIGTERM, previous)


def table(out: Path) -> list[str]:
    """Lines with the accuracy of each source by each method that was measured."""
    lines = ["", f"{'accuracy in %':<20}" + "".join(f"{title:>30}" for title in METHODS)]
    for name in SOURCES:
        files = [evaluation_file(out, method, name) for method, _ in METHODS.values()]
        found = [100 * json.loads(file.read_text())["top1"] for file in files if file.exists()]
        lines.append(f"{name:<20}" + "".join(f"{value:>30.1f}" for value in found))
    return [*lines, "(held-out digits; less than 5 points apart may be chance)"]


if __name__ == "__main__":
    sys.exit(main())
