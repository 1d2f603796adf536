"""The runs below a folder, each in a few facts, read from the ends of their files.

No file is read whole but the small ones, and torch is never loaded: hundreds of runs take a second.
What became of a run, the traces of its processes tell: its lock, their heartbeats, its last step.
Nothing is locked or written to find out, so that looking never disturbs a run that starts.
"""

import functools
import json
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import ConfigError, DataError
from common.files.regular_file import open_regular
from common.files.strict_json import read_json_file
from trainer.health import heartbeat
from trainer.health.heartbeat import Heartbeat, process_state
from trainer.state.run_data import section

_MARKS = ("metrics.jsonl", "checkpoints/latest.json", ".lock")  # exports have a config.json too
_DEPTH = 3  # folders below the one that is named
_CHUNK = 1 << 16
_FURTHEST = 1 << 24  # bytes from the end in which a kNN result is looked for
_STEP = re.compile(r"step-([0-9]{8,18})")
_SILENT = 60.0  # seconds without a beat, of which there is one every 5 s or more often
_ASKED_TO_STOP = ("KeyboardInterrupt", "SystemExit")


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """A line of the list. What a run does not say is None."""

    name: str
    """Its folder, from the one that was searched."""
    path: str
    state: str
    """running, finished, stopped (the same command goes on), failed, unknown, or damaged."""
    why: str = ""
    """The reason for the state, where it has one."""
    recipe: str | None = None
    step: int | None = None
    total_steps: int | None = None
    epoch: float | None = None
    """Passes over the data that are done."""
    loss: float | None = None
    knn_top1: float | None = None
    """Of the last online kNN, 0 to 1."""
    knn_best_top1: float | None = None
    images_per_second: float | None = None
    age_seconds: float | None = None
    """Since the last record was written."""
    ranks: int | None = None
    """Processes of the last start."""


def list_runs(folders: Iterable[Path]) -> list[RunFacts]:
    """All runs in and below ``folders``, the newest first.

    Raises:
        ConfigError: a folder is not there.
    """
    locks = _held_locks()
    found: dict[Path, str] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder; name one that holds runs")
        for path in _runs_below(folder, _DEPTH):
            name = str(path.relative_to(folder)) if path != folder else folder.resolve().name
            found.setdefault(path.resolve(), name)
    with ThreadPoolExecutor(8) as pool:  # a shared file system answers slowly, not in turn
        read = functools.partial(_read_run, locks=locks)
        runs = list(pool.map(read, found, found.values()))
    return sorted(runs, key=lambda run: (run.age_seconds is None, run.age_seconds or 0, run.name))


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    if any((folder / mark).exists() for mark in _MARKS):
        yield folder
        return
    try:
        inner = [Path(e.path) for e in os.scandir(folder) if e.is_dir() and e.name[0] != "."]
    except PermissionError:
        inner = []
    for path in sorted(inner) if depth else []:
        yield from _runs_below(path, depth - 1)


def read_run(path: Path) -> RunFacts:
    """What the list says of the run in folder ``path``; ``damaged`` where it cannot be read."""
    return _read_run(path, path.resolve().name, _held_locks())


def _read_run(path: Path, name: str, locks: set[str]) -> RunFacts:
    age = _age(path)
    try:
        return _facts(path, name, age, locks)
    except (DataError, OSError) as error:
        why = str(error).removeprefix(f"{path}/")
        return RunFacts(name=name, path=str(path), state="damaged", why=why, age_seconds=age)


def _facts(path: Path, name: str, age: float | None, locks: set[str]) -> RunFacts:
    config = _config(path)
    run = section(config, "run")
    total, per_epoch = _integer(run.get("total_steps")), _integer(run.get("steps_per_epoch"))
    last, knn = _newest_records(path / "metrics.jsonl")
    saved = _saved_step(path / "checkpoints")
    ranks = _integer(run.get("world_size")) or len(heartbeat.ranks_in(path / "heartbeats"))
    step = max(_integer(last.get("step")) or 0, saved or 0)
    state, why = _state_of(path, ranks, step, total, saved, locks)
    return RunFacts(
        name=name,
        path=str(path),
        state=state,
        why=why,
        recipe=config.get("recipe") if isinstance(config.get("recipe"), str) else None,
        step=step,
        total_steps=total,
        epoch=round(step / per_epoch, 2) if per_epoch else None,
        loss=_number(last.get("loss")),
        knn_top1=_number(knn.get("knn_top1")),
        knn_best_top1=_number(knn.get("knn_best_top1")),
        images_per_second=_number(last.get("images_per_second")),
        age_seconds=age,
        ranks=ranks or None,
    )


def _state_of(
    folder: Path, ranks: int, step: int, total: int | None, saved: int | None, locks: set[str]
) -> tuple[str, str]:
    """What became of the run in ``folder``, in one word, and why in a few."""
    there = heartbeat.ranks_in(folder / "heartbeats")  # `ranks` is a file's word, however large
    beats = heartbeat.read(folder / "heartbeats", (rank for rank in there if rank < ranks))
    ages = {rank: _silence(folder, rank) for rank in beats}
    lives = [rank for rank, beat in beats.items() if _lives(beat, ages[rank])]
    if lives or _lock_name(folder / ".lock") in locks:
        stopped = [str(r) for r in lives if process_state(beats[r]) == "stopped"]
        return "running", f"rank {', '.join(stopped)} is stopped" if stopped else ""
    if total is not None and (saved or 0) >= total:
        return "finished", ""
    return _ended(beats, ages, step, saved)


def _ended(
    beats: Mapping[int, Heartbeat], ages: Mapping[int, float], step: int, saved: int | None
) -> tuple[str, str]:
    errors = {beat.ended: rank for rank, beat in sorted(beats.items(), reverse=True) if beat.ended}
    errors = {name: rank for name, rank in errors.items() if name not in ("done", *_ASKED_TO_STOP)}
    # Those that lost another rank are its victims: another's error says more.
    own = {n: r for n, r in errors.items() if n != "RankLostError"} or errors
    if own:
        name, rank = next(iter(own.items()))
        said = f": {beats[rank].why}" if beats[rank].why else ""
        return "failed", f"{name} on rank {rank} at step {beats[rank].step}{said}"
    if any(beat.hung for beat in beats.values()):
        return "failed", "hung; RUN/stacks says where"
    if not beats:
        return "unknown", "no heartbeats"
    silent = [r for r, beat in beats.items() if not beat.ended and not process_state(beat)]
    if silent:
        beat = beats[silent[0]]
        return "unknown", f"rank {beat.rank} on {beat.host} is silent for {ages[beat.rank]:.0f} s"
    killed = any(not beat.ended for beat in beats.values())
    if saved is None:
        status = "failed" if killed else "stopped"
        return status, f"{'killed' if killed else 'ended'} before its first checkpoint"
    lost = f", {step - saved} steps to repeat" if step > saved else ""
    return "stopped", f"killed{lost}" if killed else ""


def _held_locks() -> set[str]:
    """Files of this machine that are locked, as :func:`_lock_name` calls them. Linux only."""
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return set()
    # "1: FLOCK  ADVISORY  WRITE 1234 fd:01:56789 0 EOF"
    return {words[5] for words in map(str.split, lines) if words[1] == "FLOCK" and len(words) > 5}


def _lock_name(path: Path) -> str:
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


def _silence(folder: Path, rank: int) -> float:
    """Seconds since the rank's last beat."""
    try:
        written = heartbeat.path_of(folder / "heartbeats", rank).stat().st_mtime
    except OSError:
        return float("inf")
    return time.time() - written


def _config(path: Path) -> dict[str, Any]:
    try:
        return read_json_file(path / "config.json")
    except FileNotFoundError:
        began = [mark for mark in ("metrics.jsonl", "checkpoints") if (path / mark).exists()]
        if began:
            raise DataError(f"config.json is missing, and {began[0]} is there") from None
        return {}  # it has not come to its first step


def _saved_step(folder: Path) -> int | None:
    """Of the newest checkpoint; the pointer to it must be sound where there is one."""
    try:
        steps = [int(m[1]) for e in os.scandir(folder) if (m := _STEP.fullmatch(e.name))]
    except FileNotFoundError:
        return None
    try:
        pointed = _integer(read_json_file(folder / "latest.json").get("step"))
    except FileNotFoundError:
        pointed = max(steps, default=0)
    if pointed is None or (pointed and pointed not in steps):
        raise DataError("checkpoints/latest.json: names no checkpoint that is there")
    return max(steps, default=None)


def _newest_records(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last whole record, and the last with a kNN result; empty where there is none.

    Raises:
        DataError: the file ends in something else.
    """
    try:
        lines = open_regular(path)
    except FileNotFoundError:
        return {}, {}
    last: dict[str, Any] = {}
    with lines as file:
        for line in _lines_from_the_end(file):
            if last and b'"knn_top1"' not in line:
                continue
            record = _record(line)
            last = last or record
            if "knn_top1" in record:
                return last, record
    return last, {}


def _lines_from_the_end(file: BinaryIO) -> Iterator[bytes]:
    """Whole lines, the last one first; one without an end is still being written."""
    end = position = file.seek(0, os.SEEK_END)
    before, torn = b"", True
    while position and end - position < _FURTHEST:
        size = min(_CHUNK, position)
        position = file.seek(position - size)
        before, *lines = (file.read(size) + before).split(b"\n")
        if torn and lines:
            lines.pop()
            torn = False
        yield from reversed(lines)
    if not position and not torn:
        yield before


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)  # not strict: losses that are not finite stand as NaN
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise DataError(f"metrics.jsonl: its last lines are no records: {line[:40]!r}")
    return record


def _age(path: Path) -> float | None:
    for name in ("metrics.jsonl", "config.json", ".lock"):
        try:
            return round(max(0.0, time.time() - (path / name).stat().st_mtime), 1)
        except OSError:
            continue
    return None


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
