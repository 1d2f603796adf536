"""The runs below a folder, each in a few facts, read from the ends of their files.

No file is read whole but the small ones, and torch is never loaded: hundreds of runs take a second.
"""

import functools
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import ConfigError, DataError
from common.files.regular_file import open_regular
from common.files.strict_json import read_json_file
from trainer.health import heartbeat
from trainer.state.run_status import held_locks, state_of

_MARKS = ("metrics.jsonl", "checkpoints/latest.json", ".lock")  # exports have a config.json too
_DEPTH = 3  # folders below the one that is named
_CHUNK = 1 << 16
_FURTHEST = 1 << 24  # bytes from the end in which a kNN result is looked for
_STEP = re.compile(r"step-([0-9]{8,18})")


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """A line of the list. What a run does not say is None."""

    name: str
    """Its folder, from the one that was searched."""
    path: str
    state: str
    """running, finished, stopped, failed, unknown, or damaged."""
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
    locks = held_locks()
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
    return _read_run(path, path.resolve().name, held_locks())


def _read_run(path: Path, name: str, locks: set[str]) -> RunFacts:
    age = _age(path)
    try:
        return _facts(path, name, age, locks)
    except (DataError, OSError) as error:
        why = str(error).removeprefix(f"{path}/")
        return RunFacts(name=name, path=str(path), state="damaged", why=why, age_seconds=age)


def _facts(path: Path, name: str, age: float | None, locks: set[str]) -> RunFacts:
    config = _config(path)
    run = _dict(config.get("run"))
    total, per_epoch = _integer(run.get("total_steps")), _integer(run.get("steps_per_epoch"))
    last, knn = _newest_records(path / "metrics.jsonl")
    saved = _saved_step(path / "checkpoints")
    ranks = _integer(run.get("world_size")) or len(heartbeat.ranks_in(path / "heartbeats"))
    step = max(_integer(last.get("step")) or 0, saved or 0)
    state = state_of(path, ranks, step, total, saved, locks)
    return RunFacts(
        name=name,
        path=str(path),
        state=state.name,
        why=state.why,
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


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
