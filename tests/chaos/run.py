"""Disturb runs for a while: ``python -m tests.chaos.run --minutes N --seed S``.

Kills, pauses, stops and starves small runs on this machine at random. Each must end with the bytes
of a run that nobody disturbed; the exit status is 1 if one does not.
"""

import argparse
import json
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.disturbances import Disturbance, draw
from tests.chaos.processes import Ended, left_behind, run_start

_TIMED = ("images_per_second", "loader_wait_seconds", "phase_seconds", "stragglers")
_MAX_STARTS = 12
"""Of one run; the last is left alone."""


@dataclass
class Session:
    """One session of chaos: its settings and what was found."""

    folder: Path
    world_size: int
    random: random.Random
    steps: int
    patience: float
    """Seconds that one start may take."""
    say: Callable[[str], None] = print
    mark: str = field(default_factory=lambda: secrets.token_hex(6))
    problems: list[str] = field(default_factory=list)
    starts: int = 0

    def command(self, out: Path) -> list[str]:
        """Arguments of ``python -m launch`` for a run in ``out``: small, and all that a run has."""
        return [
            *("pretrain", "digits-demo", "--data.train", str(self.folder / "digits.beton")),
            *("--batch", str(12 * self.world_size), "--steps", str(self.steps), "--seed", "1"),
            *("--out", str(out), "--log-samples", "--device", "cpu"),
            *("--loader.workers", "1", "--telemetry.log-every", "1"),
            *("--checkpoint.every-steps", "2", "--telemetry.no-tensorboard"),
            *("--watchdog.timeout", "30"),
        ]

    def start(self, out: Path, disturbance: Disturbance | None) -> Ended:
        """One start of the run in ``out``."""
        self.starts += 1
        return run_start(
            self.command(out),
            self.world_size,
            self.folder / f"{out.name}.log",
            self.mark,
            disturbance,
            out / "metrics.jsonl",
            self.patience,
        )


def chaos(
    seconds: float,
    seed: int,
    world_size: int = 2,
    folder: Path | None = None,
    say: Callable[[str], None] = print,
    steps: int = 12,
) -> list[str]:
    """Disturb runs until the time is over; at least one run is finished.

    Args:
        seconds: after which no new run is begun.
        seed: of the disturbances; the moments at which they come depend on the machine too.
        world_size: processes of each run, gloo on CPU.
        folder: for runs and logs, kept; none: a temporary one, deleted where all is well.
        say: takes a line of the report.
        steps: of each run.

    Returns:
        What was wrong, a line each; nothing when every promise held.
    """
    place = Path(tempfile.mkdtemp(prefix="widebatch-chaos-")) if folder is None else folder
    place.mkdir(parents=True, exist_ok=True)
    generator = random.Random(seed)
    session = Session(place, world_size, generator, steps, patience=300.0, say=say)
    deadline = time.monotonic() + seconds
    _pack(session)
    expected = place / "undisturbed"
    ended = session.start(expected, None)
    if not ended.done:
        return [f"the run that nobody disturbed failed: {ended.errors}"]
    say(f"seed {seed}, {world_size} processes, {steps} steps a run; everything is in {place}")
    number = 0
    while number == 0 or time.monotonic() < deadline:
        number += 1
        out = place / f"run-{number}"
        _disturbed_run(session, out)
        _compare(session, out, expected)
    session.problems += [f"left behind: {command}" for command in left_behind(session.mark)]
    say(f"{number} runs, {session.starts - 1} starts, {len(session.problems)} problems")
    if folder is None and not session.problems:
        shutil.rmtree(place)
    return session.problems


def _pack(session: Session) -> None:
    target = session.folder / "digits.beton"
    subprocess.run(
        [sys.executable, "-P", "-m", "launch", "pack", "embedded:digits:test", str(target)],
        check=True,
        capture_output=True,
        timeout=session.patience,
    )


def _disturbed_run(session: Session, out: Path) -> None:
    for start in range(1, _MAX_STARTS + 1):
        last = start == _MAX_STARTS
        disturbance = None if last else draw(session.random, session.world_size)
        ended = session.start(out, disturbance)
        codes = ", ".join(map(str, ended.codes))
        session.say(f"{out.name}, start {start}: {disturbance or 'nothing'} -> exit codes {codes}")
        problem = ended.unexpected()
        if problem is not None:
            session.problems.append(f"{out.name}, start {start}: {problem}: {ended.errors}")
        if ended.done:
            return
    session.problems.append(f"{out.name}: not done after {_MAX_STARTS} starts")


def _compare(session: Session, out: Path, expected: Path) -> None:
    for what, read in (("samples", _samples), ("metrics", _metrics), ("checkpoint", _checkpoint)):
        try:
            same = read(out) == read(expected)
        except (OSError, ValueError) as error:
            same = False
            session.problems.append(f"{out.name}: its {what} cannot be read: {error}")
        if not same:
            session.problems.append(f"{out.name}: its {what} differ from the undisturbed run's")
    temporary = [p for p in out.rglob("*") if p.name.startswith(".writing-") or p.suffix == ".part"]
    session.problems += [f"{out.name}: left {path}" for path in temporary]


def _samples(run: Path) -> list[str]:
    return (run / "samples.jsonl").read_text().splitlines()


def _metrics(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in _TIMED} for record in records]


def _checkpoint(run: Path) -> dict[str, bytes]:
    step = json.loads((run / "checkpoints" / "latest.json").read_text())["step"]
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the disturbances (default 0)")
    parser.add_argument("--out", type=Path, help="for runs and logs, kept (default temporary)")
    args = parser.parse_args()
    problems = chaos(60 * args.minutes, args.seed, folder=args.out)
    for problem in problems:
        print(f"BAD: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
