"""What a page's commands find in their folder in place of a user's own data and runs."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.packing.pack import PackConfig, pack
from tests.slurm.cluster import CHECKOUT, Cluster
from tests.trainer.saved_runs import save_run
from trainer.models.encoders import EncoderConfig

CLASSES = ("beach", "forest", "street")


def checkout(folder: Path) -> None:
    """The checkout's own programs: ``.venv/bin/widebatch``, ``slurm/*.sh``."""
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "slurm").symlink_to(CHECKOUT / "slurm")


def photos(folder: Path) -> None:
    """``photos/train`` and ``photos/test``: JPEGs of three classes that colours and waves tell; and
    ``seen-train.csv`` and ``seen-test.csv``, what else is to be seen on them."""
    for split, count in (("train", 24), ("test", 8)):
        for label, name in enumerate(CLASSES):
            target = folder / "photos" / split / name
            target.mkdir(parents=True)
            for index in range(count):
                _photo(label, index + 100 * count).save(target / f"{index:04d}.jpg", quality=90)
        rows = [
            f"{name}/{index:04d}.jpg,{int(label > 0)},{int(label != 1)}"
            for label, name in enumerate(CLASSES)
            for index in range(count)
        ]
        table = folder / f"seen-{split}.csv"
        table.write_text("\n".join(["file,trees,water", *rows]))


def _photo(label: int, seed: int, width: int = 96, height: int = 72) -> Image.Image:
    rng = np.random.default_rng([label, seed])
    y, x = np.mgrid[:height, :width] / height
    wave = np.sin(2 * np.pi * (label + 1) * (x * rng.uniform(0.5, 1) + y * rng.uniform(0, 1)))
    pixels = wave[..., None] * rng.uniform(30, 70, 3) + np.roll([190, 120, 60], label)
    pixels += rng.normal(0, 6, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def packed(folder: Path) -> None:
    """``train.beton`` and ``test.beton`` of the photos."""
    photos(folder)
    for split in ("train", "test"):
        source, out = folder / "photos" / split, folder / f"{split}.beton"
        pack(str(source), out, PackConfig(workers=1), progress=False)


def finished_run(folder: Path) -> None:
    """``runs/photos``: a small ResNet-18's run over ``train.beton``."""
    packed(folder)
    (folder / "runs").mkdir()
    train, test = folder / "train.beton", folder / "test.beton"
    save_run(folder / "runs" / "photos", train, EncoderConfig(name="resnet18"), test=test)


def trained_run(folder: Path) -> None:
    """``runs/photos`` after three real steps, with all that a run leaves; and ``runs/tau02``."""
    packed(folder)
    words = "pretrain simclr-stl10-r18 --data.train train.beton --data.test test.beton"
    small = "--batch 16 --steps 3 --crop.size 32 --loader.backend torchvision --out runs/photos"
    program = Path(sys.executable).with_name("widebatch")
    done = subprocess.run(
        [program, *words.split(), *small.split()],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    shutil.copytree(folder / "runs" / "photos", folder / "runs" / "tau02")


def in1k(folder: Path) -> None:
    """The photos under the names that ImageNet's packed files have on the pages."""
    packed(folder)
    for ours, theirs in (("train", "in1k"), ("test", "in1k-val")):
        for ending in ("beton", "beton.json"):
            (folder / f"{ours}.{ending}").rename(folder / f"{theirs}.{ending}")


def shared(folder: Path) -> None:
    """``shared/``, the folder that all nodes see."""
    (folder / "shared").mkdir()
    for ending in ("beton", "beton.json"):
        (folder / "shared" / f"in1k.{ending}").symlink_to(folder / f"in1k.{ending}")


def cluster(folder: Path) -> None:
    """A Slurm cluster of two nodes, which the page's shell talks to; the page ends it."""
    started = Cluster(folder / "cluster")
    started.up("--nodes", "2")
    (folder / ".shell").write_text(f"export SLURM_CONF={started.environ['SLURM_CONF']}\n")
