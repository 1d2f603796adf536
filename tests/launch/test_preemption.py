"""A signal ends a process at once, until there is something to save: then it becomes a flag."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest

from launch.exit_codes import ExitCode
from launch.preemption import HANDLED_SIGNALS, EndAtOnce, StopSignal


@pytest.fixture(autouse=True)
def _restore_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in HANDLED_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", HANDLED_SIGNALS)
def test_a_signal_after_the_first_step_is_noted_and_the_process_goes_on(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    with StopSignal() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        assert stop.name == number.name
    assert capfd.readouterr().err == f"{number.name}: a checkpoint follows at this step's end\n"


@pytest.mark.parametrize("number", HANDLED_SIGNALS)
def test_a_signal_before_the_first_step_ends_at_once(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt), StopSignal():
        os.kill(os.getpid(), number)
    said = f"{number.name} before a first step: nothing to save; the same command goes on\n"
    assert capfd.readouterr().err == said


def test_further_signals_do_not_lose_the_checkpoint_and_are_answered(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with StopSignal() as stop:
        stop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.name == "SIGINT"
    first, *further = capfd.readouterr().err.splitlines()
    assert first == "SIGINT: a checkpoint follows at this step's end"
    assert [line.partition(":")[0] for line in further] == ["SIGTERM again", "SIGINT again"]
    # torchrun sends its workers a second one after the terminal's; and one process speaks for all
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with StopSignal() as stop:
        stop()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == "SIGINT: a checkpoint follows at this step's end\n"
    monkeypatch.setenv("RANK", "1")
    with StopSignal() as stop:
        stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
    assert not capfd.readouterr().err


def test_handlers_are_those_of_before_where_no_signal_came() -> None:
    before = signal.getsignal(signal.SIGINT)
    with EndAtOnce():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize(
    ("kind", "number", "code"),
    [
        ("EndAtOnce", signal.SIGINT, ExitCode.INTERRUPTED),
        ("StopSignal", signal.SIGTERM, ExitCode.PREEMPTED),
    ],
)
def test_a_process_in_native_code_ends_too(
    kind: str, number: signal.Signals, code: ExitCode
) -> None:
    text = f"""
        import ctypes
        from threading import Timer
        from launch.preemption import {kind}
        with {kind}():
            libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
            Timer(1.0, print, ["ready"], {{"flush": True}}).start()
            libc.pthread_mutex_lock(mutex)
            libc.pthread_mutex_lock(mutex)  # its own lock: for ever, and no signal ends it
        """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(text)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(60) == code
    finally:
        process.kill()


@pytest.mark.parametrize("first", ["", "signal.pthread_sigmask(signal.SIG_BLOCK, [2]); kill()"])
def test_a_further_signal_while_the_interpreter_ends_changes_no_status(first: str) -> None:
    """Also where the one before had waited for the handlers: it comes before ``with``'s body."""
    text = f"""
        import os, signal, sys
        from functools import partial
        from launch.preemption import StopSignal
        kill = partial(os.kill, os.getpid(), signal.SIGINT)
        class Last:
            def __del__(self, kill=kill):  # Python has put its handlers away by then
                kill()
        sys.last = Last()
        {first}
        try:
            with StopSignal():
                kill()
        except KeyboardInterrupt:
            sys.exit(75)
        """
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(text)], timeout=60)
    assert process.returncode == ExitCode.PREEMPTED
