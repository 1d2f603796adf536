"""Tests of Triton kernels without a GPU, in Triton's interpreter.

Triton decides when it is imported whether it compiles or interprets. Tests that interpret are in
``interpreted_*.py``, which pytest does not collect by itself, and run in a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def run_interpreted(name: str, *, slow: bool = False) -> None:
    """Run the tests of ``interpreted_<name>.py``: the quick ones, or those marked slow."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            str(HERE / f"interpreted_{name}.py"),
            "-m",
            "slow" if slow else "not slow",
            "-p",
            "no:cacheprovider",
        ],
        cwd=HERE.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=1500 if slow else 280,
    )
    # 5: nothing was collected, which must not pass for success.
    assert done.returncode == 0, done.stdout + done.stderr
