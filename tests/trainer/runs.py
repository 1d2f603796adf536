"""Small real runs for tests: the whole trainer on a few images, in seconds."""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn

from data_pipeline.packing.pack import PackConfig, pack
from tests.dist import run_ranks
from trainer.config import RunConfig, from_json, to_json
from trainer.models.any_size_vit import take_any_size
from trainer.models.encoders import EncoderConfig, remove_classifier
from trainer.objectives.base import Inputs
from trainer.objectives.mocov3 import MoCoV3Config


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


def small_encoder() -> nn.Module:
    """A few convolutions with BatchNorm, where a test is not about a ResNet: milliseconds a step.

    Smooth, as :func:`smooth` needs it. As an encoder's name: ``tests.trainer.runs:small_encoder``.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


SMALL_ENCODER = EncoderConfig(name="tests.trainer.runs:small_encoder", image_size=32)


def smooth_resnet() -> nn.Module:
    """A ResNet-18 without a kink: SiLU for ReLU, means for maxima."""
    model = torchvision.models.resnet18(zero_init_residual=True)
    remove_classifier(model)
    model.maxpool = nn.AvgPool2d(3, stride=2, padding=1)
    for block in model.modules():
        if hasattr(block, "relu"):
            block.relu = nn.SiLU()
    return model


SMOOTH_RESNET = EncoderConfig(name="tests.trainer.runs:smooth_resnet", image_size=32)


def smooth(config: RunConfig) -> RunConfig:
    """The same run of a network without a kink: a smooth encoder, heads of one layer.

    For every comparison of float32 training that adds up in two orders. Where a ReLU's input lies
    within rounding of zero, or two inputs of a max-pool within rounding of each other, the order
    decides which way a whole gradient goes, and the processor's kernels decide the order: no
    tolerance on rounding holds there. Tests in float64, whose rounding is nine digits finer, train
    the networks that users train.
    """
    objective = config.objective
    if isinstance(objective, MoCoV3Config):
        predictor = dataclasses.replace(objective.predictor, layers=1)
        objective = dataclasses.replace(objective, predictor=predictor)
    encoder = config.encoder if config.encoder in (SMALL_ENCODER, SMOOTH_RESNET) else SMALL_ENCODER
    head = dataclasses.replace(config.head, layers=1)
    return dataclasses.replace(config, encoder=encoder, head=head, objective=objective)


def inputs_of(views_VNCHW: torch.Tensor, step: int = 0) -> Inputs:
    """Views of one group as an objective is given them, of samples 0, 1, ..."""
    ids_N = torch.arange(views_VNCHW.shape[1])
    return Inputs((views_VNCHW,), ids_N, ids_N >= 0, step)


def small_vit() -> nn.Module:
    """torchvision's transformer with 16 patches and two blocks, for images of 32 pixels."""
    vit = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64)
    take_any_size(vit)
    remove_classifier(vit)
    return vit


def train(world_size: int, config: RunConfig, *, stop_at: int = 0, timeout: float = 240) -> str:
    """Run ``config`` on ``world_size`` processes; ``stop_at`` asks the last rank to stop there."""
    return train_all(world_size, [(config, stop_at)], timeout=timeout)[0]


def train_all(
    world_size: int, runs: Sequence[tuple[RunConfig, int]], *, timeout: float | None = None
) -> list[str]:
    """Several runs one after the other in the same processes, which take seconds to start.

    Args:
        world_size: number of processes.
        runs: what to train, and the step at which the last rank is asked to stop; 0: none.
        timeout: seconds for all of them; None: by their number.
    """
    timeout = timeout or 200 + 20 * len(runs)
    values = [(to_json(config), stop_at) for config, stop_at in runs]
    by_rank = run_ranks(_train_rank, world_size, values, timeout=timeout, init_process_group=False)
    for outcomes in by_rank:
        assert outcomes == by_rank[0], f"ranks disagree on how the runs ended: {by_rank}"
    return [str(outcome) for outcome in by_rank[0]]


def _train_rank(rank: int, world_size: int, runs: list[tuple[dict[str, Any], int]]) -> list[str]:
    from trainer.loop import fit

    if world_size == 1:
        os.environ.pop("RANK"), os.environ.pop("WORLD_SIZE")  # as if nothing had launched it

    def stops_at(step: int) -> Callable[[], bool]:
        calls = iter(range(1, 1_000_000))
        return lambda: bool(step) and next(calls) == step and rank == world_size - 1

    return [fit(from_json(RunConfig, values), stops_at(step)).value for values, step in runs]


def metrics(run: Path) -> list[dict[str, Any]]:
    """``metrics.jsonl`` without the figures that depend on the clock."""
    timed = ("images_per_second", "loader_wait_seconds", "phase_seconds", "stragglers")
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


def assert_equal_runs(run: Path, other: Path) -> None:
    """Byte for byte: sample ids, numbers of every step, parameters, optimizer, queue, key encoder
    and the state, whose step is the position of every random number."""
    assert samples(run) == samples(other)
    assert metrics(run) == metrics(other)
    mine, others = checkpoint_bytes(run), checkpoint_bytes(other)
    assert mine.keys() == others.keys() == {"model.safetensors", "optimizer.safetensors"}
    assert mine == others
    assert saved_state(run) == saved_state(other)


def saved_state(run: Path) -> dict[str, Any]:
    """``state.json`` of the newest checkpoint."""
    step = json.loads((run / "checkpoints" / "latest.json").read_text())["step"]
    path = run / "checkpoints" / f"step-{step:08d}" / "state.json"
    state: dict[str, Any] = json.loads(path.read_text())
    return state
