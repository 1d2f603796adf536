"""Chaos: what it draws, what it takes for a broken promise, and that runs stand it."""

import json
import random
import signal
from pathlib import Path

import pytest

from tests import faults
from tests.chaos import run
from tests.chaos.disturbances import draw
from tests.chaos.processes import Ended


def test_a_seed_draws_the_same_disturbances() -> None:
    def drawn(seed: int) -> list[str]:
        generator = random.Random(seed)
        return [str(draw(generator, 2)) for _ in range(50)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert len(set(drawn(1))) > 20


def test_every_drawn_fault_is_one_that_the_program_knows() -> None:
    generator = random.Random(0)
    for _ in range(500):
        disturbance = draw(generator, 4)
        assert all(rank < 4 for rank in disturbance.ranks)
        assert len(faults.parse(disturbance.fault)) == (1 if disturbance.fault else 0)


@pytest.mark.parametrize(
    ("codes", "hung", "problem"),
    [
        ((0, 0), False, None),
        ((75, 75), False, None),
        ((-signal.SIGKILL, 74), False, None),
        ((-signal.SIGKILL, 1), False, "unexpected exit code 1"),
        ((-signal.SIGSEGV, 74), False, "unexpected exit code -11"),
        ((0, 0), True, "processes were left hanging"),
    ],
)
def test_a_process_may_be_killed_or_try_again_but_not_fail(
    codes: tuple[int, ...], hung: bool, problem: str | None
) -> None:
    assert Ended(codes, hung, "").unexpected() == problem


def _run_folder(folder: Path, loss: float = 1.0, weights: bytes = b"w") -> Path:
    step = folder / "checkpoints" / "step-00000002"
    step.mkdir(parents=True)
    (step / "model.safetensors").write_bytes(weights)
    (folder / "checkpoints" / "latest.json").write_text('{"step": 2}')
    record = {"step": 1, "loss": loss, "images_per_second": random.random()}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "samples.jsonl").write_text('{"step": 1, "ids": [1, 2]}\n')
    return folder


def test_another_number_another_byte_and_a_leftover_are_each_a_problem(tmp_path: Path) -> None:
    session = run.Session(tmp_path, 2, random.Random(0), 2, 1.0)
    expected = _run_folder(tmp_path / "expected")
    run._compare(session, _run_folder(tmp_path / "same"), expected)
    assert session.problems == []
    other = _run_folder(tmp_path / "other", loss=1.0001, weights=b"x")
    (other / "checkpoints" / ".writing-step-00000004").mkdir()
    (other / "samples.jsonl").unlink()
    run._compare(session, other, expected)
    text = "\n".join(session.problems)
    assert "other: its metrics differ" in text
    assert "other: its checkpoint differ" in text
    assert "other: its samples cannot be read" in text
    assert ".writing-step-00000004" in text


@pytest.mark.slow
@pytest.mark.reliability(29)
@pytest.mark.timeout(3000)
def test_runs_stand_minutes_of_chaos(tmp_path: Path) -> None:
    """`python -m tests.chaos.run --minutes 30` is the same for longer."""
    lines: list[str] = []
    problems = run.chaos(240, seed=5, world_size=2, folder=tmp_path / "chaos", say=lines.append)
    assert problems == [], "\n".join(lines)
    assert any("-9" in line for line in lines), "nothing was killed"
