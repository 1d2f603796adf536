"""Settings, what follows from them, and their way through JSON."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from data_pipeline.crops import CropConfig
from trainer.config import DataConfig, RunConfig, differences, from_json, plan_run, to_json
from trainer.evaluation.job import JobConfig
from trainer.models.encoders import EncoderConfig
from trainer.optim.schedule import ScheduleConfig
from trainer.recipes import RECIPES
from trainer.state.settings import settings


def config(**changes: Any) -> RunConfig:
    base = RECIPES["simclr-r50"]()
    return dataclasses.replace(base, data=DataConfig(train=(Path("x.beton"),)), **changes)


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_recipe_survives_json(recipe: str) -> None:
    original = dataclasses.replace(RECIPES[recipe](), data=DataConfig(train=(Path("x.beton"),)))
    again = from_json(RunConfig, json.loads(json.dumps(to_json(original))))
    assert again == original


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bacth": 3}, r"config\.bacth: unknown setting; did you mean batch\?"),
        ({"batch": "many"}, r"config\.batch: expected int, found 'many'"),
        ({"batch": True}, r"config\.batch: expected int, found True"),
        ({"precision": "fp8"}, r"config\.precision: 'fp8' is none of auto, bf16, fp32, fp64"),
        ({"crop": {"size": 32, "scale": [0.1]}}, r"config\.crop\.scale: expected 2 values"),
        ({"optim": 3}, r"config\.optim: expected an object"),
        ({"objective": 3}, r"config\.objective: expected an object"),
        (
            {"objective": {"name": "bert"}},
            r"config\.objective\.name: 'bert' is none of simclr, moco, mocov3",
        ),
        ({"objective": {"name": "moco", "que": 1}}, r"config\.objective\.que: .* queue\?"),
        ({"objective": {"queue": 1}}, r"config\.objective\.queue: unknown setting"),
    ],
)
def test_a_wrong_value_in_json_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_json(RunConfig, {**to_json(config()), **change})


def test_a_missing_setting_in_json_is_named() -> None:
    values = to_json(config())
    del values["batch"]
    with pytest.raises(ConfigError, match="'batch'"):
        from_json(RunConfig, values)


def test_the_canonical_run_comes_to_the_papers_figures() -> None:
    plan = plan_run(config(batch=4096, epochs=100), num_samples=1_281_167, world_size=32)
    assert plan.local_batch == 128
    assert plan.steps_per_epoch == 312
    assert plan.total_steps == 31_200
    assert plan.warmup_steps == 3_120
    assert plan.peak_lr == pytest.approx(4.8)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12, 24])
def test_nothing_but_the_share_depends_on_the_number_of_processes(world_size: int) -> None:
    plan = plan_run(config(batch=24), 1000, world_size)
    alone = plan_run(config(batch=24), 1000, 1)
    assert plan == dataclasses.replace(alone, world_size=world_size, local_batch=24 // world_size)


def test_every_recipe_says_its_own_name() -> None:
    assert {name: recipe().recipe for name, recipe in RECIPES.items()} == {n: n for n in RECIPES}
    assert next(iter(RECIPES)) == "simclr-r50"


@pytest.mark.reliability(12)
@pytest.mark.parametrize(
    ("batch", "world_size", "message"),
    [
        (100, 8, "nearest that do: 96 and 104"),
        (999, 2, "nearest that do: 998 and 1000"),
        (3, 4, "nearest that do: 4"),
        (3, 2000, "nearest that do: none, of 1000 samples"),
        (1001, 1, "more than the 1000 samples of x.beton; try --batch 64"),
        (1002, 3, "try --batch 96"),
        (1601, 800, "try --batch 800"),
        (1, 1, "must be a number from 2"),
    ],
)
def test_a_batch_that_cannot_be_is_refused_with_those_that_can(
    batch: int, world_size: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_run(config(batch=batch), 1000, world_size)


def test_more_clusters_than_samples_are_refused_before_a_pass_over_all() -> None:
    base = RECIPES["deepclusterv2-cifar10-r18"]()
    few = dataclasses.replace(base, data=DataConfig(train=(Path("x.beton"),)), batch=96)
    message = r"--objective\.prototypes 500 is more than the 480 samples of an epoch of x\.beton"
    with pytest.raises(ConfigError, match=message):
        plan_run(few, 575, 1)
    assert plan_run(few, 576, 1).steps_per_epoch == 6


@pytest.mark.parametrize("seed", [1 << 64, -(1 << 63) - 1])
def test_a_seed_beyond_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match=f"--seed {seed}: choose -9223372036854775808 to"):
        config(seed=seed)
    with pytest.raises(ConfigError, match=f"--seed {seed}: choose"):
        JobConfig(source="pixels:8", seed=seed)


def test_views_of_a_size_that_the_encoder_does_not_take_are_refused() -> None:
    vit = config(batch=10, encoder=EncoderConfig(name="vit_b_32", image_size=64))
    with pytest.raises(ConfigError, match=r"--crop.size 32: vit_b_32 .*--encoder.image-size 64"):
        plan_run(dataclasses.replace(vit, crop=CropConfig(size=32)), 1000, 1)
    plan_run(dataclasses.replace(vit, crop=CropConfig(size=64)), 1000, 1)


def test_steps_override_epochs_and_fractions_of_epochs_count() -> None:
    assert plan_run(config(batch=10, epochs=0.5), 1000, 1).total_steps == 50
    assert plan_run(config(batch=10, steps=7), 1000, 1).total_steps == 7
    with pytest.raises(ConfigError, match=r"--epochs 0\.001: the run would have 0 steps"):
        plan_run(config(batch=10, epochs=0.001), 1000, 1)


@pytest.mark.parametrize(("steps", "said"), [(60, 1), (99, 1), (100, 0), (5, 1)])
def test_a_warm_up_that_is_most_of_the_run_is_said(steps: int, said: int) -> None:
    schedule = ScheduleConfig(warmup_epochs=0.5)
    plan = plan_run(config(batch=10, steps=steps, schedule=schedule), 1000, 1)
    words = [f"the warm-up takes 50 steps and the whole run {steps}; see --schedule.warmup-epochs"]
    assert plan.caveats() == words * said


def test_only_settings_that_change_numbers_count_as_differences() -> None:
    saved, current = to_json(config()), to_json(config(seed=1, out=Path("elsewhere")))
    current["optim"]["base_lr"] = 0.5
    current["loader"]["workers"] = 7
    assert differences(saved, current) == ["optim.base_lr: 0.3 -> 0.5", "seed: 0 -> 1"]


def test_pieces_may_change_their_size_where_statistics_are_those_of_the_batch() -> None:
    for norm, found in (("exact", []), ("piece", ["micro_batch: 4 -> 8"])):
        saved, current = (
            to_json(config(micro_batch=size, micro_batch_norm=norm)) for size in (4, 8)
        )
        assert differences(saved, current) == found


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_number_of_every_part_is_bounded_and_named_as_an_option(recipe: str) -> None:
    base = dataclasses.replace(RECIPES[recipe](), data=DataConfig(train=(Path("x.beton"),)))
    whole = dataclasses.replace(base, steps=10, knn=dataclasses.replace(base.knn, resize=8))
    checked = 0
    for setting in settings(whole):
        several = isinstance(setting.value, tuple) and setting.value != ()
        number = setting.value[0] if several else setting.value
        if setting.is_switch or setting.choices or not isinstance(number, int | float):
            continue
        endless = (10**25,) if isinstance(number, int) else (float("nan"), float("inf"))
        for bad in (-(2**80) if setting.key == "seed" else -99, *endless):
            values = part = to_json(whole)
            *path, name = setting.key.split(".")
            for key in path:
                part = part[int(key) if key.isdigit() else key]
            part[name] = [bad] * len(setting.value) if several else bad
            option = setting.flag.rpartition(".")[2].removeprefix("--")
            with pytest.raises(ConfigError, match=rf"[.-]{option} .*({bad}|1e.25)"):
                from_json(RunConfig, values)
            checked += 1
    assert checked > 80


@pytest.mark.parametrize(
    ("part", "settings", "said"),
    [
        ("telemetry", {"prometheus_port": 99999}, "port 99999: must be a number from 0 to 65535"),
        ("telemetry", {"log_every": 0}, "--telemetry.log-every 0: must be a number from 1"),
        ("checkpoint", {"keep": 1}, "--checkpoint.keep 1: must be a number from 2"),
        ("checkpoint", {"max_failures": 0}, "max-failures 0: must be a number from 1"),
        ("crop", {"size": 1}, "--crop.size 1: must be a number from 2"),
        ("crop", {"ratio": (2.0, 1.0)}, "--crop.ratio 2.0 1.0: the least comes first"),
        (
            "watchdog",
            {"join_timeout": 1e30},
            "--watchdog.join-timeout 1e+30: must be a number from 0 to 1e9",
        ),
        ("straggler", {"factor": 1.0}, "--straggler.factor 1.0: must be a number above 1"),
        ("", {"epochs": 1e30}, "--epochs 1e+30: must be a number above 0 to 1e9"),
        ("", {"steps": 0}, "--steps 0: must be a number from 1 to 1e15"),
        ("", {"micro_batch": -1}, "--micro-batch -1: must be a number from 0"),
        ("", {"max_skipped_steps": 0}, "--max-skipped-steps 0: must be a number from 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_number_that_means_nothing_is_refused(
    part: str, settings: dict[str, Any], said: str
) -> None:
    owner = getattr(config(), part) if part else config()
    with pytest.raises(ConfigError, match=re.escape(said)):
        dataclasses.replace(owner, **settings)
