"""What survives kills, full disks and damaged files."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from trainer.checkpoint import (
    CheckpointStore,
    load_encoder_state,
    optimizer_tensors,
    restore_optimizer,
)
from trainer.errors import CheckpointError

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def save(store: CheckpointStore, step: int) -> Path:
    generator = torch.Generator().manual_seed(step)
    tensors = {"encoder.weight": torch.randn(3, 4, generator=generator)}
    return store.save({"step": step}, {"model": tensors, "optimizer": {"m": torch.ones(2) * step}})


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def newest_step(store: CheckpointStore) -> int:
    found = store.newest()
    assert found is not None
    return found.step


def test_a_folder_without_checkpoints_starts_afresh(store: CheckpointStore) -> None:
    assert store.newest() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_tensors_come_back_bit_for_bit(store: CheckpointStore, dtype: torch.dtype) -> None:
    tensor = (torch.randn(2, 3, 5, 5) * 100).to(dtype).to(memory_format=torch.channels_last)
    store.save({"step": 1, "note": "x"}, {"model": {"w": tensor, "scalar": tensor.sum()}})
    found = store.newest()
    assert found is not None
    assert found.state["note"] == "x"
    loaded = found.tensors("model")
    assert torch.equal(loaded["w"], tensor)
    assert loaded["w"].dtype == dtype
    assert loaded["scalar"].shape == ()


def test_killed_at_any_flush_or_rename_of_a_save_keeps_a_whole_checkpoint(
    store: CheckpointStore,
) -> None:
    """SIGKILL at the n-th fsync or rename, for every n, until a save gets through."""
    save(store, 1)
    survived, point = False, 0
    while not survived:
        child = os.fork()
        if child == 0:
            _kill_self_at(point)
            save(store, 2)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        survived = os.WIFEXITED(status)
        found = store.newest()
        assert found is not None, f"nothing left after a kill at point {point}"
        assert found.step in (1, 2)
        assert found.tensors("optimizer")["m"].tolist() == [found.step] * 2
        if found.step == 2 and not survived:
            shutil.rmtree(found.path)
            (store.directory / "latest.json").write_text('{"step": 1}')
        point += 1
    assert point > 6, "the kill points were not reached"
    assert newest_step(store) == 2
    assert not list(store.directory.glob(".writing-*"))


def _kill_self_at(point: int) -> None:
    calls = iter(range(10_000))

    def counted(function):  # type: ignore[no-untyped-def]
        def wrapper(*args, **kwargs):  # type: ignore[no-untyped-def]
            if next(calls) == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    os.fsync = counted(os.fsync)
    os.rename = counted(os.rename)
    os.replace = counted(os.replace)


@pytest.mark.parametrize("failing_call", range(6))
def test_a_full_disk_keeps_the_old_checkpoint_and_leaves_nothing_of_the_new(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    save(store, 1)
    calls = iter(range(100))
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if next(calls) == failing_call:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(store, 2)
    monkeypatch.undo()
    assert newest_step(store) in (1, 2)  # 2 only if the failure came after the rename
    assert not list(store.directory.glob(".writing-step*"))
    save(store, 3)
    assert newest_step(store) == 3


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("length", ["empty", "one byte", "half", "all but one"])
def test_a_cut_file_falls_back_to_the_checkpoint_before(
    store: CheckpointStore, name: str, length: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, 1)
    path = save(store, 2) / name
    size = path.stat().st_size
    os.truncate(
        path, {"empty": 0, "one byte": 1, "half": size // 2, "all but one": size - 1}[length]
    )
    # The manifest's last byte is a newline: without it the file still says the same.
    if (name, length) == ("manifest.json", "all but one"):
        assert newest_step(store) == 2
        return
    assert newest_step(store) == 1
    assert name in caplog.text


@pytest.mark.parametrize("name", FILES[:3])
def test_a_flipped_bit_is_found_by_its_checksum(
    store: CheckpointStore, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, 1)
    path = save(store, 2) / name
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    assert newest_step(store) == 1
    assert f"{path}: its content does not match its checksum" in caplog.text


def test_a_run_never_starts_afresh_over_damaged_checkpoints(store: CheckpointStore) -> None:
    for step in (1, 2):
        (save(store, step) / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*no whole checkpoint is left"):
        store.newest()


def test_a_run_never_starts_afresh_when_its_checkpoints_are_gone(store: CheckpointStore) -> None:
    shutil.rmtree(save(store, 1))
    with pytest.raises(CheckpointError, match="the checkpoints are gone"):
        store.newest()


def test_a_lost_pointer_loses_nothing(store: CheckpointStore) -> None:
    save(store, 1)
    (store.directory / "latest.json").unlink()
    assert newest_step(store) == 1


def test_retention_counts_whole_checkpoints_only_and_keeps_the_best(store: CheckpointStore) -> None:
    save(store, 1)
    store.mark_best(1)
    for step in (2, 3, 4):
        save(store, step)
    partial = store.directory / "step-00000009"
    partial.mkdir()
    save(store, 5)
    names = sorted(path.name for path in store.directory.glob("step-*"))
    assert names == ["step-00000001", "step-00000004", "step-00000005", "step-00000009"]
    assert store.best_step() == 1
    assert newest_step(store) == 5


def test_saving_a_step_twice_keeps_the_first(store: CheckpointStore) -> None:
    inode = (save(store, 1) / "model.safetensors").stat().st_ino
    assert (save(store, 1) / "model.safetensors").stat().st_ino == inode


@pytest.mark.parametrize("entry", ["../../outside", "/etc/hostname", "sub/file"])
def test_a_manifest_cannot_name_files_outside_its_folder(
    store: CheckpointStore, entry: str
) -> None:
    path = save(store, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][entry] = {"sha256": "0", "bytes": 1}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="bad entry"):
        store.read(1)


def test_a_symlink_in_place_of_a_file_is_refused(store: CheckpointStore, tmp_path: Path) -> None:
    path = save(store, 1) / "model.safetensors"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="not a plain file"):
        store.read(1)


def test_files_are_private(store: CheckpointStore) -> None:
    path = save(store, 1)
    assert path.stat().st_mode & 0o077 == 0
    assert all(file.stat().st_mode & 0o077 == 0 for file in path.iterdir())


def test_the_optimizer_comes_back_under_parameter_names() -> None:
    def one_step(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.randn(2, 3, 3, 3)).sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = one_step(0)
    saved = optimizer_tensors(model, optimizer)
    assert "0.weight::exp_avg" in saved
    other_model, other = one_step(1)
    restore_optimizer(other_model, other, saved)
    restored = optimizer_tensors(other_model, other)
    assert saved.keys() == restored.keys()
    assert all(torch.equal(saved[key], restored[key]) for key in saved)
    with pytest.raises(CheckpointError, match=r"'9\.weight' is no parameter"):
        restore_optimizer(other_model, other, {"9.weight::exp_avg": torch.ones(1)})


def test_the_encoder_is_found_without_its_prefix(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path / "checkpoints"), 7)
    with pytest.raises(CheckpointError, match="is this the folder of a run"):
        load_encoder_state(tmp_path)
    (tmp_path / "config.json").write_text('{"recipe": "r"}')
    tensors, config = load_encoder_state(tmp_path)
    assert list(tensors) == ["weight"]
    assert config["recipe"] == "r"
    assert config["checkpoint"]["step"] == 7
    with pytest.raises(CheckpointError, match="no best checkpoint"):
        load_encoder_state(tmp_path, best=True)
