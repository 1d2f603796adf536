"""What a run wrote of its steps: ``metrics.jsonl``, and what happened on the way.

Shape suffixes: N recorded steps.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import DataError
from trainer.health.phases import PHASES, WAITS
from trainer.state.run_data import section

Metrics = Mapping[str, npt.NDArray[np.float64]]
"""Columns of ``metrics.jsonl``, NaN where a step has no value."""
_CURVES = (  # column of metrics.jsonl, what it is, factor
    ("loss", "Loss", 1.0),
    ("knn_top1", "Online kNN, top-1 (%)", 100.0),
    ("linear_top1", "Online linear, top-1 (%)", 100.0),
    ("lr", "Learning rate", 1.0),
    ("images_per_second", "Throughput (images/s)", 1.0),
    ("gradient_norm", "Gradient norm", 1.0),
    ("loader_wait_seconds", "Wait for data (ms a step)", 1000.0),
    ("feature_std", "Spread of projections", 1.0),
    ("effective_rank", "Effective rank", 1.0),
)
_EVALUATIONS = {"knn_top1", "linear_top1"}
_NO_CURVES = {"step", "epoch", "skipped", "substitutes", "knn_top5", "knn_best_top1"}


def accuracies(metrics: Metrics) -> list[tuple[str, str]]:
    """Columns that say how often an objective's task was solved, and their names in words."""
    others = _EVALUATIONS | _NO_CURVES
    names = [name for name in metrics if name.endswith("_top1") and name not in others]
    return [(name, f"{name.removesuffix('_top1').replace('_', ' ')} top-1") for name in names]


def curves(*runs: Metrics) -> list[tuple[str, str, float]]:
    """Of the columns that any of the runs has: name, heading, and the factor of its unit.

    Those that the program does not know are an objective's own, and come after its loss.
    """
    found = dict(told for metrics in runs for told in accuracies(metrics))
    own = [(name, f"{words.capitalize()} (%)", 100.0) for name, words in found.items()]
    known = _NO_CURVES | {name for name, *_ in (*_CURVES, *own)}
    others = dict.fromkeys(name for metrics in runs for name in metrics if name not in known)
    own += [(name, name.replace("_", " ").capitalize(), 1.0) for name in others]
    every = (_CURVES[0], *own, *_CURVES[1:])
    return [curve for curve in every if any(curve[0] in metrics for metrics in runs)]


@dataclass(frozen=True)
class PhaseTime:
    """How long a part of a step took, seconds a step, the mean of all readings."""

    name: str
    median: float
    """On the median rank."""
    slowest: float
    """On the slowest rank of each reading."""
    rank: int
    """Which one that was most often."""


@dataclass(frozen=True)
class Events:
    """What happened at which steps beside learning."""

    skipped: tuple[int, ...] = ()
    """Steps that were left out for non-finite gradients."""
    substitutes: tuple[int, ...] = ()
    """Steps by which more damaged samples had been replaced than before."""
    substitute_count: int = 0
    """Damaged samples that were replaced, in all."""


@dataclass(frozen=True)
class History:
    """A run's steps; without any, of a run that recorded none."""

    metrics: Metrics = field(default_factory=dict)
    events: Events = field(default_factory=Events)
    phases: tuple[PhaseTime, ...] = ()
    """In the order of a step; empty where the run recorded none."""

    @property
    def last_step(self) -> int:
        """The newest step that is recorded."""
        return int(self.metrics["step"][-1]) if self.metrics else 0


def read_history(run: Path) -> History:
    """What :func:`read_records` finds, for charts."""
    records = read_records(run)
    metrics = columns(records)
    readings = [record for record in records if isinstance(record.get("phase_seconds"), dict)]
    steps_N, none_N = metrics["step"].astype(int), np.zeros(len(records))
    skipped_N = np.nan_to_num(metrics.get("skipped", none_N)) > 0
    counts_N = np.maximum.accumulate(np.nan_to_num(metrics.get("substitutes", none_N)))
    events = Events(
        skipped=tuple(steps_N[skipped_N].tolist()),
        substitutes=tuple(steps_N[np.diff(counts_N, prepend=0.0) > 0].tolist()),
        substitute_count=int(counts_N[-1]),
    )
    return History(metrics, events, _phase_times(readings))


def read_records(run: Path) -> list[dict[str, Any]]:
    """Records of ``metrics.jsonl`` in the order of steps.

    A torn last line, of a run that is being written or was killed, is left out.

    Raises:
        DataError: there is no step yet, or another line is unreadable.
    """
    path = run / "metrics.jsonl"
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: not there yet") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            if number < len(lines):
                raise DataError(f"{path}: line {number} is no JSON object") from None
    records = [record for record in records if math.isfinite(number_in(record.get("step")))]
    if not records:
        raise DataError(f"{path}: holds no step yet")
    return sorted(records, key=lambda record: number_in(record["step"]))


def columns(records: Sequence[Mapping[str, Any]]) -> Metrics:
    """The numbers of records by name (N,), NaN where a record has none or an infinite one."""
    keys = dict.fromkeys(key for record in records for key in record)
    found = {}
    for key in keys:
        column_N = np.array([number_in(record.get(key)) for record in records], np.float64)
        column_N[~np.isfinite(column_N)] = np.nan
        if np.isfinite(column_N).any():
            found[key] = column_N
    return found


def number_in(value: Any) -> float:
    """A JSON value as a number; NaN where it is none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def running_mean(values_N: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Mean over a fiftieth of the run around each value, narrower at both ends."""
    half = max(1, len(values_N) // 100)
    sums = np.concatenate([[0.0], np.cumsum(values_N)])
    centre = np.arange(len(values_N))
    reach = np.minimum(half, np.minimum(centre, len(values_N) - 1 - centre))
    return (sums[centre + reach + 1] - sums[centre - reach]) / (2 * reach + 1)


def _phase_times(readings: Sequence[Mapping[str, Any]]) -> tuple[PhaseTime, ...]:
    found = []
    for phase in (*PHASES, WAITS):
        parts = [section(reading["phase_seconds"], phase) for reading in readings]
        medians = [number_in(part.get("median")) for part in parts]
        slowest = [number_in(part.get("max")) for part in parts]
        if parts and np.isfinite(medians).any() and np.isfinite(slowest).any():
            ranks = Counter(part["rank"] for part in parts if type(part.get("rank")) is int)
            rank = ranks.most_common(1)[0][0] if ranks else 0
            found.append(
                PhaseTime(phase, float(np.nanmean(medians)), float(np.nanmean(slowest)), rank)
            )
    return tuple(found)
