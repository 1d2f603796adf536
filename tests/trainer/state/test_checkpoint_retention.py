"""Retention deletes old checkpoints only while enough whole ones and the best are left."""

import os
import shutil
from pathlib import Path

import pytest

from tests.trainer.checkpoints import newest_step, save, whole_steps
from trainer.state.checkpoint import CheckpointStore


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


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
