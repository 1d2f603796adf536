"""Whole runs of MoCo: the same on any number of processes, stopped and gone on with, handed on."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from launch.__main__ import main
from tests.trainer.runs import (
    SMALL_ENCODER,
    checkpoint_bytes,
    metrics,
    pack_images,
    samples,
    smooth,
    train,
    train_all,
)
from tests.trainer.test_same_run import TOLERANCE, compare, compare_trained
from tests.trainer.tiny import tiny_config, tiny_mocov2_config, tiny_mocov3_config
from trainer.config import RunConfig, from_json, to_json
from trainer.evaluation.load_encoder import load_encoder
from trainer.export import export
from trainer.optim.optimizers import OptimConfig
from trainer.state.checkpoint import CheckpointConfig

Config = Callable[..., RunConfig]
CONFIGS: dict[str, Config] = {"v2": tiny_mocov2_config, "v3": tiny_mocov3_config}
STEPS = 6  # one epoch of five and a step of the next

of_each_version = pytest.mark.parametrize("version", ["v2", "v3"])
of_each_precision = pytest.mark.parametrize("precision", TOLERANCE)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_images(tmp_path_factory.mktemp("data"))


def small(version: str, data: Path, out: Path, **changes: Any) -> RunConfig:
    """A run of a small, smooth network: a hundred times faster to train and save than a ResNet."""
    return smooth(CONFIGS[version](data, out, **{"steps": STEPS, **changes}))


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs ``v2-fp32-w1`` to ``v3-fp64-w2``, ``shuffled-w1`` and ``-w2``, ``exploding``
    whose weights no forward pass survives after the first step; and not finished, ``v2-stopped``
    and ``v3-stopped``, two processes' work up to step 3."""
    folder = tmp_path_factory.mktemp("runs")
    for w in (1, 2):
        finished = [
            small(version, data, folder / f"{version}-{precision}-w{w}", precision=precision)
            for version in CONFIGS
            for precision in TOLERANCE
        ]
        finished.append(_shuffled(data, folder / f"shuffled-w{w}"))
        stopped = []
        if w == 1:
            finished.append(_exploding(data, folder / "exploding"))
        if w == 2:
            stopped = [small(version, data, folder / f"{version}-stopped") for version in CONFIGS]
        runs = [*((config, 0) for config in finished), *((config, 3) for config in stopped)]
        want = ["done"] * len(finished) + ["stopped"] * len(stopped)
        assert train_all(w, runs) == want
    return folder


def _shuffled(data: Path, out: Path) -> RunConfig:
    objective = tiny_mocov2_config(data, out).objective
    shuffled = dataclasses.replace(objective, key_batch_norm="shuffle")  # type: ignore[call-arg]
    return small("v2", data, out, objective=shuffled, sync_batch_norm=False, steps=2)


def _exploding(data: Path, out: Path) -> RunConfig:
    each_step = CheckpointConfig(every_epochs=0, every_steps=1, keep=10)
    optim = OptimConfig(name="sgd", base_lr=1e30)
    return small("v2", data, out, optim=optim, checkpoint=each_step, steps=4)


@pytest.fixture(scope="module")
def gone_on(data: Path, folder: Path) -> Path:
    """The stopped runs, ``v2-again-w1`` to ``v3-again-w2``, in new processes."""
    for w in (1, 2):
        again = [small(version, data, folder / f"{version}-again-w{w}") for version in CONFIGS]
        for version, config in zip(CONFIGS, again):
            shutil.copytree(folder / f"{version}-stopped", config.out)
        assert train_all(w, [(config, 0) for config in again]) == ["done"] * len(again)
    return folder


def model_of(run: Path) -> dict[str, torch.Tensor]:
    """The newest checkpoint's parameters and buffers."""
    return safetensors.torch.load(checkpoint_bytes(run)["model.safetensors"])


def assert_close_models(run: Path, other: Path, relative: float) -> None:
    one, two = model_of(run), model_of(other)
    assert one.keys() == two.keys()
    assert any(name.startswith("key.encoder.") for name in one)
    for name, value in one.items():
        off = (value - two[name]).abs().max().item()
        assert off <= relative * max(1.0, value.abs().max().item()), f"{name} is off by {off}"


@pytest.mark.processors
@of_each_version
@of_each_precision
def test_two_processes_train_as_one_does(folder: Path, version: str, precision: str) -> None:
    folders = {w: folder / f"{version}-{precision}-w{w}" for w in (1, 2)}
    compare_trained(folders, TOLERANCE[precision])
    if precision == "fp64":
        assert_close_models(folders[1], folders[2], 1e-8)


def test_shuffled_keys_are_another_run_on_another_number_of_processes(folder: Path) -> None:
    """As the settings say; if this fails, the warning at the start is wrong."""
    with pytest.raises(AssertionError, match="loss off by"):
        compare_trained({w: folder / f"shuffled-w{w}" for w in (1, 2)}, TOLERANCE["fp32"])


def test_every_step_moves_the_key_encoder_and_the_queue(folder: Path) -> None:
    end = model_of(folder / "v2-fp32-w2")
    assert end["queue.position"] == STEPS * 24 % 40
    assert not torch.equal(end["encoder.0.weight"], end["key.encoder.0.weight"])


def test_a_skipped_step_of_a_run_moves_nothing(folder: Path) -> None:
    """Neither weights nor key encoder, queue or BatchNorm's running statistics."""
    run = folder / "exploding"
    skipped = [record["skipped"] for record in metrics(run)]
    taken = skipped.index(1)
    assert 1 <= taken <= 2 and all(skipped[taken:]), skipped
    models = [
        safetensors.torch.load_file(run / "checkpoints" / f"step-{n:08d}" / "model.safetensors")
        for n in (taken, len(skipped))
    ]
    assert models[1]["queue.position"] == taken * 24 % 40
    assert any(name.startswith("key.head.") for name in models[0])
    assert any(name.endswith(".running_var") for name in models[0])
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name


@pytest.mark.slow
@pytest.mark.timeout(2400)
@of_each_version
@of_each_precision
def test_ten_steps_on_one_two_and_four_processes(
    data: Path, tmp_path: Path, version: str, precision: str
) -> None:
    """1x24, 2x12 and 4x6 (processes x images)."""
    configs = {
        w: CONFIGS[version](data, tmp_path / f"w{w}", precision=precision, steps=10)
        for w in (1, 2, 4)
    }
    if precision == "fp32":
        configs = {w: smooth(config) for w, config in configs.items()}
    compare(configs, TOLERANCE[precision])
    if precision == "fp64":
        assert_close_models(configs[1].out, configs[4].out, 1e-6)


@of_each_version
def test_stopped_and_gone_on_with_is_the_same_to_the_byte(gone_on: Path, version: str) -> None:
    again, straight = gone_on / f"{version}-again-w2", gone_on / f"{version}-fp32-w2"
    assert metrics(gone_on / f"{version}-stopped")[-1]["step"] == 3
    assert samples(again) == samples(straight)
    assert metrics(again) == metrics(straight)
    assert checkpoint_bytes(again) == checkpoint_bytes(straight)


@of_each_version
def test_gone_on_with_on_another_number_of_processes(gone_on: Path, version: str) -> None:
    again, straight = gone_on / f"{version}-again-w1", gone_on / f"{version}-fp32-w2"
    assert samples(again) == samples(straight)
    for mine, other in zip(metrics(again), metrics(straight), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=TOLERANCE["fp32"])
    assert_close_models(again, straight, 1e-3)


def test_the_query_encoder_is_evaluated_and_exported(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(1, tiny_mocov2_config(data, run, steps=1)) == "done"
    saved = model_of(run)
    for name, value in load_encoder(str(run)).encoder.state_dict().items():
        assert torch.equal(value, saved[f"encoder.{name}"])
    assert not torch.equal(saved["encoder.conv1.weight"], saved["key.encoder.conv1.weight"])
    written = safetensors.torch.load_file(export(run, tmp_path / "out.safetensors").weights)
    assert torch.equal(written["conv1.weight"], saved["encoder.conv1.weight"])
    where = ["--data.train", str(data), "--data.test", str(data), "--k", "5"]
    runs_on = ["--backend", "torchvision", "--device", "cpu", "--workers", "1"]
    assert main(["evaluate", "knn", str(run), *where, *runs_on]) == 0


# --- configurations ---


def test_a_configuration_of_before_there_were_objectives_is_simclrs(
    data: Path, tmp_path: Path
) -> None:
    config = tiny_config(data, tmp_path / "run", steps=2)
    values = to_json(config)
    assert values["objective"].pop("name") == "simclr"
    assert from_json(RunConfig, values) == config


def test_an_old_run_without_todays_settings_is_gone_on_with(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path / "run", steps=1, encoder=SMALL_ENCODER)
    assert train(1, config) == "done"
    path = config.out / "config.json"
    values = json.loads(path.read_text())
    del values["objective"]["name"], values["max_skipped_steps"]
    path.write_text(json.dumps(values))
    assert train(1, config) == "done"
