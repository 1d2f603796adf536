"""Run folders as training leaves them, without the training."""

import dataclasses
import json
from pathlib import Path

import torch
from torch import nn

from data_pipeline.crops import CropConfig
from tests.trainer.tiny import tiny_config
from trainer.config import DataConfig, to_json
from trainer.models.encoders import EncoderConfig, build_encoder
from trainer.state.checkpoint import CheckpointStore

FINGERPRINT = "f" * 64
RESNET18_CIFAR = EncoderConfig(name="resnet18", stem="cifar")
SMALL = EncoderConfig(name="shufflenet_v2_x0_5")


def save_run(
    folder: Path,
    data: Path,
    encoder: EncoderConfig = RESNET18_CIFAR,
    seed: int = 5,
    test: Path | None = None,
) -> nn.Module:
    """Write ``config.json`` and checkpoints of steps 3 (the best) and 6; the encoder of step 6."""
    side = 64 if encoder.image_size == 64 else 32
    config = dataclasses.replace(
        tiny_config(data, folder, crop=CropConfig(size=side, scale=(0.2, 1.0))),
        encoder=encoder,
        seed=seed,
        recipe="simclr-cifar10-r18",
        data=DataConfig(train=(data,), test=() if test is None else (test,)),
    )
    folder.mkdir(parents=True)
    facts = {"commit": "c0ffee", "torch": torch.__version__, "class_names": ["a", "b"]}
    (folder / "config.json").write_text(json.dumps({**to_json(config), "run": facts}))
    torch.manual_seed(seed)
    model = build_encoder(encoder)
    store = CheckpointStore(folder / "checkpoints")
    for step in (3, 6):
        _train_a_little(model, side)
        tensors = {f"encoder.{name}": value for name, value in model.state_dict().items()}
        tensors["head.layers.0.weight"] = torch.ones(4, 4)
        state = {"step": step, "epoch": step / 3, "data_fingerprint": FINGERPRINT}
        store.save(state, {"model": tensors, "optimizer": {"x": torch.zeros(1)}})
        if step == 3:
            store.mark_best(step)
    return model.eval()


def saved_run(parent: Path, data: Path, encoder: EncoderConfig = RESNET18_CIFAR) -> Path:
    """The folder of a run below ``parent``, as :func:`save_run` writes it."""
    save_run(parent / "run", data, encoder)
    return parent / "run"


@torch.no_grad()
def _train_a_little(model: nn.Module, side: int) -> None:
    """Move everything that an export could lose: weights, statistics and counters."""
    for parameter in model.parameters():
        scale = parameter.std(correction=0) + 0.1 * parameter.abs().mean()
        parameter += 0.05 * scale * torch.randn_like(parameter)
    model.train()(torch.randn(8, 3, side, side))
