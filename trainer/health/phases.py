"""Where a rank is in its step, and how long it has been in each part of it.

The watchdog's thread looks at :attr:`Phases.place`, and every few steps the ranks compare the
seconds of :meth:`Phases.harvest`: on a GPU those of CUDA events, which are read when the telemetry
waits for the device anyway.

A rank's own work is what is left of a phase without its waits for other ranks
(:mod:`common.collectives`): without that, one slow rank makes all ranks look slow. What is inside a
backend cannot be told apart: on GPUs the synchronised BatchNorm is torch's, whose exchanges count
as forward and backward. There a slow GPU shows in augmentation and optimizer, which have none.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

PHASES = ("loader", "augment", "forward", "backward", "optimizer", "other")
"""Parts of a step, each with the rank's own work; the loss belongs to the forward pass."""
WAITS = "collectives"
"""Time in which a rank waited for others, in all phases together."""

_MOST_SPANS = 100_000  # between two harvests; what comes after is not timed


class Place(NamedTuple):
    """What the main thread did last."""

    step: int
    """The step that it is in, from 1; 0: before the first."""
    phase: str
    waiting: str
    """The collective that it is in; empty outside of them."""
    since: float
    """``time.monotonic()`` when it came there."""
    patient: bool
    """Whether it may take long: the first step, an evaluation, a checkpoint."""


class Phases:
    """Time by phase of this rank, and its present place; an :class:`common.collectives.Observer`.

    All methods but :attr:`place` belong to the main thread; on a GPU waits of the backward pass
    come from autograd's, while the main one is blocked. Nothing is ``timed`` if nobody harvests.
    """

    def __init__(self, device: torch.device, timed: bool = True) -> None:
        self._timed, self._on_gpu = timed, device.type == "cuda"
        self.place = Place(0, "start", "", time.monotonic(), patient=True)
        self.typical_step = 0.0
        """Running mean of a step, seconds; 0 before the second step."""
        self._spans: list[tuple[int, Any, Any, bool]] = []
        self._phase: int | None = None
        self._phase_began: Any = None
        self._wait_began: Any = None
        self._steps = 0
        self._step_began: float | None = None
        self._seconds_aside = 0.0
        self._aside_since: float | None = None

    def step(self, step: int) -> None:
        """Step ``step``, from 1, begins, with its wait for the loader."""
        now = time.monotonic()
        first = self.place.step == 0
        if self._step_began is not None:
            took = self.clock() - self._step_began
            known = self.typical_step
            self.typical_step = took if not known else 0.9 * known + 0.1 * took
            self._steps += 1
        # The first step compiles kernels and fills caches: it says nothing of those that follow.
        self._step_began = None if first else self.clock()
        self.place = Place(step, "loader", "", now, patient=first)
        self._open(0 if self._timed and not first else None)

    def enter(self, phase: str) -> None:
        """A phase of :data:`PHASES` begins, and the one before ends."""
        self.place = self.place._replace(phase=phase, waiting="", since=time.monotonic())
        if self._phase is not None:
            self._open(PHASES.index(phase))

    def _moment(self) -> Any:
        """Now; on a GPU a place in its own queue of work, for which nothing waits."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _open(self, phase: int | None) -> None:
        moment = None if phase is None and self._phase is None else self._moment()
        self._close_wait(moment)
        if self._phase is not None:
            self._note(self._phase, self._phase_began, moment, False)
        self._phase, self._phase_began = phase, moment

    @contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """Work that belongs to no step and may take long: an evaluation, a checkpoint."""
        before, counted = self.place, self._phase
        self._open(None)
        started = self._aside_since = time.monotonic()
        self.place = before._replace(phase=name, waiting="", since=started, patient=True)
        try:
            yield
        finally:
            now = time.monotonic()
            self._seconds_aside += now - started
            self._aside_since = None
            self.place = before._replace(since=now, waiting="")
            if counted is not None:
                self._open(counted)

    def clock(self) -> float:
        """Seconds as of ``time.monotonic()`` which stand still while work is aside."""
        now = time.monotonic() if self._aside_since is None else self._aside_since
        return now - self._seconds_aside

    def begin(self, name: str) -> None:
        """See :class:`common.collectives.Observer`."""
        self.place = self.place._replace(waiting=name, since=time.monotonic())
        if self._phase is not None:
            self._close_wait(self._moment())
            self._wait_began = self._moment()

    def end(self) -> None:
        """See :class:`common.collectives.Observer`."""
        self.place = self.place._replace(waiting="", since=time.monotonic())
        if self._wait_began is not None:
            self._close_wait(self._moment())

    def _close_wait(self, moment: Any) -> None:
        if self._wait_began is not None and self._phase is not None:
            self._note(self._phase, self._wait_began, moment, True)
        self._wait_began = None

    def _note(self, phase: int, first: Any, second: Any, waited: bool) -> None:
        if len(self._spans) < _MOST_SPANS:
            self._spans.append((phase, first, second, waited))

    def watch_gradients(self, model: nn.Module) -> None:
        """Count what follows the gradient of the first parameter as waiting for the others.

        DistributedDataParallel averages gradients while the backward pass runs, and waits for the
        rest at its end, inside torch. The first parameter's gradient is the last one computed.
        """
        first = next((p for p in model.parameters() if p.requires_grad), None)
        if first is not None:
            first.register_hook(self._last_gradient)

    def _last_gradient(self, gradient: torch.Tensor) -> None:
        if self.place.phase == "backward":
            self.begin("gradients: all-reduce")

    @property
    def steps(self) -> int:
        """Steps that were timed since the last harvest."""
        return self._steps

    def harvest(self) -> list[float]:
        """A step's mean seconds since the last harvest, in each of :data:`PHASES` and in waits.

        Waits for the device; call it where the telemetry does so anyway.
        """
        self._open(self._phase)  # what is over of it counts too
        steps, spans = max(self._steps, 1), self._spans
        self._steps, self._spans = 0, []
        seconds = [0.0] * (len(PHASES) + 1)
        for phase, first, second, waited in spans:
            took = _seconds(first, second)
            seconds[phase] += -took if waited else took
            if waited:
                seconds[-1] += took
        return [max(s, 0.0) / steps for s in seconds]


def _seconds(first: Any, second: Any) -> float:
    """From one moment to another."""
    if isinstance(first, float):
        return float(second - first)
    second.synchronize()
    return float(first.elapsed_time(second)) / 1000
