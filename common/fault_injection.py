"""Fault points: places in the code where a test, or a user, can make something go wrong.

A point is a line such as ``faults.at("checkpoint.rename")``. It costs one look at a global while
nothing is armed. Faults are armed by the environment variable ``WIDEBATCH_FAULTS``, separated by
``;``, each a point, conditions, and an action::

    checkpoint.rename rank=0 pass=2 kill; step.backward rank=1 pass=3-5 nan; step.start sleep:1

============== ==================================================================
``rank=R``     on that rank only; by default on all
``pass=N``     the N-th time that the process comes by, from 1: ``N``, ``N-M`` or ``N+``; default 1
``attempt=A``  only after A restarts by torchrun or Slurm; by default always
``kill``       SIGKILL to the own process
``stop``       SIGSTOP to the own process: it hangs until SIGCONT
``raise:NAME`` OSError with the errno of that name, such as ENOSPC
``sleep:S``    wait S seconds
``nan``        the tensor at a point that has one becomes NaN
============== ==================================================================

It stands here, below everything, because loader and trainer have points alike.
"""

import errno
import logging
import math
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

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

_PLACE = re.compile(r"(rank|attempt)=(\d{1,9})")
_PASS = re.compile(r"pass=([1-9]\d{0,8})(?:(\+)|-([1-9]\d{0,8}))?")
_SECONDS = re.compile(r"\d{1,6}(\.\d{1,6})?")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens at a point, and when."""

    point: str
    action: str
    """kill, stop, raise, sleep or nan."""
    first: int = 1
    """Passing of the point, from 1, at which it happens first."""
    last: float = 1
    """Passing at which it happens last; infinity: at all from the first on."""
    rank: int | None = None
    attempt: int | None = None
    errno: int = 0
    seconds: float = 0.0


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
        DataError: the variable cannot be understood; says which word, and what is possible.
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
    return [_parse_one(part) for part in text.split(";") if part.strip()]


def _parse_one(text: str) -> Fault:
    point, *words = text.split()
    if point not in POINTS and point not in TENSOR_POINTS:
        known = ", ".join(sorted({*POINTS, *TENSOR_POINTS}))
        raise DataError(f"{VARIABLE}: {point!r} is no fault point; there are {known}")
    found: dict[str, Any] = {}
    for word in words:
        values = _condition(word) if "=" in word else _action(word, point)
        if found.keys() & values.keys():
            raise DataError(f"{VARIABLE}: {word!r} says twice what {text.strip()!r} has said")
        found |= values
    if "action" not in found:
        raise DataError(f"{VARIABLE}: {text.strip()!r} names no action, such as kill")
    return Fault(point=point, **found)


def _condition(word: str) -> dict[str, Any]:
    if place := _PLACE.fullmatch(word):
        return {place[1]: int(place[2])}
    if passes := _PASS.fullmatch(word):
        first = int(passes[1])
        return {"first": first, "last": math.inf if passes[2] else int(passes[3] or first)}
    raise DataError(
        f"{VARIABLE}: {word!r} is no condition; there are rank=R, attempt=A, and pass=N,"
        " pass=N-M or pass=N+ from 1"
    )


def _action(word: str, point: str) -> dict[str, Any]:
    action, _, value = word.partition(":")
    if word in ("kill", "stop") or (word == "nan" and point in TENSOR_POINTS):
        return {"action": word}
    if action == "raise" and re.fullmatch("E[A-Z0-9]+", value) and hasattr(errno, value):
        return {"action": action, "errno": getattr(errno, value)}
    if action == "sleep" and _SECONDS.fullmatch(value):
        return {"action": action, "seconds": float(value)}
    raise DataError(
        f"{VARIABLE}: {word!r} is no action at {point}; there are kill, stop, raise:ENOSPC (any"
        f" errno's name), sleep:SECONDS{', nan' if point in TENSOR_POINTS else ''}"
    )


def _act(fault: Fault) -> None:
    log.warning("fault injected: %s at %s", fault.action, fault.point)
    if fault.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.action == "sleep":
        time.sleep(fault.seconds)
    elif fault.action == "raise":
        reason = f"{os.strerror(fault.errno)} (fault injected at {fault.point})"
        raise OSError(fault.errno, reason)
