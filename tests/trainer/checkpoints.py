"""Checkpoints of two small tensors, and which of them are still whole."""

import contextlib
from pathlib import Path

import torch

from common.errors import CheckpointError
from trainer.state.checkpoint import CheckpointStore, Tensors

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def parts(step: int) -> dict[str, Tensors]:
    """A model and an optimizer whose values follow from the step."""
    generator = torch.Generator().manual_seed(step)
    tensors = {"encoder.weight": torch.randn(3, 4, generator=generator)}
    return {"model": tensors, "optimizer": {"m": torch.ones(2) * step}}


def save(store: CheckpointStore, step: int) -> Path:
    """``parts(step)`` saved; the checkpoint's folder."""
    return store.save({"step": step}, parts(step))


def newest_step(store: CheckpointStore) -> int:
    """The step from which a run would go on."""
    found = store.newest()
    assert found is not None
    return found.step


def whole_steps(directory: Path) -> set[int]:
    """Steps whose checkpoints are whole, as a process that knows nothing of them finds."""
    found = set()
    for path in directory.glob("step-*"):
        with contextlib.suppress(CheckpointError):
            found.add(CheckpointStore(directory).read(int(path.name[5:])).step)
    return found
