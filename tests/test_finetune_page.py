"""docs/finetune.md: short scripts that run. Those of timm and Hugging Face run in tests/peers."""

from pathlib import Path

import pytest

from launch.export_command import FORMATS
from tests.finetune_page import PAGE, follow, scripts


def test_every_script_is_under_30_lines_and_needs_nothing_of_ours() -> None:
    found = scripts()
    assert set(found) == {"torchvision", "timm", "Hugging Face"}
    for script in found.values():
        assert len(script.splitlines()) < 30
        assert not {"trainer", "launch", "widebatch", "data_pipeline"} & set(script.split())


def test_the_page_names_every_format() -> None:
    for name in FORMATS:
        assert f"| `{name}` |" in PAGE.read_text()


@pytest.mark.slow
def test_the_script_for_torchvision_fine_tunes(tmp_path: Path) -> None:
    assert len(follow("torchvision", "torchvision", "photos.safetensors", tmp_path)) == 2
