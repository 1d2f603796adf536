"""What ``make demo`` runs: the whole way of an encoder, by the commands that a user would type.

Packs the embedded digits, pretrains on two processes, measures the encoder against an untrained
one and raw pixels on held-out digits, exports it and makes the report. Nothing is asserted about
accuracy; the margin is printed as it was measured.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from data_pipeline.strict_json import dump_json
from launch.exit_codes import ExitCode

_PROCESSES = 2
_RECORD = "demo.json"  # what the folder's demo consists of, and whether it came to its end
_PATIENCE = 60.0  # seconds that a stopped command has for its checkpoint
SOURCES = {
    "raw pixels": "pixels:32",
    "untrained encoder": "untrained:{run}",
    "pretrained": "{run}",
}
METHODS = {
    "10 labels per class, linear": ("linear", ["--labels-per-class", "10"]),
    "all labels, kNN": ("knn", []),
}


@dataclass(frozen=True)
class Step:
    """Commands under one heading."""

    heading: str
    commands: tuple[tuple[str, ...], ...]


class StepFailedError(Exception):
    """A command ended with another status than 0."""

    def __init__(self, heading: str, command: Sequence[str], status: int) -> None:
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        super().__init__(f"'{heading}' failed ({how}): {shlex.join(command)}")
        self.status = status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit status."""
    args = _parser().parse_args(arguments)
    out: Path = args.out
    steps = plan(out, quick=args.quick)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    started = time.monotonic()
    try:
        problem = prepare(out, steps, fresh=args.fresh)
        if problem:
            print(f"demo: error: {problem}", file=sys.stderr)
            return ExitCode.USAGE
        for number, step in enumerate(steps, 1):
            _run_step(step, f"[{number}/{len(steps)}]")
        _record(out, steps, finished=True)
        _summary(out, time.monotonic() - started)
    except KeyboardInterrupt:
        print("\ndemo: stopped; the same command goes on from here", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except StepFailedError as failure:
        print(f"\ndemo: error: {failure}; the lines above it say why", file=sys.stderr)
        known = {int(code) for code in ExitCode}
        return failure.status if failure.status in known else ExitCode.FATAL
    except OSError as error:
        print(f"\ndemo: error: {error}", file=sys.stderr)
        return ExitCode.USAGE
    finally:
        signal.signal(signal.SIGTERM, previous)
    return ExitCode.DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.demo", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), metavar="DIR", help="its folder (default demo)"
    )
    parser.add_argument("--fresh", action="store_true", help="do not go on with a stopped demo")
    parser.add_argument(
        "--quick", action="store_true", help="4 steps of training: shows the way, not the result"
    )
    return parser


def plan(out: Path, *, quick: bool) -> list[Step]:
    """All commands of the demo, in order."""
    train, test, run = (str(out / name) for name in ("train.beton", "test.beton", "run"))
    data = ("--data.train", train, "--data.test", test)
    length = ("--batch", "64", "--steps", "4") if quick else ()
    methods = dict(list(METHODS.items())[: 1 if quick else None])
    look = ("--max-images", "100") if quick else ()
    here = ("--devices", str(_PROCESSES))
    return [
        Step(
            "Pack the embedded digits, in random colours and places: to learn from, and held out",
            (
                ("widebatch", "pack", "embedded:digits:train", train),
                ("widebatch", "pack", "embedded:digits:test", test),
            ),
        ),
        Step(
            f"Pretrain on {_PROCESSES} processes, without labels: the longest part",
            (("widebatch", "pretrain", "digits-demo", *data, "--out", run, *length, *here),),
        ),
        Step(
            "Measure on held-out digits, beside raw pixels and the same network untrained",
            tuple(
                (
                    *("widebatch", "evaluate", method, source.format(run=run), *data),
                    *(*options, "--json", str(evaluation_file(out, method, name))),
                )
                for method, options in methods.values()
                for name, source in SOURCES.items()
            ),
        ),
        Step(
            "Export the encoder: its computation and weights, which plain torch loads",
            (
                (
                    *("widebatch", "export", run, "--format", "torch-export"),
                    *("--out", str(out / "encoder.pt2"), "--force"),
                ),
            ),
        ),
        Step(
            "Make the report: a page of the run, and its figures",
            (
                (
                    *("widebatch", "report", run, "--out", str(out / "report.html")),
                    *("--figures", str(out / "figures"), *look),
                ),
            ),
        ),
    ]


def evaluation_file(out: Path, method: str, name: str) -> Path:
    """Where one measurement is written; ``widebatch report`` looks there."""
    return out / "run" / "evaluation" / f"{method}-{name.replace(' ', '-')}.json"


def prepare(out: Path, steps: Sequence[Step], *, fresh: bool) -> str:
    """Make the folder ready: go on with this demo if it was stopped, else clear it.

    Returns:
        Why the folder cannot be used, or nothing.
    """
    record = out / _RECORD
    if out.exists() and not out.is_dir():
        return f"--out {out}: is a file; name a folder"
    if out.is_dir() and any(out.iterdir()) and not record.is_file():
        return f"--out {out}: holds files of other origin; name a new folder"
    saved: Any = None
    with suppress(OSError, ValueError):  # unreadable: begin anew
        saved = json.loads(record.read_text())
    same = isinstance(saved, dict) and saved.get("steps") == _as_json(steps)
    if not same or saved.get("finished") or fresh:
        _clear(out)
    elif (out / "run").exists():
        print(f"Going on with the demo that was stopped in {out}; --fresh begins anew.")
    out.mkdir(parents=True, exist_ok=True)
    _record(out, steps, finished=False)
    return ""


def _clear(out: Path) -> None:
    """Delete what the demo writes, and nothing else."""
    for folder in (out / "run", out / "figures"):
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
    for pattern in ("train.beton*", "test.beton*", "encoder.*", "report.html"):
        for path in out.glob(pattern):
            path.unlink()


def _record(out: Path, steps: Sequence[Step], *, finished: bool) -> None:
    temporary = out / f".{_RECORD}"
    temporary.write_text(dump_json({"steps": _as_json(steps), "finished": finished}) + "\n")
    temporary.replace(out / _RECORD)


def _as_json(steps: Sequence[Step]) -> list[list[list[str]]]:
    return [[list(command) for command in step.commands] for step in steps]


def _run_step(step: Step, place: str) -> None:
    print(f"\n== {place} {step.heading}", flush=True)
    started = time.monotonic()
    for command in step.commands:
        print(f"\n$ {shlex.join(command)}", flush=True)
        status = run_command(command)
        if status:
            raise StepFailedError(step.heading, command, status)
    print(f"\n   {place} took {time.monotonic() - started:.0f} s", flush=True)


def run_command(command: Sequence[str]) -> int:
    """Run a command of this environment; its output and progress bars go where ours go.

    A command runs in our process group, so that Ctrl-C reaches it from the terminal. Interrupted,
    we wait until it has written its checkpoint and ended its own processes.
    """
    program = Path(sys.executable).parent / command[0]
    environ = {"OMP_NUM_THREADS": "1", **os.environ}  # two processes on two cores: a thread each
    with subprocess.Popen([str(program), *command[1:]], env=environ) as process:
        try:
            return process.wait()
        except _TerminatedError:
            process.terminate()  # SIGTERM came to us alone
            _await_end(process)
            raise
        except KeyboardInterrupt:
            _await_end(process)
            raise


def _await_end(process: "subprocess.Popen[bytes]") -> None:
    """Let a command end in its own time; insist when it does not, or at another Ctrl-C."""
    for insist in (process.terminate, process.kill):
        try:
            process.wait(_PATIENCE)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            insist()
        else:
            return


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM, taken as Ctrl-C is."""


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise _TerminatedError


def _summary(out: Path, seconds: float) -> None:
    print(f"\n== Done in {seconds / 60:.1f} minutes\n")
    print("\n".join(table(out)))
    print("\nFiles:")
    print(f"  {out / 'report.html'}  the run as one page, for a browser")
    for path in sorted(out.glob("figures/*.png")) + sorted(out.glob("encoder.*")):
        print(f"  {path}")
    print(f"  {out / 'run'}  the run: config.json, metrics.jsonl, checkpoints, evaluation")
    print(f"\nLook at {out / 'report.html'} first, or at {out / 'figures' / 'overview.png'}.")


def table(out: Path) -> list[str]:
    """Accuracies of the three sources by each method that was measured, and the margin."""
    found: dict[str, dict[str, float]] = {}
    test_images = 0
    for title, (method, _) in METHODS.items():
        for name in SOURCES:
            path = evaluation_file(out, method, name)
            if path.is_file():
                report = json.loads(path.read_text())
                found.setdefault(title, {})[name] = 100 * report["top1"]
                test_images = report["n_test"]
    titles = list(found)
    lines = ["Accuracy in % on digits that neither training nor the labels have seen:", ""]
    lines.append(" " * 20 + "".join(f"{title:>30}" for title in titles))
    for name in SOURCES:
        lines.append(f"{name:<20}" + "".join(f"{found[title][name]:>30.1f}" for title in titles))
    lines.append("")
    for title in titles:
        row = found[title]
        gains = (row["pretrained"] - row[name] for name in ("untrained encoder", "raw pixels"))
        over_untrained, over_pixels = gains
        lines.append(
            f"{title}: pretraining is {over_untrained:+.1f} points from the untrained encoder, "
            f"{over_pixels:+.1f} from raw pixels."
        )
    lines.append(
        f"({test_images} drawings of 360 held-out digits; less than 5 points apart may be chance.)"
    )
    return lines


if __name__ == "__main__":
    sys.exit(main())
