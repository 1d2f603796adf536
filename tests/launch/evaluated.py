"""A run, its export and packed files, and the command line on them: for tests of ``evaluate``."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from data_pipeline.packing.pack import PackConfig, pack
from launch.__main__ import main
from tests.trainer.runs import pack_images
from tests.trainer.saved_runs import save_run
from trainer.models.encoders import EncoderConfig

CLASSES = 3
RESNET18 = EncoderConfig(name="resnet18", stem="imagenet")
READING = ("--backend", "torchvision", "--device", "cpu", "--workers", "1")


def make_folder(folder: Path) -> Path:
    """Fill ``folder``; returns it."""
    for name, count in (("train", 60), ("test", 30)):
        (folder / name).mkdir()
        pack_images(folder / name, count, CLASSES).rename(folder / f"{name}.beton")
        shutil.move(folder / name / "images.beton.json", folder / f"{name}.beton.json")
    images = folder / "test" / "images"
    pack(str(images), folder / "flat.beton", PackConfig(labels=False), progress=False)
    (images / "class1").rename(images / "class9")
    pack(str(images), folder / "renamed.beton", PackConfig(), progress=False)
    train, test = folder / "train.beton", folder / "test.beton"
    save_run(folder / "run", train, RESNET18, test=test)  # at 32 pixels: milliseconds
    assert main(["export", str(folder / "run"), "--out", str(folder / "r18.safetensors")]) == 0
    return folder


def evaluate(folder: Path, method: str, source: str, *words: str) -> dict[str, Any]:
    """The JSON of an evaluation of the files ``train`` and ``test``."""
    return report(folder, command(folder, method, source, *words))


def report(folder: Path, line: list[str]) -> dict[str, Any]:
    """The JSON that a command writes."""
    out = folder / "out.json"
    assert main([*line, "--json", str(out)]) == 0
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def command(folder: Path, method: str, source: str, *words: str) -> list[str]:
    """Of the methods that learn from one file and test on another."""
    test = () if "--data.test" in words else ("--data.test", str(folder / "test.beton"))
    return look(folder, method, source, *test, *words)


def look(folder: Path, method: str, source: str, *words: str) -> list[str]:
    """Of the methods that look at one file."""
    train = () if "--data.train" in words else ("--data.train", str(folder / "train.beton"))
    return ["evaluate", method, source, *train, *READING, *words]


def main_on_a_rank(rank: int, world_size: int, line: list[str]) -> str:
    """What a rank prints."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(line) == 0
    assert not torch.distributed.is_initialized()
    return said.getvalue()
