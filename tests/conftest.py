"""Configuration of every test session: one thread per process, and nothing left running."""

import os

# Several ranks share the machine's cores; one thread each keeps them from fighting, and keeps
# floating-point sums in one order. Set before the first import of torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import multiprocessing
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest_plugins = ["tests.reliability"]

torch.set_num_threads(1)

# A session that runs in the background was started with Ctrl-C ignored, which children inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _no_process_outlives_the_session() -> Iterator[None]:
    """A test that leaves a child of ``multiprocessing`` behind fails the session, by name."""
    yield
    left = multiprocessing.active_children()
    for process in left:
        process.kill()
        process.join()
    assert not left, f"processes left behind by tests: {[p.name for p in left]}"


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with nothing in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
