"""Signals become a flag, and a marker for the batch script."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.preemption import HANDLED_SIGNALS, MARKER_VARIABLE, StopSignal, write_marker


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


def test_the_marker_is_written_where_the_batch_script_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(MARKER_VARIABLE, raising=False)
    assert not write_marker()
    monkeypatch.setenv(MARKER_VARIABLE, str(tmp_path / "with space" / ".." / "marker"))
    (tmp_path / "with space").mkdir()
    assert write_marker()
    assert (tmp_path / "marker").exists()
