"""Fault points: places in the code where a test, or a user, can make something go wrong.

A point is a line such as ``faults.at("checkpoint.rename")``. It costs one look at a global while
nothing is armed. Faults are armed by the environment variable ``WIDEBATCH_FAULTS``, a JSON list of
:class:`Fault`::

    [{"point": "checkpoint.rename", "rank": 0, "first": 2, "last": 2, "action": "kill"}]

It stands here, below everything, because loader and trainer have points alike.
"""

import errno
import json
import logging
import math
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from common.errors import DataError

log = logging.getLogger(__name__)

VARIABLE = "WIDEBATCH_FAULTS"

POINTS: Mapping[str, str] = {
    "checkpoint.copy": "before a checkpoint's tensors are copied to the host",
    "checkpoint.folder": "before the temporary folder of a checkpoint is made",
    "checkpoint.write": "before each piece that is written into a checkpoint's file",
    "checkpoint.sync": "before each flush of a checkpoint's file to disk",
    "checkpoint.manifest": "before the manifest is written, after all other files",
    "checkpoint.rename": "before a complete checkpoint gets its name",
    "checkpoint.renamed": "after a complete checkpoint got its name, before latest.json names it",
    "checkpoint.point": "before latest.json or best.json is replaced",
    "checkpoint.retire": "before each old checkpoint is deleted",
    "step.start": "before each step, when its batch is there",
}
"""Every point of the code by name, and where it stands. Both ways are held by a test."""

TENSOR_POINTS: Mapping[str, str] = {
    "step.backward": "the loss that each backward pass starts from; NaN makes the gradients NaN",
}
"""The same for points at a tensor, where the action ``nan`` is possible."""

Action = Literal["kill", "stop", "raise", "sleep", "nan"]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens at a point, and when."""

    point: str
    action: Action
    """SIGKILL or SIGSTOP to the own process; an OSError; a wait; NaN in a tensor."""
    first: int = 1
    """Passing of the point, from 1, at which it happens first."""
    last: float = 1
    """Passing at which it happens last; infinity: at all from the first on."""
    rank: int | None = None
    """On that rank only; None: on all."""
    attempt: int | None = None
    """Only after so many restarts by torchrun or Slurm; None: always."""
    errno: str = "EIO"
    """Of the OSError."""
    seconds: float = 0.0
    """Of the wait."""

    def __post_init__(self) -> None:
        if self.point not in POINTS and self.point not in TENSOR_POINTS:
            known = ", ".join(sorted({*POINTS, *TENSOR_POINTS}))
            raise ValueError(f"{self.point!r} is no fault point; there are {known}")
        needs_tensor = self.action == "nan" and self.point not in TENSOR_POINTS
        if needs_tensor or self.action not in get_args(Action):
            raise ValueError(f"{self.action!r} is no action at {self.point}")
        if not hasattr(errno, self.errno):
            raise ValueError(f"{self.errno!r} is no errno")


_armed: tuple[Fault, ...] = ()
_passes: Counter[str] = Counter()
_lock = threading.Lock()  # points are passed by several threads


def _due(point: str) -> list[Fault]:
    with _lock:
        _passes[point] += 1
        passing = _passes[point]
    return [f for f in _armed if f.point == point and f.first <= passing <= f.last]


def at(point: str) -> None:
    """A fault point. Does nothing unless a fault of that name is armed and due.

    Raises:
        OSError: as armed.
    """
    if _armed:
        for fault in _due(point):
            _act(fault)


def tensor(point: str, value: T) -> T:
    """A fault point at a floating-point tensor: ``value``, or its product with NaN if so armed."""
    if _armed:
        for fault in _due(point):
            if fault.action == "nan":
                log.warning("fault injected: %s at %s", fault.action, point)
                value = value * math.nan  # type: ignore[operator,assignment]
            else:
                _act(fault)
    return value


def arm(faults: Sequence[Fault]) -> None:
    """Arm ``faults`` in this process in place of those that were, and count passings from 0."""
    global _armed
    _armed = tuple(faults)
    _passes.clear()
    if faults:
        log.warning("faults are armed: %s", "; ".join(f"{f.point} {f.action}" for f in faults))


def arm_from(environ: Mapping[str, str] = os.environ, rank: int = 0) -> None:
    """Arm what ``WIDEBATCH_FAULTS`` says for this rank; disarm where it is not set.

    Args:
        environ: the process's environment.
        rank: of this process among all of the run.

    Raises:
        DataError: the variable cannot be understood.
    """
    restarts = sum(
        int(environ[name])
        for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
        if environ.get(name, "").isdigit()
    )
    arm(
        [
            fault
            for fault in parse(environ.get(VARIABLE, ""))
            if fault.rank in (None, rank) and fault.attempt in (None, restarts)
        ]
    )


def parse(text: str) -> list[Fault]:
    """Faults of a text as in the module's docstring; none in an empty one.

    Raises:
        DataError: see :func:`arm_from`.
    """
    try:
        return [Fault(**each) for each in json.loads(text or "[]")]
    except (ValueError, TypeError) as error:
        raise DataError(f"{VARIABLE}: {error}; see common/fault_injection.py") from None


def _act(fault: Fault) -> None:
    log.warning("fault injected: %s at %s", fault.action, fault.point)
    if fault.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.action == "sleep":
        time.sleep(fault.seconds)
    elif fault.action == "raise":
        number = getattr(errno, fault.errno)
        reason = f"{os.strerror(number)} (fault injected at {fault.point})"
        raise OSError(number, reason)
