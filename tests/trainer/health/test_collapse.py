"""A network that maps all images to one point is noticed; one that learns is not blamed."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from common.errors import ConfigError
from launch.exit_codes import ExitCode
from tests.dist import run_ranks
from tests.trainer.faulty import small_config, train_with_faults
from tests.trainer.runs import metrics, pack_images, small_encoder, train
from tests.trainer.tiny import tiny_mocov2_config, tiny_mocov3_config
from trainer.health.collapse import CollapseAlarm, CollapseConfig, figures, moments
from trainer.models.encoders import EncoderConfig
from trainer.telemetry import Record, TelemetryConfig

EVERY_STEP = CollapseConfig(every_steps=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_images(tmp_path_factory.mktemp("data"))


class _Constant(nn.Module):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features * 0 + torch.arange(features.shape[1], device=features.device)


def constant_encoder() -> nn.Module:
    """One point for all images, whatever the weights."""
    return nn.Sequential(small_encoder(), _Constant())


CONSTANT = EncoderConfig(name="tests.trainer.health.test_collapse:constant_encoder", image_size=32)


def by_definition(z_MD: torch.Tensor) -> tuple[float, float]:
    """The two figures from all rows and a singular value decomposition."""
    z_MD = z_MD.double() / z_MD.double().norm(dim=1, keepdim=True)
    std = float(z_MD.std(dim=0, correction=0).mean()) * math.sqrt(z_MD.shape[1])
    singular = torch.linalg.svdvals(z_MD)
    share = singular / singular.sum() + 1e-7
    return std, float(torch.exp(-(share * share.log()).sum()))


def rows(count: int = 48, dimensions: int = 16) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(count, dimensions) * torch.linspace(0.1, 2, dimensions) + 0.3


def _figures(rank: int, world_size: int) -> list[float]:
    mine = rows().chunk(world_size)[rank]
    return [float(x or 0) for x in figures(moments(mine), 16)]


def test_the_figures_are_those_of_their_definitions() -> None:
    assert figures(moments(rows()), 16) == pytest.approx(by_definition(rows()), rel=1e-9)
    even = figures(moments(torch.randn(4000, 8)), 8)
    assert even == pytest.approx((1.0, 8.0), rel=0.01)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_figures_are_the_global_batchs_at_any_world_size(world_size: int) -> None:
    for found in run_ranks(_figures, world_size):
        assert found == pytest.approx(by_definition(rows()), rel=1e-9)


@pytest.mark.parametrize("row", [torch.arange(16.0) + 1, torch.zeros(16)], ids=["point", "zero"])
def test_one_point_has_no_spread_and_rank_one(row: torch.Tensor) -> None:
    std, rank = figures(moments(row.expand(20, 16)), 16)
    assert std < 1e-6
    assert rank == pytest.approx(1, abs=0.01)


def test_many_dimensions_have_a_spread_and_no_rank() -> None:
    std, rank = figures(moments(torch.randn(64, 600)), 600)
    assert std == pytest.approx(1, rel=0.05)
    assert rank is None


def run_alarm(alarm: CollapseAlarm, projections: list[torch.Tensor]) -> list[Record]:
    records: list[Record] = []
    for step, z_MD in enumerate(projections, 1):
        alarm.measure(z_MD, step)
        records.append({"step": step})
        alarm.read(records[-1:])
    return records


@pytest.mark.reliability(15)
def test_the_alarm_is_raised_after_as_many_measurements_as_set() -> None:
    alarm = CollapseAlarm(dataclasses.replace(EVERY_STEP, measurements=3, on_alarm="stop"), True)
    point = torch.ones(8, 16)
    run_alarm(alarm, [point, point])
    assert not alarm.alarm
    run_alarm(alarm, [rows(), point, point])
    assert not alarm.alarm, "one good measurement starts the count anew"
    run_alarm(alarm, [point])
    assert alarm.alarm and alarm.stops
    assert "the projections have collapsed" in alarm.reason()


def test_lost_numbers_are_not_taken_for_a_collapse() -> None:
    alarm = CollapseAlarm(dataclasses.replace(EVERY_STEP, measurements=1), True)
    (record,) = run_alarm(alarm, [torch.full((8, 16), math.nan)])
    assert not alarm.alarm and math.isnan(record["feature_std"])


def test_only_due_steps_are_measured_and_only_the_judge_keeps_them() -> None:
    every_third = CollapseAlarm(CollapseConfig(every_steps=3), judges=True)
    records = run_alarm(every_third, [rows()] * 7)
    assert [r["step"] for r in records if "feature_std" in r] == [3, 6]
    other = CollapseAlarm(EVERY_STEP, judges=False)
    assert all("feature_std" not in r for r in run_alarm(other, [rows()] * 2))
    assert not run_alarm(CollapseAlarm(CollapseConfig(every_steps=0), True), [rows()])[0].keys() - {
        "step"
    }


@pytest.mark.reliability(15)
def test_constant_embeddings_end_a_run_that_is_to_end_for_them(data: Path, tmp_path: Path) -> None:
    """On all ranks, two measurements and a reading of the telemetry later."""
    config = small_config(
        data,
        tmp_path / "run",
        steps=12,
        encoder=CONSTANT,
        collapse=CollapseConfig(every_steps=2, measurements=2, on_alarm="stop"),
        telemetry=TelemetryConfig(tensorboard=False, log_every=2),
    )
    fatal = int(ExitCode.FATAL)
    said = train_with_faults(2, config, exits={0: fatal, 1: fatal})
    assert "ended: NumericalError: step 4: the projections have collapsed" in (said[0] or "")
    assert "ended: NumericalError" in (said[1] or "")
    assert metrics(config.out)[-1]["step"] <= 6


@pytest.mark.slow
def test_constant_embeddings_are_a_warning_by_default(data: Path, tmp_path: Path) -> None:
    config = small_config(data, tmp_path / "run", steps=4, encoder=CONSTANT, collapse=EVERY_STEP)
    (text,) = train_with_faults(1, config)
    assert (text or "").count("the projections have collapsed") == 1
    assert "ended: done" in (text or "")


@pytest.mark.reliability(15)
@pytest.mark.parametrize(
    "make",
    [
        small_config,
        pytest.param(tiny_mocov2_config, marks=pytest.mark.slow),
        pytest.param(tiny_mocov3_config, marks=pytest.mark.slow),
    ],
)
def test_a_good_run_is_far_from_the_alarm_from_its_first_step_on(
    data: Path, tmp_path: Path, make: Any
) -> None:
    encoder = small_config(data, tmp_path).encoder
    config = make(data, tmp_path / "run", steps=12, encoder=encoder, collapse=EVERY_STEP)
    assert train(1, config) == "done"
    for found in metrics(config.out):
        assert found["feature_std"] > 3 * EVERY_STEP.feature_std, found
        assert found["effective_rank"] > 2 * EVERY_STEP.effective_rank, found


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"--collapse\.every-steps -1"):
        CollapseConfig(every_steps=-1)
