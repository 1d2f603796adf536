import os
import sys
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.export_command import FORMATS
from tests.trainer.runs import pack_images
from tests.trainer.saved_runs import SMALL, saved_run
from trainer.export.write import TARGETS


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    return saved_run(folder, pack_images(folder, count=12), SMALL)


@pytest.mark.parametrize(
    "words",
    [["--format", "torchvision"], ["--which", "best"], []],
    ids=" ".join,
)
def test_the_output_is_written_and_proven(
    run: Path, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a folder" / "r18.safetensors"
    assert main(["export", str(run), *words, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert str(out) in said
    assert "proof" in said
    assert f"step {3 if 'best' in words else 6}:" in said
    assert sorted(p.name for p in out.parent.iterdir()) == ["r18.json", "r18.md", "r18.safetensors"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: --out"),
        (["--out", "weights.bin"], "NAME.safetensors"),
    ],
    ids=["none", "suffix"],
)
def test_outputs_that_cannot_be_are_refused(
    run: Path,
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run), *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_replaced_only_by_force(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    assert main(["export", str(run), "--out", str(out)]) == 0
    assert main(["export", str(run), "--out", str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["export", str(run), "--out", str(out), "--force"]) == 0


def test_a_pipe_is_replaced_not_even_by_force(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "card")
    words = ["--out", str(tmp_path / "out.safetensors"), "--card", str(tmp_path / "card")]
    assert main(["export", str(run), *words, "--force"]) == 2
    assert "card: is no regular file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["card"]
    assert (tmp_path / "card").is_fifo()


def test_a_library_that_is_not_installed_ends_with_2_and_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    out = tmp_path / "out.onnx"
    assert main(["export", str(run), "--format", "onnx", "--out", str(out)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].endswith("python -m pip install onnx onnxscript onnxruntime")
    assert "Traceback" not in "".join(said)
    assert not list(tmp_path.iterdir())


def test_the_card_is_named_and_can_go_elsewhere(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = tmp_path / "about.md"
    words = ["export", str(run), "--card", str(card), "--out", str(tmp_path / "out.safetensors")]
    assert main(words) == 0
    assert f"card      {card}" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "about.md", "out.json", "out.safetensors",
    ]  # fmt: skip


def test_the_list_of_formats_is_the_trainers() -> None:
    assert tuple(FORMATS) == tuple(TARGETS)
