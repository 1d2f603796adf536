"""Where a process waits for the others: named, so that a watcher can say what it is stuck in.

A collective stands in ``with waiting("..."):``. While nobody watches that costs one look at a
global. It stands here, below the trainer, because kernels have collectives too.
"""

from typing import Protocol


class Observer(Protocol):
    """Is told of every wait of this process, in the thread that waits."""

    def begin(self, name: str) -> None:
        """The process is about to wait in the collective ``name``."""

    def end(self) -> None:
        """It has returned. Not told where it raised: that is where the process ends."""


_observer: Observer | None = None


def observe(observer: Observer | None) -> None:
    """Tell ``observer`` of all waits from now on, and nobody else; ``None``: nobody."""
    global _observer
    _observer = observer


class waiting:  # noqa: N801 - reads as a statement
    """A context in which this process waits for others.

    Args:
        name: of the collective, for a person: "batch norm: all-gather of statistics".
    """

    __slots__ = ("_name", "_told")

    def __init__(self, name: str) -> None:
        self._name = name
        self._told: Observer | None = None

    def __enter__(self) -> None:
        self._told = _observer
        if self._told is not None:
            self._told.begin(self._name)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._told is not None and kind is None:
            self._told.end()
