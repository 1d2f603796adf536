"""Calibration finds the line that a machine's readings lie on, and plans by it."""

import dataclasses
import json
from pathlib import Path

import pytest

from launch.__main__ import main
from tests.trainer.plans import plan, small
from tests.trainer.runs import pack_images
from trainer.config import RunConfig
from trainer.planner.calibrate import calibrated
from trainer.planner.memory import memory
from trainer.planner.probe import Reading
from trainer.planner.rates import GPUS, Gpu, Rates
from trainer.planner.step_cost import StepCost, count_step


def reading(batch: int, peak: float, seconds: float) -> Reading:
    return Reading(
        batch=batch,
        device="cpu",
        name="test",
        memory=8e9,
        peak_bytes=peak,
        step_seconds=seconds,
        wait_seconds=0.0,
        augment_seconds=0.001 * batch,
        loss_seconds=1e-6 * batch**2,
        update_seconds=0.01,
        core_seconds=1e-3,
    )


def counts_of(config: RunConfig) -> list[StepCost]:
    return [count_step(dataclasses.replace(config, batch=b), 1, "cpu") for b in (32, 64)]


def test_calibration_finds_the_line_that_readings_lie_on() -> None:
    config = small()
    counts = counts_of(config)
    peaks = [5e8 + 1.5 * count.peak for count in counts]
    readings = [
        reading(b, peak, 0.2 + 0.02 * b + 0.001 * b + 1e-6 * b**2 + 0.01)
        for b, peak in zip((32, 64), peaks)
    ]
    measured = calibrated(Rates(gpu=GPUS["a100-80g"]), config, readings, counts)
    assert measured.memory_factor == pytest.approx(1.5)
    assert measured.context_bytes == pytest.approx(5e8)
    assert measured.calibration is not None
    assert measured.calibration.image_seconds == pytest.approx(0.02)
    assert measured.calibration.base_seconds == pytest.approx(0.2)

    large = dataclasses.replace(config, batch=256)
    planned = plan(large, gpus=1, rates=measured)
    expected = 0.2 + 0.021 * 256 + 1e-6 * 256**2 + 0.01
    assert planned.time.seconds == pytest.approx(expected, rel=0.02)
    step_cost = count_step(large, 1, "cpu")
    assert planned.memory.total == pytest.approx(5e8 + 1.5 * step_cost.peak)
    assert planned.memory.limit == 8e9


def test_processes_on_a_cpu_share_its_memory() -> None:
    config = small()
    readings = [reading(32, 6e8, 1.0), reading(64, 7e8, 2.0)]
    rates = calibrated(Rates(gpu=_any_gpu()), config, readings, counts_of(config))
    shared = memory(count_step(config, 2), rates, processes=4)
    assert shared.limit == 2e9


def _any_gpu() -> Gpu:
    return next(iter(GPUS.values()))


@pytest.mark.slow
def test_calibrate_measures_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = pack_images(tmp_path, count=40)
    settings = ["--data.train", str(data), "--batch", "40", "--calibrate", "--json"]
    assert main(["plan", "digits-demo", *settings, "--out", str(tmp_path / "run")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 2e8 < found["rates"]["context_bytes"] < 4e9
    assert 0 < found["summary"]["step_seconds"] < 60
    assert not (tmp_path / "run").exists()
