"""The real Weights & Biases, offline: what it wrote to disk is what the run said."""

import dataclasses
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.disks import small_tmpfs
from tests.trainer.runs import SMALL_ENCODER, metrics, pack_images, train_all
from tests.trainer.tiny import tiny_config
from trainer.features.online_knn import OnlineKnnConfig
from trainer.telemetry import TelemetryConfig
from trainer.telemetry.wandb_reader import WeightsAndBiases

_BLOCK = 1 << 15  # of LevelDB's log format, which .wandb files have after a head of 7 bytes
_FIRST, _MIDDLE, _LAST = 2, 3, 4


def records_in(path: Path) -> list[Any]:
    """The messages of a ``.wandb`` file, in order."""
    from wandb.proto import wandb_internal_pb2

    content = path.read_bytes()
    assert content.startswith(b":W&B")
    position, message, found = 7, b"", []
    while position + 7 <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < 7:
            position += left
            continue
        length = int.from_bytes(content[position + 4 : position + 6], "little")
        kind = content[position + 6]
        message += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind not in (_FIRST, _MIDDLE):
            found.append(wandb_internal_pb2.Record.FromString(message))
            message = b""
    return found


def starts_of(run: Path) -> list[list[Any]]:
    """What each start of the run wrote, in the order of the starts."""
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda p: p.stat().st_ctime)
    return [records_in(path) for path in files]


def name_of(item: Any) -> str:
    return str(item.nested_key[0] if item.nested_key else item.key)


def history(records: list[Any]) -> list[dict[str, Any]]:
    rows = [r.history for r in records if r.WhichOneof("record_type") == "history"]
    return [{name_of(item): json.loads(item.value_json) for item in row.item} for row in rows]


def begun(records: list[Any]) -> Any:
    return next(r.run for r in records if r.WhichOneof("record_type") == "run")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped and went on; each start is another process of W&B."""
    folder = tmp_path_factory.mktemp("wandb")
    config = dataclasses.replace(
        tiny_config(pack_images(folder, count=48), folder / "run", steps=4),
        encoder=SMALL_ENCODER,
        knn=OnlineKnnConfig(every_epochs=1),
        telemetry=TelemetryConfig(tensorboard=False, log_every=1, wandb="team/proj"),
    )
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, test=config.data.train)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_API_KEY", "hunter2-" + "0" * 32)
        assert train_all(1, [(config, 3), (config, 0)]) == ["stopped", "done"]
    return folder / "run"


def test_a_run_that_goes_on_is_one_run_with_every_step_once(run: Path) -> None:
    first, second = starts_of(run)
    assert begun(first).run_id == begun(second).run_id
    assert (begun(first).entity, begun(first).project) == ("team", "proj")
    assert [len(history(start)) for start in (first, second)] == [3, 1]
    rows = history(first) + history(second)
    assert [row["_step"] for row in rows] == [1, 2, 3, 4]
    for row, record in zip(rows, metrics(run), strict=True):
        for name in ("loss", "lr", "knn_top1", "knn_best_top1"):
            assert row.get(name) == record.get(name)


def test_the_configuration_is_the_one_of_the_run(run: Path) -> None:
    saved = json.loads((run / "config.json").read_text())
    given = {u.key: json.loads(u.value_json) for u in begun(starts_of(run)[1]).config.update}
    assert {name: given.get(name) for name in saved} == saved


def test_the_summary_has_the_last_and_the_best_knn(run: Path) -> None:
    summary = {}
    for record in starts_of(run)[1]:
        if record.WhichOneof("record_type") == "summary":
            summary |= {name_of(i): json.loads(i.value_json) for i in record.summary.update}
    last = metrics(run)[-1]
    assert last["knn_top1"] > 0
    assert summary["knn_top1"] == last["knn_top1"]
    assert summary["knn_best_top1"] == last["knn_best_top1"]


def test_neither_the_environment_nor_the_command_line_is_saved(run: Path) -> None:
    files = [path for path in (run / "wandb").rglob("*") if path.is_file()]
    assert len(files) > 3
    for path in files:
        assert b"hunter2" not in path.read_bytes(), path
        assert path.name not in ("wandb-metadata.json", "requirements.txt", "output.log"), path


def _services() -> list[int]:
    """W&B's processes that this one has started and that still run."""
    command = ["ps", "--ppid", str(os.getpid()), "-o", "pid=,stat=,comm="]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    listed = [line.split() for line in lines]
    return [int(pid) for pid, state, name in listed if name == "wandb-core" and state[0] != "Z"]


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_its_process_may_die_or_hang(
    fault: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "config.json").write_text("{}")
    reader = WeightsAndBiases("proj", tmp_path, patience=5)
    reader.read([{"step": 1, "loss": 1.0}])
    while not (tmp_path / "wandb" / "widebatch.json").exists():  # then it has begun
        assert reader._sender.is_alive(), caplog.text
        time.sleep(0.1)
    (own,) = _services()
    os.kill(own, fault)
    reader.read([{"step": 2, "loss": 1.0}])
    reader.close()
    assert caplog.text.count("W&B gets no more records") == 1
    assert not _services()


def test_a_full_disk_stops_it_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with small_tmpfs(tmp_path / "disk", 200 << 10) as disk:
        (disk / "config.json").write_text("{}")
        reader = WeightsAndBiases("proj", disk, patience=60)
        reader.read([{"step": step, "loss": 1 / step, "lr": 0.1} for step in range(1, 4001)])
        reader.close()
    assert caplog.text.count("W&B gets no more records") == 1
    assert "No space left on device" in caplog.text
