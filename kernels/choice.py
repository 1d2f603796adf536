"""Which implementation of every kernel runs here, and why: recorded once, logged once.

A kernel that can run in several ways says so with :func:`record` when it has chosen. What was
chosen is said once in the log, at DEBUG; a fall back to a slower way is said once at WARNING, so
that no run is slow in silence. :func:`explain` tells all of it again, for ``--verbose``.
"""

import logging
from typing import NamedTuple

__all__ = ["Choice", "explain", "forget", "record"]

_log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """One line of :func:`explain`."""

    kernel: str
    implementation: str
    reason: str
    fallback: bool


_choices: dict[tuple[str, str, str], Choice] = {}


def record(kernel: str, implementation: str, reason: str, *, fallback: bool = False) -> None:
    """Note that ``kernel`` runs as ``implementation``; log it the first time it is noted.

    Cheap enough for every call. Inside ``torch.compile`` it does nothing: call it from the body of
    a custom operation, which is not traced.

    Args:
        kernel: what is computed: ``"ntxent"``, ``"augment"``, ``"lars"``.
        implementation: which way: ``"triton"``, ``"blocked"``.
        reason: why, as a phrase: ``"CUDA, bfloat16, D = 128"``.
        fallback: a faster way exists and cannot run here; ``reason`` says what is in its way.
    """
    import torch  # here, so that the command line can import this package for its help

    if torch.compiler.is_compiling() or (kernel, implementation, reason) in _choices:
        return
    _choices[kernel, implementation, reason] = Choice(kernel, implementation, reason, fallback)
    if fallback:
        _log.warning("%s: falling back to %s: %s", kernel, implementation, reason)
    else:
        _log.debug("%s: %s: %s", kernel, implementation, reason)


def explain() -> str:
    """All choices made so far by this process, one a line, in the order they were made."""
    if not _choices:
        return "no kernel has run yet"
    return "\n".join(
        f"{choice.kernel}: {choice.implementation}{' (fallback)' if choice.fallback else ''}"
        f": {choice.reason}"
        for choice in _choices.values()
    )


def forget() -> None:
    """Start over, as a new process would; for tests."""
    _choices.clear()
