"""Signals become a flag."""

import os
import signal
from collections.abc import Iterator

import pytest

from launch.preemption import HANDLED_SIGNALS, StopSignal


@pytest.fixture(autouse=True)
def _restore_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in HANDLED_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", HANDLED_SIGNALS)
def test_a_signal_is_noted_and_the_process_goes_on(number: signal.Signals) -> None:
    stop = StopSignal().install()
    assert not stop()
    os.kill(os.getpid(), number)
    assert stop()
    assert stop.name == number.name


def test_further_signals_change_nothing() -> None:
    """torchrun sends its workers a second one after the terminal's."""
    stop = StopSignal().install()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    assert stop.name == "SIGINT"
