"""A batch in pieces: the gradients, statistics and numbers of the whole batch, in less memory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from common.errors import ConfigError
from tests.trainer.runs import SMALL_ENCODER, metrics, pack_images, smooth, train_all
from tests.trainer.tiny import tiny_config, tiny_mocov2_config, tiny_mocov3_config
from trainer.config import RunConfig
from trainer.objectives.moco import MoCoConfig
from trainer.parallel.networks import (
    build_objective,
    refuse_own_statistics,
    synchronise_batch_norm,
)

CONFIGS: dict[str, Callable[..., RunConfig]] = {
    "simclr": tiny_config,
    "mocov2": tiny_mocov2_config,
    "mocov3": tiny_mocov3_config,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_images(tmp_path_factory.mktemp("data"))


def small(name: str, data: Path, out: Path, **changes: Any) -> RunConfig:
    settings = {"encoder": SMALL_ENCODER, "steps": 3, "precision": "fp64", **changes}
    return CONFIGS[name](data, out, **settings)


def trained(run: Path) -> dict[str, torch.Tensor]:
    """The newest checkpoint's model: parameters, running statistics, queue."""
    step = json.loads((run / "checkpoints" / "latest.json").read_text())["step"]
    return safetensors.torch.load_file(run / f"checkpoints/step-{step:08d}/model.safetensors")


def largest_difference(run: Path, other: Path) -> float:
    """Over all tensors, relative to the largest value of each."""
    mine, others = trained(run), trained(other)
    assert mine.keys() == others.keys()
    return max(
        float((mine[name] - others[name]).abs().max() / mine[name].abs().max().clamp_min(1e-6))
        for name in mine
        if mine[name].is_floating_point()
    )


@pytest.mark.processors
@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_pieces_train_as_the_whole_batch_does(data: Path, tmp_path: Path, world_size: int) -> None:
    """Every objective; pieces of 5 of 24 or of 12 images: the last one is smaller."""
    runs = {
        (name, size): small(name, data, tmp_path / f"{name}-{size}", micro_batch=size)
        for name in CONFIGS
        for size in (0, 5)
    }
    train_all(world_size, [(config, 0) for config in runs.values()])
    for name in CONFIGS:
        whole, pieces = runs[name, 0].out, runs[name, 5].out
        for mine, other in zip(metrics(whole), metrics(pieces), strict=True):
            assert mine["loss"] == pytest.approx(other["loss"], rel=1e-10), name
            assert mine["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-8), name
        assert largest_difference(whole, pieces) < 1e-7, name


@pytest.mark.processors
def test_float32_is_within_a_hundred_thousandth(data: Path, tmp_path: Path) -> None:
    runs = [
        small("simclr", data, tmp_path / f"{size}", micro_batch=size, precision="fp32", steps=1)
        for size in (0, 7)
    ]
    runs = [smooth(config) for config in runs]
    train_all(1, [(config, 0) for config in runs])
    (whole,), (pieces,) = (metrics(config.out) for config in runs)
    assert whole["loss"] == pytest.approx(pieces["loss"], rel=1e-5)
    assert whole["gradient_norm"] == pytest.approx(pieces["gradient_norm"], rel=1e-5)
    assert largest_difference(runs[0].out, runs[1].out) < 1e-5


@pytest.mark.slow
def test_statistics_of_a_piece_are_another_batch_norm(data: Path, tmp_path: Path) -> None:
    """The cheap setting runs, and the comparison above would notice it."""
    runs = [
        small("simclr", data, tmp_path / "whole"),
        small("simclr", data, tmp_path / "piece", micro_batch=6, micro_batch_norm="piece"),
    ]
    train_all(2, [(config, 0) for config in runs])
    whole, pieces = (metrics(config.out)[0]["gradient_norm"] for config in runs)
    assert whole != pytest.approx(pieces, rel=1e-3)
    assert largest_difference(runs[0].out, runs[1].out) > 1e-3


def test_layers_with_statistics_of_their_own_are_refused(data: Path, tmp_path: Path) -> None:
    shuffled = MoCoConfig(queue=40, key_batch_norm="shuffle")
    objective = build_objective(small("mocov2", data, tmp_path / "x", objective=shuffled))
    synchronise_batch_norm(objective, sync_batch_norm=True)
    with pytest.raises(ConfigError, match=r"key\..*key-batch-norm sync"):
        refuse_own_statistics(objective)
