"""docs/finetune.md, its scripts, and what they find in their folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.trainer.runs import pack_images
from tests.trainer.saved_runs import save_run
from trainer.export import export
from trainer.models.encoders import EncoderConfig

PAGE = Path(__file__).parents[1] / "docs" / "finetune.md"


def scripts() -> dict[str, str]:
    """The Python of each section, by its heading."""
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    found = {}
    for section in sections:
        blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
        if blocks:
            assert len(blocks) == 1
            found[section.splitlines()[0]] = blocks[0]
    return found


def follow(section: str, file_format: str, out: str, folder: Path) -> list[float]:
    """Export a small run as the page says, and run the section's script; losses by epoch."""
    data = pack_images(folder, count=24)
    (folder / "photos").mkdir()
    (folder / "images").rename(folder / "photos" / "train")
    save_run(folder / "run", data, EncoderConfig(name="resnet18"))
    assert f"--format {file_format} --out {out}\n" in PAGE.read_text()
    export(folder / "run", folder / out, file_format)
    done = subprocess.run(
        [sys.executable, "-c", scripts()[section]],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [float(loss) for loss in re.findall(r"^epoch \d: loss ([\d.]+)$", done.stdout, re.M)]
