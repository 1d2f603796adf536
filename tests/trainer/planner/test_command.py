"""`widebatch plan` plans every recipe, as a table or JSON, and refuses in one line."""

import dataclasses
import json
from pathlib import Path

import pytest

from common.errors import ConfigError
from launch.__main__ import main
from tests.said import error_line
from tests.trainer.plans import rates
from tests.trainer.runs import pack_images
from tests.trainer.tiny import tiny_config
from trainer.planner.plan import images_of, make_plan
from trainer.planner.traffic import Cluster
from trainer.recipes import RECIPES

# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simclr-r5", "--gpu", "h100-80g"], "did you mean simclr-r50?"),
        (["simclr-r50"], "--gpu NAME is one of a100-40g"),
        (["simclr-r50", "--gpu", "h100"], "did you mean h100-80g?"),
        (["simclr-r50", "--gpu", "h100-80g", "--calibrate"], "--gpu and --calibrate"),
        (["simclr-r50", "--calibrate", "--flops-fraction", "0.5"], "--calibrate measures that"),
        (["simclr-r50", "--gpu", "h100-80g", "--nodes", "0"], "--nodes 0: must be a number from 1"),
        (
            ["simclr-r50", "--gpu", "h100-80g", "--link-gbps", "-1"],
            "--link-gbps -1.0: must be a number above 0",
        ),
        (["simclr-r50", "--gpu", "h100-80g", "--flops-fraction", "2"], "above 0 to 1"),
        (["simclr-r50", "--gpu", "h100-80g", "--gpus", "3"], "does not divide by 3"),
        (
            ["simclr-r50", "--gpu", "h100-80g", "--images", "9"],
            "more than the 9 samples of its data set",
        ),
        (["simclr-r50", "--gpu", "h100-80g", "--data.train", "no.beton"], "no.beton"),
        (["mocov2-r50", "--gpu", "h100-80g", "--micro-batch", "8"], "--sync-batch-norm"),
        (["simclr-r50", "--gpu", "h100-80g", "--encoder.name", "resnet51"], "resnet50"),
    ],
    ids=lambda value: " ".join(value)[-36:] if isinstance(value, list) else "",
)
def test_what_cannot_be_planned_gets_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    empty_folder: Path,
) -> None:
    assert main(["plan", *arguments]) == 2
    said = capsys.readouterr()
    assert message in error_line(said.err)
    assert not said.out
    assert not list(empty_folder.iterdir())


def test_misspelt_settings_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "simclr-r50", "--gpu", "h100-80g", "--bacth", "8"]) == 2
    assert "--bacth" in capsys.readouterr().err


# --- in and out ---------------------------------------------------------------------------------


def test_json_holds_the_plan_and_what_follows_from_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = ["--batch", "512", "--nodes", "2", "--gpus", "4", "--gpu", "a100-40g", "--json"]
    assert main(["plan", "simclr-cifar10-r18", *settings]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["recipe"] == "simclr-cifar10-r18"
    assert values["summary"]["fits"] is True
    assert values["summary"]["memory_bytes"] == sum(p["bytes"] for p in values["memory"]["parts"])
    assert values["summary"]["gpu_hours"] == pytest.approx(8 * values["summary"]["hours"])
    assert values["run"]["peak_lr"] == pytest.approx(1.0 * 512 / 256)


def test_table_says_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "mocov3-cifar10-r18", "--gpus", "8", "--gpu", "b200-180g"]) == 0
    text = capsys.readouterr().out
    for word in (
        "fits",
        "peak learning rate",
        "activations",
        "embeddings",
        "bound by the",
        "GPU-hours",
        "cores at",
        "MB/s",
        "stated",
    ):
        assert word in text


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_recipe_can_be_planned(recipe: str) -> None:
    config = RECIPES[recipe]()
    config = dataclasses.replace(config, batch=8)
    images = images_of(config, known=False)
    found = make_plan(config, Cluster(nodes=1, gpus=2, rates=rates()), images)
    assert found.fits
    assert found.images_per_second > 0


def test_images_come_from_the_file_where_there_is_one(tmp_path: Path) -> None:
    data = pack_images(tmp_path, count=6)
    config = tiny_config(data, tmp_path / "run")
    found = images_of(config)
    assert (found.count, found.pixels) == (6, 1600)
    assert 0 < found.bytes <= 4800
    assert images_of(config, count=99).count == 99
    nameless = dataclasses.replace(config, recipe="")
    with pytest.raises(ConfigError, match="--images"):
        images_of(nameless, known=False)
