"""A reader of files takes any input: it reads it or refuses it by name, in bounded memory and time.

The short version here is part of every test run; the long one has 100,000 inputs for each reader.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.targets import TARGETS

pytestmark = pytest.mark.reliability(30)

ROOT = Path(__file__).resolve().parents[2]


def fuzz(targets: list[str], runs: int, seed: int, timeout: float) -> dict[str, Any]:
    """Figures by target; fails with the finding and how to repeat it."""
    command = [sys.executable, "-m", "tests.fuzz.run", *targets]
    done = subprocess.run(
        [*command, "--runs", str(runs), "--seed", str(seed)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-4000:]}"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(600)
def test_a_thousand_inputs_for_each_reader_find_nothing() -> None:
    figures = fuzz(sorted(TARGETS), runs=1000, seed=1, timeout=600)
    for name, found in figures.items():
        assert found["runs"] == 1000
        assert found["taken"] > 0, f"{name}: every input is refused, the rest is never reached"
        assert found["reasons"] > 20, f"{name}: too few checks are reached: {found}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", sorted(TARGETS))
def test_a_hundred_thousand_inputs_find_nothing(target: str) -> None:
    """About a minute each on a quiet core, three for whole files with their images."""
    (found,) = fuzz([target], runs=100_000, seed=2, timeout=3600).values()
    assert found["runs"] == 100_000
    assert found["taken"] > 500
    print(target, found)


def test_the_same_seed_gives_the_same_inputs() -> None:
    again = [fuzz(["tables"], runs=300, seed=3, timeout=300)["tables"] for _ in range(2)]
    assert again[0]["digest"] == again[1]["digest"]
