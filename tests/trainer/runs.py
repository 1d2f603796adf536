"""Small real runs for tests: the whole trainer on a few images, in seconds."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.loader import LoaderConfig
from data_pipeline.pack import PackConfig, pack
from data_pipeline.views import CropConfig
from tests.dist import run_ranks
from trainer.checkpoint import CheckpointConfig
from trainer.config import DataConfig, RunConfig, from_json, to_json
from trainer.encoders import EncoderConfig, HeadConfig
from trainer.recipes import RECIPES
from trainer.schedule import ScheduleConfig
from trainer.telemetry import TelemetryConfig


def pack_images(folder: Path, count: int = 120, classes: int = 3, side: int = 40) -> Path:
    """A .beton of ``count`` textured images in ``classes`` classes."""
    rng = np.random.default_rng(0)
    source = folder / "images"
    for index in range(count):
        label = index % classes
        y, x = np.mgrid[:side, :side] / side
        wave = np.sin(2 * np.pi * (label + 1) * (x * rng.uniform(0.5, 1) + y * rng.uniform(0, 1)))
        image = wave[..., None] * rng.uniform(40, 100, 3) + rng.uniform(90, 160, 3)
        image += rng.normal(0, 8, image.shape)
        path = source / f"class{label}" / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path)
    out = folder / "images.beton"
    pack(str(source), out, PackConfig(), progress=False)
    return out


def tiny_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """SimCLR with LARS, augmentation and BatchNorm on a ResNet-18: all that a real run has."""
    config = RECIPES["simclr-cifar10-r18"]()
    config = dataclasses.replace(
        config,
        data=DataConfig(train=data),
        out=out,
        batch=24,
        steps=6,
        precision="fp32",
        device="cpu",
        log_samples=True,
        crop=CropConfig(size=32, scale=(0.2, 1.0)),
        encoder=EncoderConfig(name="resnet18", zero_init_residual=True),
        head=HeadConfig(layers=2, hidden_dim=64, out_dim=32),
        schedule=ScheduleConfig(warmup_epochs=1),
        loader=LoaderConfig(backend="torchvision", workers=1),
        checkpoint=CheckpointConfig(every_epochs=0),
        telemetry=TelemetryConfig(tensorboard=False, log_every=3),
    )
    return dataclasses.replace(config, **changes)


def train(world_size: int, config: RunConfig, *, stop_at: int = 0, timeout: float = 240) -> str:
    """Run ``config`` on ``world_size`` processes; ``stop_at`` asks the last rank to stop there."""
    values = to_json(config)
    outcomes = run_ranks(
        _train_rank, world_size, values, stop_at, timeout=timeout, init_process_group=False
    )
    assert len(set(outcomes)) == 1, f"ranks disagree on how the run ended: {outcomes}"
    return str(outcomes[0])


def _train_rank(rank: int, world_size: int, values: dict[str, Any], stop_at: int) -> str:
    from trainer.loop import fit

    if world_size == 1:
        os.environ.pop("RANK"), os.environ.pop("WORLD_SIZE")  # as if nothing had launched it
    calls = iter(range(1, 1_000_000))

    def stop_requested() -> bool:
        return bool(stop_at) and next(calls) == stop_at and rank == world_size - 1

    return fit(from_json(RunConfig, values), stop_requested).value


def metrics(run: Path) -> list[dict[str, Any]]:
    """``metrics.jsonl`` without the figures that depend on the clock."""
    timed = ("images_per_second", "loader_wait_seconds")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in timed} for record in records]


def samples(run: Path) -> list[dict[str, Any]]:
    """``samples.jsonl``."""
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def checkpoint_bytes(run: Path) -> dict[str, bytes]:
    """The newest checkpoint's tensor files."""
    step = json.loads((run / "checkpoints" / "latest.json").read_text())["step"]
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
