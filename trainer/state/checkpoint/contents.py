"""What is in a checkpoint: a model's and an optimizer's tensors by name, and the way back."""

from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.errors import CheckpointError
from trainer.state.checkpoint.files import Tensors, read_json
from trainer.state.checkpoint.store import Checkpoint, CheckpointStore


def load_encoder_state(
    run: Path, best: bool = False, average: bool = False
) -> tuple[Tensors, dict[str, Any]]:
    """The encoder's weights of a run, by torchvision's keys, and the run's ``config.json``.

    Args:
        run: the run's folder.
        best: the checkpoint with the best online kNN instead of the newest.
        average: the encoder's moving average, which some objectives keep, instead of itself.

    Returns:
        The encoder's parameters and buffers without prefix, and the configuration, to which key
        ``checkpoint`` adds the state that was saved with the weights (step, epoch, fingerprint).

    Raises:
        CheckpointError: the folder holds no run, no whole checkpoint, or no best one; its
            objective keeps no average.
    """
    config_path = run / "config.json"
    if not config_path.exists():
        raise CheckpointError(f"{run}: no config.json; is this the folder of a run?")
    config = read_json(config_path)
    store = CheckpointStore(run / "checkpoints")
    if best:
        step = store.best_step()
        if step is None:
            raise CheckpointError(
                f"{run}: no best checkpoint; the online kNN never ran (--data.test)"
            )
        checkpoint = store.read(step)
    else:
        checkpoint = _newest(store, run)
    prefix = "key.encoder." if average else "encoder."
    tensors = {
        name.removeprefix(prefix): value
        for name, value in checkpoint.tensors("model").items()
        if name.startswith(prefix)
    }
    if average and not tensors:
        raise CheckpointError(
            f"{run}: its objective keeps no moving average of the encoder; BYOL, DINO and MoCo do,"
            " trained alone"
        )
    return tensors, {**config, "checkpoint": checkpoint.state}


def load_model_state(run: Path) -> Tensors:
    """All tensors of a run's networks, by their names in its objective, of the newest checkpoint.

    Raises:
        CheckpointError: as :func:`load_encoder_state`.
    """
    return _newest(CheckpointStore(run / "checkpoints"), run).tensors("model")


def _newest(store: CheckpointStore, run: Path) -> Checkpoint:
    checkpoint = store.newest()
    if checkpoint is None:
        raise CheckpointError(
            f"{run}: no checkpoint yet; the first comes at an epoch's end, or where the run is"
            " stopped after a step"
        )
    return checkpoint


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """An optimizer's per-parameter state as flat ``name::slot`` tensors."""
    return {
        f"{name}::{slot}": value if isinstance(value, torch.Tensor) else torch.tensor(value)
        for name, parameter in model.named_parameters()
        for slot, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, saved: Tensors) -> None:
    """Put :func:`optimizer_tensors` back, onto each parameter's device.

    Raises:
        CheckpointError: a name in ``saved`` is no parameter of ``model``.
    """
    parameters = dict(model.named_parameters())
    for key, value in saved.items():
        name, slot = split_key(key, parameters)
        parameter = parameters[name]
        placed = value.to(parameter.device)  # counts of steps too: fused kernels read them there
        if placed.shape == parameter.shape:  # keep the memory layout of a fresh run: same sums
            placed = torch.empty_like(parameter, dtype=value.dtype).copy_(placed)
        optimizer.state[parameter][slot] = placed


def split_key(key: str, parameters: Container[str]) -> tuple[str, str]:
    """Parameter and slot of a key of :func:`optimizer_tensors`.

    Raises:
        CheckpointError: it names none of ``parameters``.
    """
    name, _, slot = key.rpartition("::")
    if name not in parameters:
        raise CheckpointError(f"optimizer.safetensors: {name!r} is no parameter of this model")
    return name, slot
