"""Signals become a flag; the trainer turns the flag into a checkpoint.

Nothing is saved in a signal handler: a collective or a file write there could deadlock or tear.
The handler notes the signal, every rank hears of it through the flags that ranks agree on each
step, and all of them save at the end of the same step.
"""

import os
import signal
from types import FrameType

HANDLED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """The first of the handled signals that arrived, if any; later ones change nothing.

    A second Ctrl-C does not kill: torchrun sends its workers one signal more than the terminal
    does, and the checkpoint on its way must not be lost to it. SIGQUIT (Ctrl-\\) ends at once.
    """

    def __init__(self) -> None:
        self._name: str | None = None

    def install(self) -> "StopSignal":
        """Handle the signals from now on; call in the main thread, before heavy imports."""
        for number in HANDLED_SIGNALS:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._name is None:
            self._name = signal.Signals(number).name
            # os.write is safe in a handler; print could re-enter a half-finished one.
            os.write(2, f"\n{self._name}: a checkpoint follows at this step's end\n".encode())

    @property
    def name(self) -> str | None:
        """Name of the signal, ``None`` while there was none."""
        return self._name

    def __call__(self) -> bool:
        """Whether this process was asked to stop."""
        return self._name is not None
