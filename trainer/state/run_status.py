"""What became of a run, by the traces of its processes: its lock, their heartbeats, its last step.

Nothing is locked or written to find out, so that looking never disturbs a run that starts.
"""

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.health import heartbeat
from trainer.health.heartbeat import Heartbeat, process_state

_SILENT = 60.0  # seconds without a beat, of which there is one every 5 s or more often
_LOCKS = Path("/proc/locks")
_ASKED_TO_STOP = ("KeyboardInterrupt", "SystemExit")


@dataclass(frozen=True)
class State:
    """In one word, and why in a few."""

    name: str
    """running, finished, stopped (the same command goes on), failed, or unknown."""
    why: str = ""


def state_of(
    folder: Path, ranks: int, step: int, total: int | None, saved: int | None, locks: set[str]
) -> State:
    """What became of the run in ``folder``.

    Args:
        folder: of the run.
        ranks: processes of its last start.
        step: of its newest record or checkpoint.
        total: its steps; None where that is not known.
        saved: step of its newest checkpoint; None without any.
        locks: of :func:`held_locks`.
    """
    there = heartbeat.ranks_in(folder / "heartbeats")  # `ranks` is a file's word, however large
    beats = heartbeat.read(folder / "heartbeats", (rank for rank in there if rank < ranks))
    ages = {rank: _age(folder, rank) for rank in beats}
    lives = [rank for rank, beat in beats.items() if _lives(beat, ages[rank])]
    if lives or lock_name(folder / ".lock") in locks:
        stopped = [str(r) for r in lives if process_state(beats[r]) == "stopped"]
        return State("running", f"rank {', '.join(stopped)} is stopped" if stopped else "")
    if total is not None and (saved or 0) >= total:
        return State("finished")
    return _ended(beats, ages, step, saved)


def _ended(
    beats: Mapping[int, Heartbeat], ages: Mapping[int, float], step: int, saved: int | None
) -> State:
    errors = {beat.ended: rank for rank, beat in sorted(beats.items(), reverse=True) if beat.ended}
    errors = {name: rank for name, rank in errors.items() if name not in ("done", *_ASKED_TO_STOP)}
    # Those that lost another rank are its victims: another's error says more.
    own = {n: r for n, r in errors.items() if n != "RankLostError"} or errors
    if own:
        name, rank = next(iter(own.items()))
        said = f": {beats[rank].why}" if beats[rank].why else ""
        return State("failed", f"{name} on rank {rank} at step {beats[rank].step}{said}")
    if any(beat.hung for beat in beats.values()):
        return State("failed", "hung; RUN/stacks says where")
    if not beats:
        return State("unknown", "no heartbeats")
    silent = [r for r, beat in beats.items() if not beat.ended and not process_state(beat)]
    if silent:
        beat = beats[silent[0]]
        return State(
            "unknown", f"rank {beat.rank} on {beat.host} is silent for {ages[beat.rank]:.0f} s"
        )
    killed = any(not beat.ended for beat in beats.values())
    if saved is None:
        status = "failed" if killed else "stopped"
        return State(status, f"{'killed' if killed else 'ended'} before its first checkpoint")
    lost = f", {step - saved} steps to repeat" if step > saved else ""
    return State("stopped", f"killed{lost}" if killed else "")


def held_locks() -> set[str]:
    """Files of this machine that are locked, as :func:`lock_name` calls them. Linux only."""
    try:
        lines = _LOCKS.read_text().splitlines()
    except OSError:
        return set()
    # "1: FLOCK  ADVISORY  WRITE 1234 fd:01:56789 0 EOF"
    return {words[5] for words in map(str.split, lines) if words[1] == "FLOCK" and len(words) > 5}


def lock_name(path: Path) -> str:
    """How /proc/locks names a file; empty where there is none."""
    try:
        facts = path.stat()
    except OSError:
        return ""
    return f"{os.major(facts.st_dev):02x}:{os.minor(facts.st_dev):02x}:{facts.st_ino}"


def _lives(beat: Heartbeat, age: float) -> bool:
    if beat.ended or process_state(beat) == "gone":
        return False
    return beat.host == socket.gethostname() or age < _SILENT


def _age(folder: Path, rank: int) -> float:
    try:
        written = heartbeat.path_of(folder / "heartbeats", rank).stat().st_mtime
    except OSError:
        return float("inf")
    return time.time() - written
