"""Weights & Biases beside a run: absent, broken or hanging, training does not mind.

What the real library gets is in tests/peers/test_wandb.py.
"""

import importlib.util
import os
import time
from pathlib import Path

import pytest

from launch.__main__ import main
from tests.said import error_line
from tests.test_architecture import FILES, ROOT
from tests.trainer.runs import pack_images
from trainer.errors import ConfigError
from trainer.telemetry import TelemetryConfig, wandb_reader
from trainer.telemetry.wandb_reader import WeightsAndBiases, refuse_missing

# Stands in for the library: what `import wandb` gives the sender.
HANGS = "import time; time.sleep(600)"
REFUSES = "def init(**_): raise RuntimeError('no key\\nand more')\nSettings = dict"
DIES = "import os; os._exit(9)"


def start(folder: Path, library: str, monkeypatch: pytest.MonkeyPatch) -> WeightsAndBiases:
    (folder / "library").mkdir()
    (folder / "library" / "wandb.py").write_text(library)
    monkeypatch.setenv("PYTHONPATH", str(folder / "library"))
    run = folder / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    return WeightsAndBiases("project", run, patience=2)


def test_it_is_off_unless_asked_for_and_only_the_sender_imports_it() -> None:
    assert TelemetryConfig().wandb is None
    refuse_missing(TelemetryConfig())
    importing = {
        file.relative_to(ROOT).as_posix()
        for file in FILES
        if "import wandb" in file.read_text() or "from wandb" in file.read_text()
    }
    assert importing == {"trainer/wandb_sender.py"}


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


@pytest.mark.parametrize(
    ("library", "why"),
    [
        (REFUSES, "ended with status 1 (RuntimeError: no key)"),
        (DIES, "ended with status 9"),
        (HANGS, "did not end within 2 s"),
    ],
    ids=["refuses", "dies", "hangs"],
)
def test_what_goes_wrong_is_logged_once_and_nothing_is_left(
    library: str,
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    reader = start(tmp_path, library, monkeypatch)
    reader.read([{"step": 1}])
    sender = reader._sender
    assert sender is not None
    if library != HANGS:
        sender.wait(timeout=60)
    began = time.monotonic()
    for step in range(2, 10):
        reader.read([{"step": step}])
    assert time.monotonic() - began < 1  # whatever the sender does
    reader.close()
    assert caplog.text.count("W&B gets no more records") == 1
    assert why in caplog.text
    with pytest.raises(ProcessLookupError):
        os.kill(sender.pid, 0)


def test_a_disk_that_takes_no_file_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reader = start(tmp_path, HANGS, monkeypatch)
    (tmp_path / "run" / "wandb").touch()
    reader.read([{"step": 1}])
    reader.read([{"step": 2}])
    reader.close()
    assert caplog.text.count("W&B gets no more records") == 1
