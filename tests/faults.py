"""Faults in a line of text, for tests: ``point [rank=R] [attempt=A] [pass=N] action; ...``.

``pass=N`` is the N-th time that the process comes by: ``N``, ``N-M`` or ``N+``; by default the
first. Actions are ``kill``, ``stop``, ``nan``, ``raise:ENOSPC`` and ``sleep:SECONDS``.
"""

import json
import math
from dataclasses import asdict
from typing import Any

from common.fault_injection import Fault


def parse(text: str) -> list[Fault]:
    """The faults of a text."""
    return [_parse_one(part) for part in text.split(";") if part.strip()]


def armed(text: str) -> str:
    """What arms the faults of a text, as the environment variable has it."""
    return json.dumps([asdict(fault) for fault in parse(text)])


def _parse_one(text: str) -> Fault:
    point, *words = text.split()
    found: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        action, _, detail = word.partition(":")
        if name == "pass":
            first, _, last = value.rstrip("+").partition("-")
            found |= {"first": int(first), "last": int(last or first)}
            if value.endswith("+"):
                found["last"] = math.inf
        elif value:
            found[name] = int(value)
        else:
            found["action"] = action
            if action == "raise":
                found["errno"] = detail
            elif action == "sleep":
                found["seconds"] = float(detail)
    return Fault(point=point, **found)
