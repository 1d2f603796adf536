"""The scripts of docs/finetune.md for libraries that are no requirement of ours."""

from pathlib import Path

from tests.finetune_page import follow


def test_the_script_for_timm_fine_tunes(tmp_path: Path) -> None:
    assert len(follow("timm", "timm", "photos-timm.safetensors", tmp_path)) == 2


def test_the_script_for_hugging_face_fine_tunes(tmp_path: Path) -> None:
    assert len(follow("Hugging Face", "huggingface", "photos-hf", tmp_path)) == 2
    assert (tmp_path / "photos-finetuned" / "config.json").exists()
