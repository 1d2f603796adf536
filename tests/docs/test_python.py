"""docs/python.md: its script runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.docs.pages import CHECKOUT, DOCS
from tests.docs.stand_ins import photos


@pytest.mark.slow
def test_the_script_packs_pretrains_and_embeds(tmp_path: Path) -> None:
    photos(tmp_path)
    (script,) = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(CHECKOUT), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["done", "torch.Size([1, 64])"]
    assert np.load(tmp_path / "test.npy").shape == (24, 64)
