"""What survives kills, full disks and damaged files."""

import contextlib
import errno
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from torch import nn

from data_pipeline import faults
from data_pipeline.faults import Fault, parse
from launch.exit_codes import ExitCode, exit_code_for
from tests.trainer.disks import small_tmpfs
from trainer.checkpoint import (
    CheckpointConfig,
    CheckpointSaver,
    CheckpointStore,
    Tensors,
    load_encoder_state,
    optimizer_tensors,
    restore_optimizer,
)
from trainer.checkpoint.files import write_manifest
from trainer.errors import CheckpointError

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def parts(step: int) -> dict[str, Tensors]:
    generator = torch.Generator().manual_seed(step)
    tensors = {"encoder.weight": torch.randn(3, 4, generator=generator)}
    return {"model": tensors, "optimizer": {"m": torch.ones(2) * step}}


def save(store: CheckpointStore, step: int) -> Path:
    return store.save({"step": step}, parts(step))


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


def test_tensor_files_are_safetensors_and_the_manifest_lists_their_content(
    store: CheckpointStore,
) -> None:
    tensors = {
        "half": torch.randn(3).to(torch.bfloat16),
        "empty": torch.empty(0, 4),
        "flag": torch.tensor(True),
        "wide": torch.arange(5, dtype=torch.float64),
        "transposed": torch.randn(4, 6).T,
    }
    path = store.save({"step": 1}, {"model": tensors})
    with safetensors.safe_open(path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(name), tensors[name]) for name in tensors)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["files"]["model.safetensors"]["tensors"] == {
        "half": "BF16[3]",
        "empty": "F32[0, 4]",
        "flag": "BOOL[]",
        "wide": "F64[5]",
        "transposed": "F32[6, 4]",
    }


def test_a_dtype_that_safetensors_cannot_hold_is_refused_by_the_tensors_name(
    store: CheckpointStore,
) -> None:
    with pytest.raises(TypeError, match=r"spectrum is torch\.complex64"):
        store.save({"step": 1}, {"model": {"spectrum": torch.ones(1, dtype=torch.complex64)}})
    assert store.newest() is None


SAVE_POINTS = [point for point in faults.POINTS if point.startswith("checkpoint.")]


@pytest.mark.reliability(4)
@pytest.mark.parametrize("point", SAVE_POINTS)
def test_killed_at_a_named_point_of_a_save_keeps_a_whole_checkpoint(
    tmp_path: Path, point: str
) -> None:
    """SIGKILL at the n-th passing of the point, for every n, until a save gets through."""
    before = tmp_path / "before"
    for step in (1, 2):
        save(CheckpointStore(before), step)
    for passing in itertools.count(1):
        folder = tmp_path / f"after-{passing}"
        shutil.copytree(before, folder)
        survived = _killed_in_a_save(folder, point, passing)
        store = CheckpointStore(folder)
        found = store.newest()
        assert found is not None, f"nothing left after a kill at {point}, {passing}"
        assert found.step in (2, 3)
        assert found.tensors("optimizer")["m"].tolist() == [found.step] * 2
        save(store, 4)
        assert newest_step(store) == 4
        assert not list(folder.glob(".writing-*"))
        assert whole_steps(folder) >= {found.step, 4}
        if survived:
            break
    assert found.step == 3
    assert passing > 1, "the point was not reached"


def _killed_in_a_save(folder: Path, point: str, passing: int) -> bool:
    """Save step 3 behind the steps in a process of its own; whether it got through."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            faults.arm([Fault(point=point, action="kill", first=passing, last=passing)])
            saver = CheckpointSaver(CheckpointStore(folder), CheckpointConfig(), is_writer=True)
            saver.save({"step": 3}, parts(3))
            saver.finish()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        return True
    assert os.WTERMSIG(status) == signal.SIGKILL
    return False


@pytest.mark.reliability(6)
@pytest.mark.parametrize("point", [p for p in SAVE_POINTS if p != "checkpoint.copy"])
def test_a_call_that_fails_keeps_the_old_checkpoint_and_leaves_nothing_of_the_new(
    tmp_path: Path, point: str
) -> None:
    """ENOSPC at the n-th passing of the point, for every n, until a save gets through."""
    for passing in itertools.count(1):
        store = CheckpointStore(tmp_path / str(passing))
        for step in (1, 2):
            save(store, step)
        faults.arm(parse(f"{point} pass={passing} raise:ENOSPC"))
        problem = None
        try:
            save(store, 3)
        except OSError as error:
            problem = error
        finally:
            faults.arm([])
        if problem is not None:
            assert problem.errno == errno.ENOSPC
            if point in ("checkpoint.write", "checkpoint.sync"):
                assert problem.filename is not None
                assert Path(problem.filename).is_relative_to(store.directory)
        assert newest_step(store) in (2, 3)  # 3 only if the failure came after the rename
        assert not list(store.directory.glob(".writing-step*"))
        save(store, 4)
        assert newest_step(store) == 4
        if problem is None:
            break
    if point != "checkpoint.retire":  # costs space, not the checkpoint: it is only said
        assert passing > 1, "the point was not reached"


@pytest.mark.reliability(6)
def test_a_full_disk_keeps_the_old_checkpoint_and_leaves_nothing_of_the_new(
    tmp_path: Path,
) -> None:
    with small_tmpfs(tmp_path / "disk", 1 << 20) as disk:
        store = CheckpointStore(disk / "checkpoints")
        save(store, 1)
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        with pytest.raises(OSError, match="No space left on device") as caught:
            save(store, 2)
        assert caught.value.errno == errno.ENOSPC
        assert str(caught.value.filename).startswith(str(store.directory))
        assert exit_code_for(caught.value) == ExitCode.RETRYABLE
        assert newest_step(store) == 1
        assert not list(store.directory.glob(".writing-*"))
        filler.unlink()
        save(store, 2)
        assert newest_step(store) == 2


@pytest.mark.reliability(7)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("length", ["empty", "one byte", "half", "all but one"])
def test_a_cut_file_is_named_and_the_checkpoint_before_taken(
    store: CheckpointStore, name: str, length: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, 1)
    path = save(store, 2) / name
    size = path.stat().st_size
    os.truncate(
        path, {"empty": 0, "one byte": 1, "half": size // 2, "all but one": size - 1}[length]
    )
    assert newest_step(store) == 1
    assert str(path) in caplog.text


@pytest.mark.reliability(7)
@pytest.mark.parametrize("length", [0, 1, 6])
def test_a_cut_pointer_is_named_and_loses_nothing(
    store: CheckpointStore, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        save(store, step)
    os.truncate(store.directory / "latest.json", length)
    assert newest_step(store) == 2
    assert "latest.json: not JSON" in caplog.text
    save(store, 3)
    assert json.loads((store.directory / "latest.json").read_text())["step"] == 3


@pytest.mark.reliability(8)
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_wherever_it_is_and_the_checkpoint_before_taken(
    store: CheckpointStore, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, 1)
    path = save(store, 2) / name
    content = path.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << (place * 5 % 8)
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"step-00000002/"):
            store.read(2)
    if name != "manifest.json":
        assert newest_step(store) == 1
        assert f"{path}: its content does not match its checksum" in caplog.text
    path.write_bytes(content)
    assert newest_step(store) == 2


@pytest.mark.reliability(8)
def test_a_manifest_that_is_still_json_is_found_by_its_own_checksum(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, 1)
    path = save(store, 2) / "manifest.json"
    path.write_text(path.read_text().replace("F32[3, 4]", "F32[3, 5]"))
    assert newest_step(store) == 1
    assert f"{path}: its content does not match its checksum" in caplog.text


@pytest.mark.reliability(9)
@pytest.mark.parametrize("name", FILES)
def test_a_deleted_file_is_named_and_the_checkpoint_before_taken(
    store: CheckpointStore, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, 1)
    path = save(store, 2) / name
    path.unlink()
    assert newest_step(store) == 1
    assert f"{path}: missing" in caplog.text


@pytest.mark.reliability(9)
@pytest.mark.parametrize("name", FILES)
def test_a_run_never_starts_afresh_over_damaged_checkpoints(
    store: CheckpointStore, name: str
) -> None:
    for step in (1, 2):
        (save(store, step) / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: missing.*no whole checkpoint is left"):
        store.newest()
    (store.directory / "latest.json").unlink()
    with pytest.raises(CheckpointError, match="no whole checkpoint is left"):
        store.newest()


@pytest.mark.reliability(9)
def test_a_run_never_starts_afresh_when_its_checkpoints_are_gone(store: CheckpointStore) -> None:
    shutil.rmtree(save(store, 1))
    with pytest.raises(CheckpointError, match="the checkpoints are gone"):
        store.newest()


@pytest.mark.reliability(9)
def test_a_lost_pointer_loses_nothing(store: CheckpointStore) -> None:
    save(store, 1)
    (store.directory / "latest.json").unlink()
    assert newest_step(store) == 1


def whole_steps(directory: Path) -> set[int]:
    """Steps whose checkpoints are whole, as a process that knows nothing of them finds."""
    found = set()
    for path in directory.glob("step-*"):
        with contextlib.suppress(CheckpointError):
            found.add(CheckpointStore(directory).read(int(path.name[5:])).step)
    return found


@pytest.mark.reliability(10)
@pytest.mark.parametrize("damaged", [(2,), (3,), (2, 3), (3, 9), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("how", ["cut", "no manifest", "empty", "a link"])
def test_at_least_two_whole_checkpoints_survive_retention_among_partial_ones(
    tmp_path: Path, how: str, damaged: tuple[int, ...]
) -> None:
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3, *damaged):
        save(CheckpointStore(folder, keep=9), step)
    for step in damaged:
        _damage(folder / f"step-{step:08d}", how, tmp_path / f"elsewhere-{step}")
    (folder / ".writing-step-00000004").mkdir()
    (folder / ".writing-latest.json").touch()
    intact = whole_steps(folder)
    store = CheckpointStore(folder, keep=2)  # the run that goes on after the damage
    for saved in (4, 5):
        before = whole_steps(folder)
        save(store, saved)
        assert len(whole_steps(folder)) >= min(2, len(before) + 1)
    assert whole_steps(folder) == {4, 5}
    assert intact == {1, 2, 3} - set(damaged)
    assert not list(folder.glob(".writing-*"))
    if how == "a link":
        assert all((tmp_path / f"elsewhere-{s}" / "manifest.json").exists() for s in damaged)


def _damage(path: Path, how: str, elsewhere: Path) -> None:
    if how == "cut":
        os.truncate(path / "model.safetensors", 10)
    elif how == "no manifest":
        (path / "manifest.json").unlink()
    elif how == "empty":
        shutil.rmtree(path)
        path.mkdir()
    else:
        path.rename(elsewhere)
        path.symlink_to(elsewhere)


@pytest.mark.reliability(10)
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


def test_retention_deletes_nothing_while_the_best_is_unknown(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, 1)
    store.mark_best(1)
    (store.directory / "best.json").write_text("{")
    for step in (2, 3, 4):
        save(store, step)
    assert whole_steps(store.directory) == {1, 2, 3, 4}
    assert "best.json: not JSON" in caplog.text


def test_saving_a_step_twice_keeps_the_first(store: CheckpointStore) -> None:
    inode = (save(store, 1) / "model.safetensors").stat().st_ino
    assert (save(store, 1) / "model.safetensors").stat().st_ino == inode


def reseal(manifest: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest as somebody would who can make its checksum too."""
    values = json.loads(manifest.read_text())
    change(values["files"])
    write_manifest(manifest, values["files"])


@pytest.mark.parametrize("entry", ["../../outside", "/etc/hostname", "sub/file"])
def test_a_manifest_cannot_name_files_outside_its_folder(
    store: CheckpointStore, entry: str
) -> None:
    path = save(store, 1)
    reseal(path / "manifest.json", lambda files: files.update({entry: {"sha256": "0", "bytes": 1}}))
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
