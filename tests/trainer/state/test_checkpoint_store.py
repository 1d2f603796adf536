"""What is saved comes back as it was, in private files of open formats."""

import json
from pathlib import Path

import pytest
import safetensors
import torch
from torch import nn

from common.errors import CheckpointError
from tests.trainer.checkpoints import save
from trainer.state.checkpoint import (
    CheckpointStore,
    load_encoder_state,
    optimizer_tensors,
    restore_optimizer,
)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


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


def test_saving_a_step_twice_keeps_the_first(store: CheckpointStore) -> None:
    inode = (save(store, 1) / "model.safetensors").stat().st_ino
    assert (save(store, 1) / "model.safetensors").stat().st_ino == inode


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
