"""A step whose numbers are lost moves no rank; too many in a row end the run, or take it back."""

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError, NonFiniteError
from launch.exit_codes import ExitCode, exit_code_for
from tests.trainer.faulty import small_config, train_with_faults
from tests.trainer.runs import assert_equal_runs, checkpoint_bytes, metrics, pack_images, samples
from trainer.config import RunConfig
from trainer.health.non_finite import FILE, GuardConfig, NumericalGuard
from trainer.state.checkpoint import CheckpointConfig
from trainer.telemetry import Record, TelemetryConfig

FATAL = int(ExitCode.FATAL)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_images(tmp_path_factory.mktemp("data"))


def read_each_step(data: Path, out: Path, **changes: Any) -> RunConfig:
    """Two lost steps in a row are too many; a checkpoint every two steps, a look after each."""
    return small_config(
        data,
        out,
        max_skipped_steps=2,
        checkpoint=CheckpointConfig(every_epochs=0, every_steps=2),
        telemetry=TelemetryConfig(tensorboard=False, log_every=1),
        **changes,
    )


def record(step: int, skipped: int = 1) -> Record:
    return {"step": step, "loss": float("nan"), "skipped": skipped, "gradient_norm": 1.0}


@pytest.mark.reliability(14)
def test_nan_on_one_rank_moves_no_rank_and_names_the_samples(data: Path, tmp_path: Path) -> None:
    """The third step is the last: afterwards all is as after the second, to the bit."""
    two = small_config(data, tmp_path / "two", steps=2)
    three = small_config(data, tmp_path / "three", steps=3)
    train_with_faults(2, two)
    train_with_faults(2, three, "step.backward rank=1 pass=3 nan")
    assert checkpoint_bytes(three.out) == checkpoint_bytes(two.out)
    assert [r["skipped"] for r in metrics(three.out)] == [0, 0, 1]
    (line,) = (json.loads(text) for text in (three.out / FILE).read_text().splitlines())
    assert line["step"] == 3 and line["gradient_norm"] in ("nan", "inf")
    assert line["ids"] == samples(three.out)[2]["ids"]
    assert (three.out / FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.reliability(14)
def test_too_many_in_a_row_end_the_run_with_the_samples_named(data: Path, tmp_path: Path) -> None:
    config = small_config(data, tmp_path / "run", max_skipped_steps=2)
    said = train_with_faults(
        2, config, "step.backward rank=1 pass=2+ nan", exits={0: FATAL, 1: FATAL}
    )
    ids = samples(config.out)[2]["ids"]
    for text in said:
        assert "ended: NonFiniteError: step 3: gradients were not finite in 2 steps in a row" in (
            text or ""
        )
        assert f"on samples {', '.join(map(str, ids[:8]))} and 16 more: see {FILE}" in (text or "")
    assert [r["skipped"] for r in metrics(config.out)] == [0, 1, 1], "the records are kept"


@pytest.mark.slow
@pytest.mark.reliability(14)
def test_a_fault_that_passes_is_rolled_back_and_the_run_is_equal(
    data: Path, tmp_path: Path
) -> None:
    """Passing 3 and 4 are steps 3 and 4; their second time is passing 5 and 6."""
    straight = read_each_step(data, tmp_path / "straight")
    train_with_faults(2, straight)
    config = read_each_step(data, tmp_path / "run", guard=GuardConfig(on_repeat="rollback"))
    said = train_with_faults(2, config, "step.backward rank=0 pass=3-4 nan")
    assert "going on from it, 0 more times" in (said[0] or "")
    assert_equal_runs(config.out, straight.out)


@pytest.mark.slow
@pytest.mark.reliability(14)
def test_a_fault_that_stays_ends_the_run_when_its_rollbacks_are_used_up(
    data: Path, tmp_path: Path
) -> None:
    guard = GuardConfig(on_repeat="rollback", rollbacks=2)
    config = read_each_step(data, tmp_path / "run", guard=guard)
    said = train_with_faults(
        2, config, "step.backward rank=1 pass=3+ nan", exits={0: FATAL, 1: FATAL}
    )
    assert (said[0] or "").count("going on from it") == 2
    assert "ended: NonFiniteError" in (said[0] or "")


def test_steps_between_start_the_count_anew(tmp_path: Path) -> None:
    guard = NumericalGuard(3, lambda step: [10 * step, 10 * step + 1], tmp_path)
    guard.read([record(1), record(2), record(3, skipped=0), record(4)])
    assert guard.skipped_in_a_row == 1
    with pytest.raises(NonFiniteError, match=r"step 6: .* in 3 steps .* on samples 60, 61: see"):
        guard.read([record(5), record(6)])
    lines = [json.loads(text) for text in (tmp_path / FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4, 5, 6]


def test_a_resumed_run_repeats_no_line(tmp_path: Path) -> None:
    NumericalGuard(9, lambda step: [], tmp_path).read([record(1), record(2), record(3)])
    NumericalGuard(9, lambda step: [], tmp_path, steps_done=1).read([record(2)])
    lines = [json.loads(text) for text in (tmp_path / FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]


def test_lost_numbers_are_fatal_and_the_budget_is_checked() -> None:
    assert exit_code_for(NonFiniteError("x")) == ExitCode.FATAL
    assert (GuardConfig().budget, GuardConfig(on_repeat="rollback", rollbacks=3).budget) == (0, 3)
    with pytest.raises(ConfigError, match=r"guard\.rollbacks"):
        GuardConfig(rollbacks=0)
