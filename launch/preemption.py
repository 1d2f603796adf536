"""Signals end a process at once, until there is something to save; then they become a flag.

Nothing is saved in a signal handler: a collective or a file write there could deadlock or tear.
The handler notes the signal, every rank hears of it through the flags that ranks agree on each
step, and all of them save at the end of the same step.

Python runs handlers in the main thread, and not while that is in native code: joining a process
group, compiling, waiting for a device. A thread therefore sees to it that a process which is to end
does: the interpreter writes the numbers of signals to a pipe as they come.
"""

import atexit
import contextlib
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

from launch import restarts
from launch.exit_codes import ExitCode

HANDLED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

_PATIENCE = 3.0  # seconds until a main thread that has not handled a signal is taken to hear none


class EndAtOnce:
    """A context in which Ctrl-C ends this process, wherever it is.

    The first raises KeyboardInterrupt, so that files are closed and temporary ones taken away; the
    second, or native code that lets none through, ends the process as it stands.
    """

    signals: tuple[signal.Signals, ...] = (signal.SIGINT,)
    code = ExitCode.INTERRUPTED
    """The exit status where no exception can bring it."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._heard = 0.0
        self._before: dict[signal.Signals, Any] = {}
        self._pipe: int | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self  # no signal comes here
        self._before = {number: signal.signal(number, self._handle) for number in self.signals}
        atexit.register(self._hear_no_more)
        reading, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        threading.Thread(target=self._watch, args=(reading,), name="signals", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)  # launch.devices blocked them
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop_watching()
        if self._name is None:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _hear_no_more(self) -> None:
        """A further Ctrl-C shall not change the status while the interpreter ends."""
        if self._name is not None:  # also where it came before `with` had begun
            for number in self.signals:
                signal.signal(number, signal.SIG_IGN)

    def _stop_watching(self) -> None:
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._pipe)
            self._pipe = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._heard = time.monotonic()
        if self._name is not None:
            self._end()
        self._name = signal.Signals(number).name
        raise KeyboardInterrupt

    def _watch(self, pipe: int) -> None:
        with open(pipe, "rb", buffering=0) as coming:
            while numbers := coming.read(64):
                came = time.monotonic()
                if set(numbers) & set(self.signals):
                    time.sleep(_PATIENCE)
                    # Of signals that come together the handler hears once.
                    if self._pipe is not None and self._heard < came - 1:
                        self._end()

    def _end(self) -> None:
        os._exit(self.code)


class StopSignal(EndAtOnce):
    """What a run does with signals: the first ends it, at once before its first step.

    From the first call on there is something to save, and signals are noted. A second one does not
    kill: torchrun sends its workers one signal more than the terminal does, and the checkpoint on
    its way must not be lost to it. SIGQUIT (Ctrl-\\) ends at once.
    """

    signals = HANDLED_SIGNALS
    code = ExitCode.PREEMPTED

    def __init__(self) -> None:
        super().__init__()
        self._saves = False

    @property
    def name(self) -> str | None:
        """Name of the first signal, ``None`` while there was none."""
        return self._name

    def __call__(self) -> bool:
        """Whether this process was asked to stop; from now on a signal means a checkpoint."""
        if not self._saves:
            self._saves = True
            self._stop_watching()
        return self._name is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self._saves:
            if self._name is None:
                say(f"{name} before a first step: nothing to save; the same command goes on")
            super()._handle(number, frame)
        elif self._name is None:
            self._name = name
            say(f"{name}: a checkpoint follows at this step's end")
        elif not _by_torchrun():
            say(f"{name} again: the checkpoint is on its way; Ctrl-\\ ends at once, without it")

    def _end(self) -> None:
        restarts.record(self.code)
        super()._end()


def _by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def say(text: str) -> None:
    """One line, where a progress bar may stand; rank 0 alone, for a terminal signals all ranks."""
    if os.environ.get("RANK", "0") == "0":
        line = f"\r\x1b[K{text}\n" if os.isatty(2) else f"{text}\n"
        with contextlib.suppress(OSError):  # the terminal is gone: SIGHUP's companions
            os.write(2, line.encode())  # safe in a handler; print could re-enter itself
