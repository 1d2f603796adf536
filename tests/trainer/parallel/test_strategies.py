"""FSDP and ZeRO take the steps that DDP takes, and a checkpoint of one goes on under another."""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import tyro
from torch import nn

from common.errors import ConfigError
from tests.dist import run_ranks
from tests.trainer.runs import (
    SMALL_ENCODER,
    SMOOTH_RESNET,
    checkpoint_bytes,
    inputs_of,
    metrics,
    pack_images,
    smooth,
    train,
)
from tests.trainer.tiny import tiny_config, tiny_mocov2_config, tiny_mocov3_config
from trainer.config import DataConfig, RunConfig, completed, differences, from_json, to_json
from trainer.features.online_knn import OnlineKnnConfig
from trainer.loop import fit
from trainer.models.encoders import build_encoder
from trainer.models.heads import HeadConfig
from trainer.objectives.base import Given, Inputs, Objective
from trainer.objectives.simclr import SimCLRConfig
from trainer.optim.optimizers import OptimConfig, apply_update, gradient_norm
from trainer.parallel.networks import synchronise_batch_norm
from trainer.parallel.sharding import Sharding
from trainer.parallel.strategy import StrategyConfig, StrategyName, launch_fabric, lay_out
from trainer.recipes import RECIPES

SHARDED: list[StrategyName] = ["fsdp", "deepspeed-1", "deepspeed-2"]
BATCH, STEPS, BAD_STEP = 8, 4, 2

# A step changes a weight by some 5 %, so that a wrong trust ratio cannot hide in the tolerance.
_LARS = OptimConfig(base_lr=0.5, trust_coefficient=0.1, weight_decay=1e-2)
OPTIMIZERS = {
    "lars": dataclasses.replace(_LARS, steady=("head",)),
    "lars, mocov3, nesterov": dataclasses.replace(_LARS, variant="mocov3", nesterov=True),
    "lars, you, no momentum": dataclasses.replace(_LARS, variant="you", momentum=0.0),
    "sgd": OptimConfig(
        name="sgd", base_lr=1e-3, weight_decay=1e-2, decay_vectors=True, steady=("head",)
    ),
    "adamw": OptimConfig(name="adamw", base_lr=1e-2, weight_decay=1e-2, eps=1.0),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_images(tmp_path_factory.mktemp("data"))


# --- one step after another, with every optimizer -----------------------------------------------


def _objective() -> Objective:
    torch.manual_seed(0)
    encoder = build_encoder(SMALL_ENCODER)
    head = HeadConfig(layers=2, hidden_dim=24, out_dim=12)
    objective = SimCLRConfig().build(encoder, head, Given(num_samples=BATCH))
    first: Any = objective.get_submodule("head.layers.0")
    first.relu = nn.SiLU()  # with it the whole network is smooth: see `runs.smooth`
    synchronise_batch_norm(objective, True)
    return objective


def _inputs(step: int, rank: int, world_size: int) -> Inputs:
    generator = torch.Generator().manual_seed(step)
    views_VNCHW = torch.randn(2, BATCH, 3, 32, 32, generator=generator)
    return inputs_of(views_VNCHW.chunk(world_size, 1)[rank], step)


def _weights(sharding: Sharding) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in sharding.model_tensors().items()}


def _train_by_hand(
    rank: int, world_size: int, config: dict[str, Any], optimizers: list[str], spoil: bool
) -> dict[str, Any]:
    """Steps with each optimizer, one of them with gradients that are not finite."""
    strategy = StrategyConfig(**config)
    fabric = launch_fabric("cpu", "fp32", strategy)
    results: dict[str, Any] = {}
    for name in optimizers:
        objective = _objective()
        sharding = lay_out(strategy, fabric, objective, SMALL_ENCODER, OPTIMIZERS[name])
        if spoil:
            optimizer: Any = sharding.optimizer
            optimizer.inner.holders = None
        norms = []
        for step in range(STEPS):
            loss = objective.loss(sharding.model(_inputs(step, rank, world_size)), step).value
            fabric.backward(loss * (math.nan if step == BAD_STEP else 1.0), model=sharding.model)
            norm = gradient_norm(sharding.optimizer)
            before = _weights(sharding)
            lr = OPTIMIZERS[name].base_lr
            skipped = apply_update(sharding.optimizer, lr, norm, steady_lr=2 * lr)
            sharding.optimizer.zero_grad()
            assert skipped.item() == (step == BAD_STEP)
            if step == BAD_STEP:
                after = _weights(sharding)
                assert all(torch.equal(before[n], after[n]) for n in before), "it was not left out"
            norms.append(norm.item())
        results[name] = {
            "norms": norms,
            "weights": _weights(sharding),
            "state": dict(sharding.optimizer_tensors()),
            "encoder": dict(sharding.whole_encoder().state_dict()),
        }
    assert ("deepspeed" in sys.modules) == strategy.name.startswith("deepspeed")
    dist.barrier()
    return results if rank == 0 else {}


def _by_hand(
    world_size: int, optimizers: list[str], spoil: bool = False, **config: Any
) -> dict[str, Any]:
    arguments = (config, optimizers, spoil)
    return dict(
        run_ranks(_train_by_hand, world_size, *arguments, timeout=280, init_process_group=False)[0]
    )


@pytest.fixture(scope="module")
def by_ddp() -> dict[str, Any]:
    return _by_hand(2, list(OPTIMIZERS))


def assert_same_layers(
    ours: dict[str, torch.Tensor],
    theirs: dict[str, torch.Tensor],
    start: dict[str, torch.Tensor] | None = None,
    tolerance: float = 1e-4,
) -> None:
    """Every tensor differs by less than ``tolerance`` of how far it has moved."""
    assert ours.keys() == theirs.keys()
    for name, other in theirs.items():
        mine, other = ours[name].double(), other.double()
        assert mine.shape == other.shape
        way = (other - start[name].double() if start else other).norm()
        off = (mine - other).norm()
        assert off <= tolerance * way, f"{name}: off by {float(off / way)} of its way"


def assert_same_steps(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    start = dict(_objective().state_dict())
    assert_same_layers(ours["weights"], theirs["weights"], start)
    assert_same_layers(ours["state"], theirs["state"])
    encoder = {n.removeprefix("encoder."): t for n, t in ours["weights"].items()}
    for name, tensor in ours["encoder"].items():
        assert torch.equal(tensor, encoder[name])
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-4, nan_ok=True)


@pytest.mark.processors
@pytest.mark.parametrize("name", SHARDED)
def test_steps_are_those_of_ddp_for_every_layer_and_optimizer(
    name: str, by_ddp: dict[str, Any]
) -> None:
    """Of LARS too, whose trust ratios are those of whole layers; steps with NaN are left out."""
    sharded = _by_hand(2, list(OPTIMIZERS), name=name)
    for optimizer, theirs in by_ddp.items():
        assert_same_steps(sharded[optimizer], theirs)


@pytest.mark.processors
def test_the_comparison_would_notice_norms_of_a_shard(by_ddp: dict[str, Any]) -> None:
    spoilt = _by_hand(2, ["lars"], spoil=True, name="fsdp")
    start = dict(_objective().state_dict())
    with pytest.raises(AssertionError, match="of its way"):
        assert_same_layers(spoilt["lars"]["weights"], by_ddp["lars"]["weights"], start, 0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_steps_are_those_of_ddp_where_a_shard_holds_little(name: str) -> None:
    """On 4 processes some hold no piece of a layer, or nothing but padding."""
    theirs = _by_hand(4, ["lars", "adamw"])
    ours = _by_hand(4, ["lars", "adamw"], name=name)
    for optimizer in theirs:
        assert_same_steps(ours[optimizer], theirs[optimizer])


@pytest.mark.processors
@pytest.mark.parametrize(
    "name", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in SHARDED)]
)
def test_compressed_gradients_are_close_and_not_the_same(name: str, by_ddp: dict[str, Any]) -> None:
    compressed = _by_hand(2, ["sgd"], name=name, compress_gradients="bf16")
    start = dict(_objective().state_dict())
    ours, theirs = compressed["sgd"]["weights"], by_ddp["sgd"]["weights"]
    assert_same_layers(ours, theirs, start, tolerance=0.05)
    with pytest.raises(AssertionError, match="of its way"):
        assert_same_layers(ours, theirs, start, tolerance=1e-4)


# --- whole runs ---------------------------------------------------------------------------------


def strategy_config(data: Path, out: Path, name: StrategyName, **changes: Any) -> RunConfig:
    make = changes.pop("make", tiny_config)
    settings = {"encoder": SMALL_ENCODER, "strategy": StrategyConfig(name=name), **changes}
    config: RunConfig = make(data, out, **settings)
    return smooth(config)


def assert_same_checkpoints(run: Path, other: Path, tolerance: float = 1e-6) -> None:
    mine, others = checkpoint_bytes(run), checkpoint_bytes(other)
    assert mine.keys() == others.keys() == {"model.safetensors", "optimizer.safetensors"}
    for part in mine:
        assert len(mine[part]) == len(others[part])
        ours, theirs = (safetensors.torch.load(files[part]) for files in (mine, others))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype
            torch.testing.assert_close(ours[name], tensor, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_a_run_goes_on_under_every_other_strategy(data: Path, tmp_path: Path) -> None:
    """ZeRO-1, FSDP, ZeRO-2 and ddp in one run, a step each, beside a run of ddp alone."""
    legs: list[StrategyName] = ["deepspeed-1", "fsdp", "deepspeed-2", "ddp"]
    straight = strategy_config(data, tmp_path / "straight", "ddp", steps=len(legs))
    assert train(2, straight) == "done"
    for leg, name in enumerate(legs):
        config = strategy_config(data, tmp_path / "run", name, steps=len(legs))
        assert train(2, config, stop_at=1) == ("done" if leg == len(legs) - 1 else "stopped")
    assert_same_checkpoints(config.out, straight.out)
    for mine, other in zip(metrics(config.out), metrics(straight.out), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("world_size", [2, 4])
def test_ten_steps_of_a_resnet_end_where_ddp_ends(
    data: Path, tmp_path: Path, world_size: int
) -> None:
    names: list[StrategyName] = ["ddp", *SHARDED]
    configs = {
        name: strategy_config(data, tmp_path / name, name, encoder=SMOOTH_RESNET, steps=10)
        for name in names
    }
    for config in configs.values():
        assert train(world_size, config, timeout=400) == "done"
    for name in SHARDED:
        assert_same_checkpoints(configs[name].out, configs["ddp"].out, tolerance=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_run_that_was_stopped_ends_byte_for_byte(
    data: Path, tmp_path: Path, name: StrategyName
) -> None:
    straight = strategy_config(data, tmp_path / "straight", name, steps=4)
    stopped = strategy_config(data, tmp_path / "stopped", name, steps=4)
    assert train(2, straight) == "done"
    assert train(2, stopped, stop_at=2) == "stopped"
    assert train(2, stopped) == "done"
    assert checkpoint_bytes(straight.out) == checkpoint_bytes(stopped.out)
    assert metrics(straight.out) == metrics(stopped.out)


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_mocov2_config, tiny_mocov3_config])
def test_moco_trains_as_under_ddp(data: Path, tmp_path: Path, make: Any) -> None:
    """Key encoder, queue and predictor."""
    for name in ("ddp", "fsdp", "deepspeed-1"):
        assert train(2, strategy_config(data, tmp_path / name, name, make=make, steps=4)) == "done"
    for name in ("fsdp", "deepspeed-1"):
        assert_same_checkpoints(tmp_path / name, tmp_path / "ddp", tolerance=1e-5)


@pytest.mark.slow
def test_bf16_leaves_weights_in_float32(data: Path, tmp_path: Path) -> None:
    """DeepSpeed would cast them where Fabric says bf16; here the forward pass alone autocasts."""
    for name in ("ddp", *SHARDED):
        config = strategy_config(data, tmp_path / name, name, precision="bf16", steps=3)
        assert train(2, config) == "done"
    for name in SHARDED:
        assert_same_checkpoints(tmp_path / name, tmp_path / "ddp", tolerance=1e-3)


@pytest.mark.slow
def test_fsdp_computes_in_float64_where_asked(data: Path, tmp_path: Path) -> None:
    for name in ("ddp", "fsdp"):
        config = strategy_config(data, tmp_path / name, name, precision="fp64", steps=4)
        assert train(2, config) == "done"
    assert_same_checkpoints(tmp_path / "fsdp", tmp_path / "ddp", tolerance=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_activation_checkpointing_changes_nothing(
    data: Path, tmp_path: Path, name: StrategyName
) -> None:
    for label, activation_checkpointing in (("plain", False), ("checkpointed", True)):
        changes = {"steps": 2, "activation_checkpointing": activation_checkpointing}
        config = strategy_config(data, tmp_path / label, name, encoder=SMOOTH_RESNET, **changes)
        assert train(2, config) == "done"
    assert_same_checkpoints(tmp_path / "checkpointed", tmp_path / "plain")


@pytest.mark.slow
def test_the_online_knn_sees_the_whole_encoder(data: Path, tmp_path: Path) -> None:
    """FSDP's own has pieces; all ranks get the accuracy that ddp gets."""
    knn = OnlineKnnConfig(every_epochs=1, k=5, batch=7)
    found = {}
    for name in ("ddp", "fsdp"):
        # float64: in float32 rounding may decide which images are the nearest.
        config = strategy_config(data, tmp_path / name, name, steps=5, knn=knn, precision="fp64")
        config = dataclasses.replace(config, data=DataConfig(train=(data,), test=(data,)))
        assert train(2, config) == "done"
        found[name] = metrics(config.out)[-1]["knn_top1"]
    assert found["fsdp"] == found["ddp"] > 0.3


def test_one_process_has_nothing_to_share_out(data: Path, tmp_path: Path) -> None:
    config = strategy_config(data, tmp_path / "run", "fsdp", steps=1)
    assert train(1, config) == "done"


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "settings", "reason"),
    [
        (StrategyConfig(name="fsdp"), {"micro_batch": 8}, "a batch in pieces"),
        (StrategyConfig(name="deepspeed-2"), {"micro_batch": 8}, "a batch in pieces"),
        (StrategyConfig(name="deepspeed-1"), {"precision": "fp64"}, "float32"),
        (StrategyConfig(compress_gradients="bf16"), {"precision": "fp64"}, "3 digits"),
        (StrategyConfig(name="fsdp"), {"compile": True}, "gathers weights"),
    ],
)
def test_what_a_strategy_cannot_do_is_refused_with_a_reason(
    config: StrategyConfig, settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    run = tiny_config(tmp_path / "none.beton", tmp_path / "run", strategy=config, **settings)
    with pytest.raises(ConfigError, match=reason):
        fit(run)  # before it has looked for the data


def test_the_strategy_may_change_and_compression_may_not(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "a.beton", tmp_path / "run")
    saved = to_json(config)
    assert from_json(RunConfig, saved).strategy == StrategyConfig()
    other = dataclasses.replace(config, strategy=StrategyConfig(name="fsdp"))
    assert not differences(saved, to_json(other))
    compressed = dataclasses.replace(config, strategy=StrategyConfig(compress_gradients="bf16"))
    assert differences(saved, to_json(compressed)) == ["strategy.compress_gradients: none -> bf16"]
    del saved["strategy"]  # of before there was one
    assert not differences(completed(saved), to_json(config))


def test_the_command_line_names_them_without_a_prefix() -> None:
    config = tyro.cli(
        RunConfig,
        default=RECIPES["simclr-cifar10-r18"](),
        args=[
            "--data.train",
            "a.beton",
            "--strategy",
            "deepspeed-2",
            "--compress-gradients",
            "bf16",
        ],
    )
    assert config.strategy == StrategyConfig(name="deepspeed-2", compress_gradients="bf16")
