"""Damage to a checkpoint is found and named, and the one before is taken."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import CheckpointError
from tests.trainer.checkpoints import FILES, newest_step, save
from trainer.state.checkpoint import CheckpointStore
from trainer.state.checkpoint.files import write_manifest


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


@pytest.fixture(params=FILES)
def file_of_step_2(store: CheckpointStore, request: pytest.FixtureRequest) -> Path:
    """Each file of the newest of two checkpoints, those of steps 1 and 2."""
    save(store, 1)
    return save(store, 2) / request.param


@pytest.mark.reliability(7)
@pytest.mark.parametrize("length", ["empty", "one byte", "half", "all but one"])
def test_a_cut_file_is_named_and_the_checkpoint_before_taken(
    store: CheckpointStore, file_of_step_2: Path, length: str, caplog: pytest.LogCaptureFixture
) -> None:
    size = file_of_step_2.stat().st_size
    lengths = {"empty": 0, "one byte": 1, "half": size // 2, "all but one": size - 1}
    os.truncate(file_of_step_2, lengths[length])
    assert newest_step(store) == 1
    assert str(file_of_step_2) in caplog.text


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
def test_a_flipped_bit_is_found_wherever_it_is_and_the_checkpoint_before_taken(
    store: CheckpointStore, file_of_step_2: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = file_of_step_2
    content = path.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << (place * 5 % 8)
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"step-00000002/"):
            store.read(2)
    if path.name != "manifest.json":
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
def test_a_deleted_file_is_named_and_the_checkpoint_before_taken(
    store: CheckpointStore, file_of_step_2: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file_of_step_2.unlink()
    assert newest_step(store) == 1
    assert f"{file_of_step_2}: missing" in caplog.text


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
