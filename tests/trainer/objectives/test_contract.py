"""What every objective keeps: the same run on any number of processes, in pieces, after any stop.

SimCLR and the MoCos have more of this in tests of their own; here the ones that are none of two
equal views, one projection and one contrastive loss.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from data_pipeline.packing.pack import PackConfig, pack
from tests.data_pipeline import damaged
from tests.trainer.runs import (
    assert_equal_runs,
    checkpoint_bytes,
    metrics,
    pack_images,
    samples,
    train,
    train_all,
)
from tests.trainer.tiny import (
    tiny_autoencoder_config,
    tiny_barlowtwins_config,
    tiny_bigan_config,
    tiny_byol_config,
    tiny_colourisation_config,
    tiny_context_config,
    tiny_cpc_config,
    tiny_deepcluster_config,
    tiny_deepclusterv2_config,
    tiny_dino_config,
    tiny_frameorder_config,
    tiny_gan_config,
    tiny_ibot_config,
    tiny_inpainting_config,
    tiny_jigsaw_config,
    tiny_joint_config,
    tiny_mae_config,
    tiny_nnclr_config,
    tiny_npid_config,
    tiny_pirl_config,
    tiny_relativepatch_config,
    tiny_rotation_config,
    tiny_sela_config,
    tiny_simsiam_config,
    tiny_supcon_config,
    tiny_supervised_config,
    tiny_swav_config,
    tiny_vae_config,
    tiny_vicreg_config,
)
from trainer.config import DataConfig, RunConfig
from trainer.export import export
from trainer.parallel.strategy import StrategyConfig

EVERY: dict[str, Callable[..., RunConfig]] = {
    "rotation": tiny_rotation_config,
    "npid": tiny_npid_config,
    "npid-sampled": lambda *where, **changes: tiny_npid_config(
        *where, negatives=40, memory_bits=16, **changes
    ),
    "npid-nce": lambda *where, **changes: tiny_npid_config(
        *where, negatives=40, estimate="nce", memory_bits=8, **changes
    ),
    "pirl": tiny_pirl_config,
    "deepclusterv2": tiny_deepclusterv2_config,
    "sela": tiny_sela_config,
    "deepcluster": tiny_deepcluster_config,
    "barlowtwins": tiny_barlowtwins_config,
    "swav": tiny_swav_config,
    "dino": tiny_dino_config,
    "ibot": tiny_ibot_config,
    "byol": tiny_byol_config,
    "simsiam": tiny_simsiam_config,
    "nnclr": tiny_nnclr_config,
    "vicreg": tiny_vicreg_config,
    "jigsaw": tiny_jigsaw_config,
    "relativepatch": tiny_relativepatch_config,
    "frameorder": tiny_frameorder_config,
    "autoencoder": tiny_autoencoder_config,
    "inpainting": tiny_inpainting_config,
    "context-encoder": tiny_context_config,
    "mae": tiny_mae_config,
    "colourisation": tiny_colourisation_config,
    "joint": tiny_joint_config,
    "gan": tiny_gan_config,
    "bigan": tiny_bigan_config,
    "cpc": tiny_cpc_config,
    "supcon": tiny_supcon_config,
    "supervised": tiny_supervised_config,
    "vae": tiny_vae_config,
}
# OBJECTIVES="barlowtwins" in the environment: these alone, while one is written.
WANTED = os.environ.get("OBJECTIVES", " ".join(EVERY)).split()
CONFIGS = {name: EVERY[name] for name in WANTED}
STEPS = 8  # of 5 an epoch
PER_SAMPLE = ("npid", "deepclusterv2")  # with something to keep of every sample
TRANSFORMERS = ("mae", "ibot")
OTHERS = [name for name in CONFIGS if name not in PER_SAMPLE]
PASSES = {"deepclusterv2": 1, "sela": 1, "deepcluster": STEPS}  # over an epoch, at most


def asked(config: RunConfig, step: int) -> int:
    """How often a run is asked whether to stop, up to a step: at each batch of a pass too."""
    epochs = -(-step // 5)
    return step + 5 * min(epochs, PASSES.get(config.objective.name, 0)) if step else 0


# Of the losses, relative, in float64: see tests/trainer/test_same_run.py.
TOLERANCE = 1e-8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_images(tmp_path_factory.mktemp("data"))


def config_of(name: str, data: Path, out: Path, **changes: Any) -> RunConfig:
    return EVERY[name](data, out, **{"steps": STEPS, "precision": "fp64", **changes})


def assert_same_run(run: Path, other: Path, tolerance: float = TOLERANCE) -> None:
    """Samples alike, losses and final tensors within rounding."""
    assert samples(run) == samples(other)
    for mine, theirs in zip(metrics(run), metrics(other), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
    mine, theirs = (tensors(folder) for folder in (run, other))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        scale = max(1.0, float(value.double().abs().max()))
        off = float((value.double() - theirs[name].double()).abs().max())
        assert off < 1e3 * tolerance * scale, f"{name}: off by {off}"


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint's model."""
    return safetensors.torch.load(checkpoint_bytes(run)["model.safetensors"])


@pytest.mark.processors
@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_train_as_one_does(data: Path, tmp_path: Path, world_size: int) -> None:
    runs = {
        (name, w): config_of(name, data, tmp_path / f"{name}-{w}")
        for name in CONFIGS
        for w in (1, world_size)
    }
    for w in (1, world_size):
        train_all(w, [(config, 0) for (_, size), config in runs.items() if size == w])
    for name in CONFIGS:
        assert_same_run(runs[name, 1].out, runs[name, world_size].out)


@pytest.mark.processors
@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def test_pieces_train_as_the_whole_batch_does(data: Path, tmp_path: Path, step: int) -> None:
    """Pieces of 5 of 12 images: the last one is smaller. The quick test has every fourth kind."""
    names = list(CONFIGS)[::step]
    runs = {
        (name, size): config_of(name, data, tmp_path / f"{name}-{size}", micro_batch=size, steps=3)
        for name in names
        for size in (0, 5)
    }
    train_all(2, [(config, 0) for config in runs.values()])
    for name in names:
        assert_same_run(runs[name, 0].out, runs[name, 5].out, tolerance=1e-7)


STOPS = {"mid-epoch": (3, "fp32"), "edge": (5, "fp64"), "second-epoch": (7, "bf16")}


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize(
    "some", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["s", "all"]
)
def test_a_stopped_run_goes_on_to_the_bit(
    data: Path, tmp_path: Path, stop: str, some: bool
) -> None:
    """Among the quick tests each objective is stopped at one place, those with more to keep at
    all."""
    (step, precision), turn = STOPS[stop], list(STOPS).index(stop)
    names = [*dict.fromkeys([*OTHERS[turn::3], *(n for n in PER_SAMPLE if n in CONFIGS)])]
    names = names if some else list(CONFIGS)
    runs = [
        (config_of(name, data, tmp_path / f"{name}-{kind}", precision=precision), kind)
        for name in names
        for kind in ("whole", "stopped")
    ]
    stops = [(config, asked(config, step * (kind == "stopped"))) for config, kind in runs]
    outcomes = train_all(2, stops)
    assert outcomes == ["done", "stopped"] * len(names)
    train_all(2, [(config, 0) for config, kind in runs if kind == "stopped"])
    for name in names:
        assert_equal_runs(tmp_path / f"{name}-whole", tmp_path / f"{name}-stopped")


@pytest.mark.processors
@pytest.mark.parametrize(
    ("names", "stop"),
    [
        (PER_SAMPLE, 3),
        pytest.param(PER_SAMPLE, 5, marks=pytest.mark.slow),
        pytest.param(OTHERS, 3, marks=pytest.mark.slow),
    ],
    ids=["mid-epoch", "edge", "all-others"],
)
def test_another_number_of_processes_goes_on(
    data: Path, tmp_path: Path, names: tuple[str, ...], stop: int
) -> None:
    whole = [config_of(name, data, tmp_path / f"{name}-whole") for name in names]
    moved = [config_of(name, data, tmp_path / f"{name}-moved") for name in names]
    train_all(1, [(config, 0) for config in whole])
    train_all(2, [(config, asked(config, stop)) for config in moved])
    train_all(1, [(config, 0) for config in moved])
    for one, other in zip(whole, moved):
        assert_same_run(one.out, other.out)


def test_a_damaged_samples_stand_in_leaves_its_row_alone(data: Path, tmp_path: Path) -> None:
    """Its place in a batch shows another image, whose projection is not the sample's."""
    images, bad = tmp_path / "images.beton", tmp_path / "damaged.beton"
    settings = PackConfig(format="jpeg", workers=1)
    pack(str(data.parent / "images"), images, settings, progress=False)
    damaged.changed(images, bad, damaged.empty(17))
    runs = {}
    for name in ("npid", "deepclusterv2"):
        for step in (1, 5):  # of the first epoch, which shows every sample once
            config = config_of(name, bad, tmp_path / f"{name}-{step}", steps=step)
            allowed = DataConfig(train=(bad,), max_substitutes=2)
            runs[name, step] = dataclasses.replace(config, data=allowed)
    train_all(2, [(config, 0) for config in runs.values()])
    first, last = (tensors(runs["npid", step].out)["bank.rows"] for step in (1, 5))
    shown = set(samples(runs["npid", 1].out)[0]["ids"])
    later = [sample for sample in range(120) if sample not in shown | {17}]
    assert torch.equal(first[17], last[17])
    assert not any(torch.equal(first[sample], last[sample]) for sample in later)
    remembered = tensors(runs["deepclusterv2", 5].out)
    assert not remembered["memory.rows"][17].any()
    assert (remembered["clusters"][:, 17] == -1).all()
    assert (remembered["clusters"] >= 0).sum() == 2 * 119


@pytest.mark.slow
def test_every_encoder_is_exported_with_proof(data: Path, tmp_path: Path) -> None:
    runs = {}
    for name in CONFIGS:
        config = config_of(name, data, tmp_path / name, steps=1, precision="fp32")
        if name not in TRANSFORMERS:
            encoder = dataclasses.replace(config.encoder, name="resnet18", stem="cifar")
            config = dataclasses.replace(config, encoder=encoder)
        runs[name] = config
    train_all(1, [(config, 0) for config in runs.values()])
    for name, config in runs.items():
        kind, suffix = (
            ("torch-export", "pt2") if name in TRANSFORMERS else ("torchvision", "safetensors")
        )
        done = export(config.out, tmp_path / f"{name}.{suffix}", kind)
        assert done.proof.relative_difference <= done.proof.tolerance


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "deepspeed-1"])
def test_strategies_train_as_ddp_does(data: Path, tmp_path: Path, name: Any) -> None:
    for objective in (each for each in CONFIGS if not each.startswith("npid-")):
        runs = [
            config_of(
                objective,
                data,
                tmp_path / f"{objective}-{strategy}",
                precision="fp32",
                steps=6,
                strategy=StrategyConfig(name=strategy),
            )
            for strategy in ("ddp", name)
        ]
        for config in runs:
            assert train(2, config) == "done"
        for mine, other in zip(*(metrics(config.out) for config in runs), strict=True):
            assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_first_losses_are_those_of_chance(data: Path, tmp_path: Path) -> None:
    """ln 4, ln N, ln (K + 1), ln K: what a network that knows nothing pays."""
    runs = {name: config_of(name, data, tmp_path / name, steps=1) for name in EVERY}
    # A high temperature makes all of similar rows alike: what is left is the count.
    similarities = (
        "npid",
        "npid-sampled",
        "npid-nce",
        "pirl",
        "deepclusterv2",
        "sela",
        "nnclr",
        "swav",
        "dino",
        "ibot",
        "supcon",
        "cpc",
    )
    for name in similarities:
        objective = dataclasses.replace(runs[name].objective, temperature=100.0)
        runs[name] = dataclasses.replace(runs[name], objective=objective)
    train_all(1, [(config, 0) for config in runs.values()])
    chance = {
        "rotation": math.log(4),
        "jigsaw": math.log(20),
        "relativepatch": math.log(8),
        "frameorder": math.log(12),
        "gan": 3 * math.log(2),
        "bigan": 4 * math.log(2),
        "colourisation": math.log(261),
        "supervised": math.log(3),
        "cpc": math.log(24 * 9),
        "supcon": math.log(2 * 24 - 1),
        "swav": math.log(7),
        "dino": math.log(20),
        "ibot": math.log(20),  # and as much for each view of which patches are hidden
        "npid": math.log(120),
        "npid-sampled": math.log(41),
        # One row is the image's own, 40 are noise, of which 40 of 41 are: each is asked about.
        "npid-nce": math.log(41) + 40 * math.log(41 / 40),
        "pirl": math.log(120),
        "sela": math.log(7),
        "nnclr": math.log(24),
        "deepcluster": math.log(7),
        "deepclusterv2": math.log(runs["deepclusterv2"].objective.prototypes),  # type: ignore[union-attr]
    }
    for name, expected in chance.items():
        first = metrics(runs[name].out)[0]
        loss = first["loss"] - first.get("patch_loss", 0)
        # Similarities of at most 1 over a temperature of 100; a fresh linear layer's logits.
        assert loss == pytest.approx(expected, abs=0.02 if name in similarities else 0.3), name
