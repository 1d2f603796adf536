"""The promise that sets Widebatch apart: the same run on any number of processes."""

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.reading.pool import LoaderConfig
from tests.trainer.runs import metrics, pack_images, samples, smooth, train
from tests.trainer.tiny import tiny_config
from trainer.config import RunConfig

# Of the losses, relative, for one process sums a batch in another order than four do. Float32: a
# hundred roundings; two are what 30 steps of a smooth network differ by from those in float64.
# Float64: training a ResNet amplifies its roundings a million times and more.
TOLERANCE = {"fp32": 1e-5, "fp64": 1e-8}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_images(tmp_path_factory.mktemp("data"))


def compare(configs: dict[int, RunConfig], tolerance: float) -> None:
    for world_size, config in configs.items():
        assert train(world_size, config, timeout=600) == "done"
    compare_trained({w: config.out for w, config in configs.items()}, tolerance)


def compare_trained(folders: dict[int, Path], tolerance: float) -> None:
    """Hold finished runs, by their number of processes, to the one of one process."""
    runs = {w: (samples(folder), metrics(folder)) for w, folder in folders.items()}
    one_samples, one_metrics = runs.pop(1)
    assert len({tuple(s["ids"]) for s in one_samples}) == len(one_samples), "batches repeat"
    for world_size, (other_samples, other_metrics) in runs.items():
        assert other_samples == one_samples, f"other samples on {world_size} processes"
        for mine, other in zip(one_metrics, other_metrics, strict=True):
            off = abs(mine["loss"] - other["loss"]) / mine["loss"]
            assert off < tolerance, (
                f"step {mine['step']} on {world_size} processes: loss off by {off}"
            )
            assert mine["lr"] == other["lr"]
            if tolerance <= 1e-8:  # in float32 rounding may decide which row is nearest
                assert mine["contrastive_top1"] == pytest.approx(other["contrastive_top1"])
    assert any(0 < record["contrastive_top1"] <= 1 for record in one_metrics)


def config_of(precision: str, data: Path, out: Path, **changes: Any) -> RunConfig:
    """In float64 a ResNet as users train it, in float32 a network without kinks."""
    config = tiny_config(data, out, precision=precision, **changes)
    return smooth(config) if precision == "fp32" else config


@pytest.mark.processors
@pytest.mark.parametrize("precision", TOLERANCE)
def test_two_processes_train_as_one_does(data: Path, tmp_path: Path, precision: str) -> None:
    configs = {w: config_of(precision, data, tmp_path / f"w{w}", steps=6) for w in (1, 2)}
    compare(configs, TOLERANCE[precision])


@pytest.mark.processors
def test_the_comparison_would_notice_statistics_of_a_local_batch(
    data: Path, tmp_path: Path
) -> None:
    configs = {
        w: config_of("fp32", data, tmp_path / f"w{w}", steps=2, sync_batch_norm=False)
        for w in (1, 2)
    }
    with pytest.raises(AssertionError, match="loss off by"):
        compare(configs, TOLERANCE["fp32"])


@pytest.mark.slow
@pytest.mark.reliability(11)
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("precision", TOLERANCE)
def test_thirty_steps_on_one_two_three_and_four_processes(
    data: Path, tmp_path: Path, precision: str
) -> None:
    """1x24, 2x12, 3x8 and 4x6 (processes x images), with FFCV, augmentation, BatchNorm, LARS."""
    loader = LoaderConfig(backend="ffcv", workers=1)
    configs = {
        w: config_of(precision, data, tmp_path / f"w{w}", steps=30, loader=loader)
        for w in (1, 2, 3, 4)
    }
    compare(configs, TOLERANCE[precision])
