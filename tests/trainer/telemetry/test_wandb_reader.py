"""Weights & Biases beside a run: absent, broken or hanging, training does not mind.

What the real library gets is in tests/peers/test_wandb.py.
"""

import contextlib
import importlib.util
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from launch.__main__ import main
from tests.said import error_line
from tests.test_architecture import FILES, ROOT
from tests.trainer.runs import pack_images
from trainer.telemetry import TelemetryConfig, wandb_reader
from trainer.telemetry.wandb_reader import WeightsAndBiases, refuse_missing


@contextlib.contextmanager
def reader_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, log: Callable[..., None]
) -> Iterator[WeightsAndBiases]:
    """Of a run whose W&B does ``log`` with a record."""
    library = types.SimpleNamespace(
        Settings=dict,
        setup=lambda settings: None,
        init=lambda **_: types.SimpleNamespace(log=log, finish=lambda: None),
        teardown=lambda: None,
    )
    monkeypatch.setitem(sys.modules, "wandb", library)
    (folder / "config.json").write_text("{}")
    yield WeightsAndBiases("project", folder, patience=2)


def test_it_is_off_unless_asked_for_and_only_its_thread_imports_it() -> None:
    assert TelemetryConfig().wandb is None
    refuse_missing(TelemetryConfig())
    importing = {
        file.relative_to(ROOT).as_posix()
        for file in FILES
        if "import wandb" in file.read_text() or "from wandb" in file.read_text()
    }
    assert importing == {"trainer/telemetry/wandb_reader.py"}
    assert "\nimport wandb" not in (ROOT / "trainer/telemetry/wandb_reader.py").read_text()


def test_asked_for_and_not_installed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        wandb_reader.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "wandb" else found(name, *rest),
    )
    data, out = pack_images(tmp_path, count=24), tmp_path / "run"
    words = ["--data.train", str(data), "--out", str(out), "--batch", "6"]
    assert main(["pretrain", "digits-demo", *words, "--telemetry.wandb", "mine"]) == 2
    assert "pip install wandb" in error_line(capsys.readouterr().err)
    assert not out.exists()
    with pytest.raises(ConfigError, match="name a project"):
        refuse_missing(TelemetryConfig(wandb="/"))


def refuse(*_: Any, **__: Any) -> None:
    raise RuntimeError("no key\nand more")


@pytest.mark.parametrize(
    ("does", "why"),
    [
        (refuse, "records: RuntimeError: no key;"),
        (lambda *_, **__: threading.Event().wait(), "records: it did not end within 2 s;"),
    ],
    ids=["refuses", "hangs"],
)
def test_what_goes_wrong_is_logged_once_and_holds_nothing_up(
    does: Callable[..., None],
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with reader_of(tmp_path, monkeypatch, does) as reader:
        began = time.monotonic()
        for step in range(1, 10):
            reader.read([{"step": step, "loss": 1.0}])
        assert time.monotonic() - began < 1  # whatever the thread does
        reader.close()
    assert time.monotonic() - began < 10
    assert caplog.text.count("W&B gets no more records") == 1
    assert why in caplog.text


def test_records_that_it_does_not_take_do_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wandb_reader, "_MOST_WAITING", 10)
    with reader_of(tmp_path, monkeypatch, lambda *_, **__: threading.Event().wait()) as reader:
        for step in range(1, 100):
            reader.read([{"step": step, "loss": 1.0}])
        assert reader._waiting.qsize() <= 10
        reader.close()
    assert caplog.text.count("W&B gets no more records") == 1


def test_a_disk_that_takes_no_file_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with reader_of(tmp_path, monkeypatch, lambda *_, **__: None) as reader:
        (tmp_path / "wandb").touch()
        reader.read([{"step": 1}])
        reader.read([{"step": 2}])
        reader.close()
    assert caplog.text.count("W&B gets no more records") == 1
