"""Activation checkpointing and torch.compile: the same numbers, by another way."""

from pathlib import Path

import pytest
import torch
from torch import nn

from common.errors import ConfigError
from tests.trainer.parallel.test_micro_batch import largest_difference
from tests.trainer.runs import SMOOTH_RESNET, metrics, pack_images, smooth, train_all
from tests.trainer.tiny import tiny_config
from trainer.models.encoders import EncoderConfig, build_encoder
from trainer.parallel.activation_checkpoint import checkpoint_blocks
from trainer.parallel.sync_batch_norm import convert_sync_batch_norm


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_images(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_checkpointed_blocks_train_as_kept_ones(
    data: Path, tmp_path: Path, world_size: int
) -> None:
    """Running statistics too, which a careless second pass would move twice."""
    runs = [
        tiny_config(
            data, tmp_path / str(on), steps=2, precision="fp64", activation_checkpointing=on
        )
        for on in (False, True)
    ]
    train_all(world_size, [(config, 0) for config in runs])
    kept, twice = (config.out for config in runs)
    assert metrics(kept)[-1]["loss"] == pytest.approx(metrics(twice)[-1]["loss"], rel=1e-12)
    assert largest_difference(kept, twice) < 1e-10


def test_checkpointing_keeps_less_for_the_backward_pass() -> None:
    kept = []
    for on in (False, True):
        encoder = build_encoder(EncoderConfig(name="resnet18"))
        convert_sync_batch_norm(encoder)
        if on:
            assert checkpoint_blocks(encoder) == 8
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t,  # type: ignore[misc]
            lambda t: t,
        ):
            encoder(torch.randn(2, 3, 64, 64))
        kept.append(sum(sizes))
    assert kept[1] < 0.6 * kept[0]


def test_an_encoder_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="--activation-checkpointing"):
        checkpoint_blocks(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))


@pytest.mark.slow
def test_a_compiled_encoder_trains_as_an_eager_one(data: Path, tmp_path: Path) -> None:
    runs = [
        smooth(tiny_config(data, tmp_path / str(on), steps=2, encoder=SMOOTH_RESNET, compile=on))
        for on in (False, True)
    ]
    train_all(1, [(config, 0) for config in runs], timeout=900)
    assert largest_difference(runs[0].out, runs[1].out) < 1e-3
