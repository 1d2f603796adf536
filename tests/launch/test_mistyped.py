"""Mistyped commands, options, settings and values: one line that names what was meant."""

import json
import re
from pathlib import Path

import pytest

from common.errors import ConfigError
from launch.__main__ import main
from launch.arguments import nearest
from launch.settings_arguments import parse_settings, run_options
from tests.trainer.runs import pack_images
from tests.trainer.tiny import tiny_config
from trainer.config import to_json
from trainer.recipes import RECIPES
from trainer.state.run_folder import _check_same_run
from trainer.state.settings import settings

R50 = ["simclr-r50", "--data.train", "{data}"]
H100 = ["simclr-r50", "--gpu", "h100-80g"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_images(tmp_path_factory.mktemp("data"), count=12)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["retrain"], "did you mean pretrain?"),
        (["--verison"], "did you mean --version?"),
        (["pretrain", *R50, "--optim.base_lrr", "1"], "did you mean --optim.base-lr?"),
        (["pretrain", *R50, "--schedul.warmup-epochs", "1"], "did you mean --schedule.warmup-epo"),
        (["pretrain", *R50, "--base-lr=1"], "did you mean --optim.base-lr?"),
        (["pretrain", *R50, "--lr", "1"], "did you mean --optim.base-lr?"),
        (["pretrain", *R50, "--learning_rate", "1"], "did you mean --optim.base-lr?"),
        (["pretrain", *R50, "--workers", "4"], "did you mean --loader.workers?"),
        (["pretrain", *R50, "--num-workers=4"], "did you mean --loader.workers?"),
        (["pretrain", *R50, "--batch-size", "4"], "did you mean --batch?"),
        (["pretrain", *R50, "-b", "4"], "did you mean --batch?"),
        (["pretrain", *R50, "--arch", "resnet18"], "did you mean --encoder.name?"),
        (["pretrain", *R50, "--gpus", "8"], "did you mean --devices?"),
        (["pretrain", *R50, "--nproc_per_node=8"], "did you mean --devices?"),
        (["pretrain", *R50, "--nodes", "2"], "started by Slurm or torchrun"),
        (["pretrain", *R50, "--devices", "0"], "'0' is no number of processes, from 1"),
        (["evaluate", "knn", "run", "--gpus", "8"], "did you mean --devices?"),
        (["plan", *H100, "--devices", "8"], "did you mean --gpus?"),
        (["evaluate", "linear", "run", "--lr", "1"], "did you mean --base-lr?"),
        (["evaluate", "knn", "run", "--num-workers", "4"], "did you mean --workers?"),
        (["plan", *H100, "--nnodes", "4"], "did you mean --nodes?"),
        (["pretrain", *R50, "--zzz", "1"], "see 'widebatch pretrain simclr-r50 --help'"),
        (["pretrain", *R50, "--batch", "many"], "--batch takes INT: invalid"),
        (
            ["pretrain", *R50, "--precision", "bf17"],
            "--precision: unknown value 'bf17'; did you mean bf16?",
        ),
        (["pretrain", *R50, "--crop.scale", "1"], "--crop.scale takes FLOAT FLOAT"),
        (
            ["pretrain", *R50, "--watchdog.timeout", "-1"],
            "--watchdog.timeout -1.0: must be a number from 0",
        ),
        (["pretrain", *R50, "--data.train", "{data}"], "--data.train stands more than once; name"),
        (["evaluate", "knn", "run", "--data.test", "a", "--data.test=b"], "stands more than once"),
        (
            ["pretrain", *R50, "--seed", "1", "more"],
            "unexpected 'more'; see 'widebatch pretrain simclr-r50",
        ),
        (["pretrain", "simclr-r50"], "--data.train FILE is required"),
        (["plan", *H100, "--optim.base_lrr", "1"], "did you mean --optim.base-lr?"),
        (["plan", "simclr-r50", "--gpuu", "b200-180g"], "did you mean --gpu?"),
        (["plan", "simclr-r5", "--gpu", "b200-180g"], "did you mean simclr-r50?"),
        (["evaluate", "knnn", "run"], "did you mean knn?"),
        (["evaluate", "knn", "run", "--data.trian", "a"], "did you mean --data.train?"),
        (["export", "run", "out", "--fromat", "onnx"], "did you mean --format?"),
        (["export", "run", "out", "--format", "onyx"], "did you mean onnx?"),
        (["pack", "a", "b.beton", "--max-sied", "5"], "did you mean --max-side?"),
        (["doctor", "--device", "2"], "unexpected '--device 2'"),
        (["doctor", "--devises", "2"], "did you mean --devices?"),
        (["doctor", "--recipe", "simclr-r5"], "did you mean simclr-r50?"),
        (["report", "run", "--max-imags", "5"], "did you mean --max-images?"),
        (["runs", "--jsno"], "did you mean --json?"),
        (["completion", "fihs"], "did you mean fish?"),
        (["pretrain", *R50, "--out", ""], "--out is empty; was a variable of the shell not set?"),
        (["pretrain", *R50, "--data.test="], "--data.test is empty"),
        (["report", ""], "the word after 'report' is empty"),
    ],
    ids=lambda value: " ".join(value)[-45:] if isinstance(value, list) else "",
)
def test_what_was_meant_is_named_in_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], data: Path
) -> None:
    assert main([word.format(data=data) for word in arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err
    assert shown.err.startswith("widebatch: error: ") and shown.err.count("\n") == 1


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("optim", "config.json: config.optim.base_lrr: unknown setting; did you mean base_lr?"),
        ("", "config.json: config.base_lrr: unknown setting"),
    ],
)
def test_a_wrong_key_in_the_folders_configuration_is_named(
    part: str, said: str, tmp_path: Path
) -> None:
    config = tiny_config(Path("a.beton"), tmp_path)
    saved = to_json(config)
    (saved[part] if part else saved)["base_lrr"] = saved["optim"].pop("base_lr")
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match=re.escape(said)):
        _check_same_run(config)


def test_a_flag_without_its_group_is_meant_before_one_that_looks_alike() -> None:
    assert nearest("--k", ["--kk", "--collapse.k"]) == "--collapse.k"
    assert nearest("--zzz", ["--batch"]) is None


def test_the_options_that_the_source_names_are_those_of_the_classes() -> None:
    every = {flag for build in RECIPES.values() for s in settings(build()) for flag in s.flags}
    tasks = "--objective.tasks."  # of all kinds, where no recipe has every one
    named = {re.sub(r"(?<=tasks)\.\d+\.", ".", flag) for flag in every}
    assert {flag for flag in run_options() if not flag.startswith(tasks)} == {
        flag for flag in every if not flag.startswith(tasks)
    }
    assert named <= set(run_options())


def test_options_may_be_shortened_and_have_either_dash() -> None:
    from launch.command_line import _parser

    args = _parser().parse_args(["pack", "a", "b.beton", "--max-sid", "5"])
    assert args.max_side == 5
    words = ["--data.train", "x", "--optim.base_lr=2"]
    assert parse_settings("pretrain", "simclr-r50", words).optim.base_lr
