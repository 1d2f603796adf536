"""Batches of a small .beton, for tests of the loader."""

import hashlib
import itertools
import threading
from contextlib import closing
from pathlib import Path

from PIL import Image

from data_pipeline.crops import CropConfig
from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.reading.loader import Batch, EvalLoader, TrainLoader
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.order import Position
from data_pipeline.reading.pool import LoaderConfig
from data_pipeline.views import views_of_one_size
from tests.data_pipeline.images import encoded, picture

N, BATCH, SIZE = 45, 12, 32  # samples; samples of a global batch; pixels of a crop
CROP = CropConfig(size=SIZE)
START = Position()


def pack_jpegs(folder: Path) -> Path:
    """JPEGs of every kind that is passed through: subsamplings, grey, progressive, odd sizes.

    They lie in ``folder / "images"``; the file is ``folder / "jpegs.beton"``.
    """
    _write_images(folder / "images")
    config = PackConfig(workers=1, format="jpeg")
    pack(str(folder / "images"), folder / "jpegs.beton", config, progress=False)
    return folder / "jpegs.beton"


def pack_raw(jpegs: Path) -> Path:
    """The same images as pixels and without labels: ``raw.beton`` beside ``jpegs``."""
    path = jpegs.with_name("raw.beton")
    config = PackConfig(workers=1, format="raw", labels=False)
    pack(str(jpegs.parent / "images"), path, config, progress=False)
    return path


def _write_images(folder: Path) -> None:
    kinds = [{"subsampling": s, "progressive": p} for s in (0, 1, 2) for p in (False, True)]
    for number in range(N):
        image = Image.fromarray(picture(61 + 5 * (number % 7), 90 - number, number))
        image = image.convert("L") if number % 9 == 8 else image
        data = encoded(image, "JPEG", quality=90, **kinds[number % len(kinds)])
        target = folder / "ab"[number % 2] / f"{number:03d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


def open_train(path: Path, backend: str = "ffcv", workers: int = 2, **options: int) -> TrainLoader:
    """A loader of two views from ``path``; options are those of ``TrainLoader``."""
    config = LoaderConfig(backend=backend, workers=workers)  # type: ignore[arg-type]
    arguments = {"seed": 3, "batch_size": BATCH} | options
    return TrainLoader(OpenData(path), views_of_one_size(CROP), config, **arguments)  # type: ignore[arg-type]


def take(source: TrainLoader, count: int, start: Position = START) -> list[Batch]:
    """``count`` batches from ``start``; the loader is closed."""
    with closing(source):
        return list(itertools.islice(source.starting_at(start), count))


def evaluate(
    path: Path, size: int = SIZE, resize: int | None = None, **options: int
) -> list[Batch]:
    """All batches of an evaluation, which is made twice and must not differ."""
    arguments = {"batch_size": 10} | options
    source = EvalLoader(OpenData(path), size, resize, LoaderConfig(workers=2), **arguments)  # type: ignore[arg-type]
    with closing(source):
        batches = list(source)
        assert digest(batches) == digest(list(source)), "a second pass differs"
        assert len(source) == len(batches)
    return batches


def digest(batches: list[Batch]) -> str:
    """A hash of all that the batches hold."""
    total = hashlib.sha256()
    for batch in batches:
        for tensor in (*batch.crops, batch.ids_B, batch.labels_B):
            total.update(tensor.numpy().tobytes())
    return total.hexdigest()


def decoding_threads() -> int:
    """Threads of loaders that are not closed."""
    return sum("widebatch-decode" in thread.name for thread in threading.enumerate())
