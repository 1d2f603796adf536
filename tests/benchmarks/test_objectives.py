"""The table of docs/objectives.md can be made: what two hours come to is not found out at their
end."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_row_of_the_table_is_printed(tmp_path: Path) -> None:
    files = []
    for name in ("train", "test"):
        files += [f"--{name}", str(tmp_path / f"{name}.beton")]
        _output("-m", "launch", "pack", f"embedded:digits:{name}", files[-1])
    short = ("--objectives", "rotation", "--steps", "rotation=2", "--no-baselines")
    *_, row = _output(
        "benchmarks/objectives.py", *files, *short, "--settings", "--batch", "32"
    ).splitlines()
    words = row.split()
    assert words[0] == "rotation" and words[1] == "kNN" and words.count("/") == 2, row
    assert "2 steps" in row and "loss 1." in row and "rotation_top1 0." in row, row


def _output(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
