"""`widebatch pack` says what became of the images, and what is wrong in one line."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.packing.pack import PackConfig, pack
from launch import __main__ as command_line
from tests.data_pipeline import images
from tests.data_pipeline.betons import check_beton
from tests.data_pipeline.packed import left_in, photographs


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photographs(tmp_path_factory.mktemp("photos"))


def test_the_command_says_what_became_of_the_images(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.beton"
    words = ["pack", str(photos), str(out), "--workers", "1", "--max-side", "500"]
    assert command_line.main([*words, "--quality", "90"]) == 0
    said = capsys.readouterr().out
    assert "205 images, 5 classes" in said
    assert "4 images LEFT OUT" in said
    assert "class 2/empty.jpg: empty file" in said
    assert check_beton(out).fingerprint in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "x.beton"], "neither a folder nor"),
        (["cifar10", "x.beton"], "--download fetches it"),
        ([".", "x.beton", "--quality", "200"], "quality 200"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command_line.main(["pack", *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert message in said[0]
    assert left_in(tmp_path) == []


def test_extensions_come_beside_the_usual_ones(tmp_path: Path) -> None:
    photo = Image.fromarray(images.picture(8, 8))
    files = {"a.gif": images.encoded(photo, "GIF"), "b.jpg": images.jpeg(), "c.txt": b"x"}
    folder, out = images.write_folder(tmp_path / "set", files), tmp_path / "x.beton"
    assert command_line.main(["pack", str(folder), str(out), "--extensions", ".GIF, .jpg"]) == 0
    assert check_beton(out).num_samples == 2


def test_without_a_terminal_progress_is_lines(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        pack(str(photos), tmp_path / "x.beton", PackConfig(workers=1))
    assert "packing x.beton: 209 of 209 images" in caplog.text


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, argparse; from launch import pack_command;"
        "pack_command.add_parser(argparse.ArgumentParser().add_subparsers());"
        "assert not {'torch', 'numpy', 'PIL', 'ffcv'} & set(sys.modules), 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
