"""Compiled code is kept on disk where it can be, and a run goes on without where it cannot."""

import importlib.util
import logging
from pathlib import Path

import pytest
from numba.core import config

from common import compiled
from tests.trainer.disks import small_tmpfs

SOURCE = """
from common.compiled import compiled

@compiled(nogil=True)
def doubled(x):
    return 2 * x
"""


def double(folder: Path) -> int:
    """2 * 21, by a function of a module in ``folder``, as a new process compiles or loads it."""
    path = folder / "doubling.py"
    if not path.exists():
        path.write_text(SOURCE)
    compiled._say.cache_clear()
    compiled._announce.cache_clear()
    spec = importlib.util.spec_from_file_location("doubling", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result: int = module.doubled(21)
    return result


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "common")
    return caplog


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_code_is_kept_for_the_next_process(
    tmp_path: Path, cache: Path, said: pytest.LogCaptureFixture
) -> None:
    assert double(tmp_path) == 42
    (kept,) = cache.rglob("*.nbc")
    written = kept.stat().st_mtime_ns
    assert double(tmp_path) == 42
    assert kept.stat().st_mtime_ns == written
    assert not said.messages


def test_what_takes_long_to_compile_is_said_when_it_is_compiled(
    tmp_path: Path, cache: Path, said: pytest.LogCaptureFixture
) -> None:
    long = SOURCE.replace("compiled(nogil", 'compiled("the doubling", nogil')
    (tmp_path / "doubling.py").write_text(long)
    assert double(tmp_path) == 42
    (line,) = said.messages
    assert line.startswith("compiling the doubling for this processor: once, some")
    said.clear()
    assert double(tmp_path) == 42
    assert not said.messages


def test_nothing_that_can_be_written_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(config, "CACHE_DIR", "")
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "__pycache__").touch()  # no folder, which stops root too
    assert double(tmp_path) == 42
    (line,) = said.messages
    assert "name one in NUMBA_CACHE_DIR" in line


def test_a_full_disk_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    with small_tmpfs(tmp_path / "disk", 1 << 16) as disk:
        (disk / "filler").write_bytes(b"\0" * ((1 << 16) - 4096))
        monkeypatch.setattr(config, "CACHE_DIR", str(disk))
        assert double(tmp_path) == 42
    (line,) = said.messages
    assert "No space left on device" in line and str(disk) in line


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_a_file_torn_by_a_crash_is_said(
    suffix: str, tmp_path: Path, cache: Path, said: pytest.LogCaptureFixture
) -> None:
    assert double(tmp_path) == 42
    for kept in cache.rglob(f"*.{suffix}"):
        kept.write_bytes(b"")
    assert double(tmp_path) == 42
    (line,) = said.messages
    assert f"cannot be kept in {cache}" in line
