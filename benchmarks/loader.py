"""Loader throughput, ours and torchvision's side by side: two 224-pixel views of JPEGs.

    python benchmarks/loader.py --trashnet DIR --imagenette DIR

The folders are image folders (class folders of JPEGs); 500-pixel photographs are generated. Every
loader reads the same images with the same number of workers, in turns, several times over; the
table gives medians, and how far the slowest and fastest turn lie from them. Processor time per
image is the figure to trust where other programs share the machine. Peers have persistent workers
and decode each image once for both views.

'lock' is what a loader's threads cost the main one, beside the cores: how long it waits to have
Python's lock back each time that it lets go of it, as a training step does hundreds of times. The
tables of 512 images a batch are of as many threads as there are cores, and of batches in many
parts: 24 of 22 images each on 12 cores.

What is not the same work: ours gives uint8 (B, V, H, W, C); PIL and torchvision uint8 (B, C, H, W)
for each view; the row 'PIL, float' converts to float32 in [0, 1] as most training scripts do.
Threads decode ours, processes the peers'.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from common.cores import cores_alone
from data_pipeline.crops import CropConfig
from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.reading.loader import TrainLoader
from data_pipeline.reading.open_beton import OpenBeton
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.order import Position
from data_pipeline.reading.pool import LoaderConfig
from data_pipeline.views import views_of_one_size

SIZE = 224  # pixels
AHEAD = 4  # batches that peers read ahead: two for each of two workers, torch's default
OURS, OURS_ONE, FALLBACK = "ours", "ours, one view", "ours, torchvision backend"
OURS_MANY = "ours, and 6 views of 96"
PIL_FLOAT, PIL_UINT8, IO_V2 = "PIL, float", "PIL, uint8", "torchvision.io + v2"
EVERY = (OURS, OURS_ONE, OURS_MANY, FALLBACK, PIL_FLOAT, PIL_UINT8, IO_V2)
MANY = 512  # images of a batch in many parts
RELEASES = 20  # of Python's lock, after each batch


class TwoViews:
    """Both views of an image that has been decoded once."""

    def __init__(self, transform: Callable[[Any], torch.Tensor]) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.transform(image), self.transform(image)


def read_tensor(path: str) -> torch.Tensor:
    return decode_jpeg(read_file(path), mode=ImageReadMode.RGB)


def peer(folder: Path, name: str, workers: int, batch: int, images: int) -> DataLoader:
    crop = v2.RandomResizedCrop(SIZE, antialias=True)
    to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    transforms = {
        PIL_FLOAT: v2.Compose([crop, *to_float]),
        PIL_UINT8: v2.Compose([crop, v2.PILToTensor()]),
        IO_V2: crop,
    }
    reader = {"loader": read_tensor} if name == IO_V2 else {}
    dataset = ImageFolder(str(folder), TwoViews(transforms[name]), **reader)
    return DataLoader(
        dataset,
        batch,
        sampler=RandomSampler(dataset, replacement=True, num_samples=images + 2 * AHEAD * batch),
        num_workers=workers,
        persistent_workers=True,
        prefetch_factor=max(1, AHEAD // workers),
        drop_last=True,
    )


def ours(path: Path, name: str, workers: int, batch: int) -> TrainLoader:
    backend = "torchvision" if name == FALLBACK else "ffcv"
    views = views_of_one_size(CropConfig(size=SIZE), 1 if name == OURS_ONE else 2)
    if name == OURS_MANY:  # SwAV's and DeepCluster-v2's, arXiv 2006.09882
        views += views_of_one_size(CropConfig(size=96, scale=(0.05, 0.14)), 6)
    return TrainLoader(
        OpenData(path),
        views,
        LoaderConfig(backend=backend, workers=workers),
        seed=0,
        batch_size=batch,
    )


@dataclass
class Contestant:
    """A loader, and how to read a number of batches from it."""

    name: str
    loader: TrainLoader | DataLoader
    epoch: int = 0

    def batches(self) -> Iterator[Any]:
        if isinstance(self.loader, DataLoader):
            return iter(self.loader)
        self.epoch += 1
        return self.loader.starting_at(Position(self.epoch, 0))

    def turn(self, batch: int, images: int) -> "Turn":
        """Rate in the middle of a run: work done ahead at its start is owed at its end."""
        count = images // batch
        iterator = self.batches()
        for _ in range(AHEAD):
            next(iterator)
        wall, cpu, lock = time.perf_counter(), cpu_seconds(), 0.0
        for _ in range(count):
            next(iterator)
            lock += lock_wait()
        wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
        for _ in range(AHEAD):  # a peer's workers would go on into the next loader's turn
            next(iterator)
        return Turn(count * batch / wall, 1e3 * cpu / (count * batch), 1e6 * lock / count)


@dataclass
class Turn:
    """One reading of some batches."""

    rate: float  # images/s
    cpu: float  # milliseconds of processor time per image, workers included
    lock: float  # microseconds until the main thread has Python's lock back


def lock_wait() -> float:
    """Seconds to let go of Python's lock and have it back, mean of some times."""
    start = time.perf_counter()
    for _ in range(RELEASES):
        time.sleep(0)
    return (time.perf_counter() - start) / RELEASES


def cpu_seconds() -> float:
    """Processor time of this process, its threads and the workers of the peers."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user, system
    return total


def generate(folder: Path, count: int) -> Path:
    """Photograph-like JPEGs of 500 x 375 and 375 x 500 pixels: smooth shapes, edges and grain."""
    target = folder / "generated-500" / "all"
    target.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        random = np.random.default_rng(number)
        width, height = (500, 375) if number % 4 else (375, 500)
        layers = [
            Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8)).resize(
                (width, height), Image.Resampling.BICUBIC
            )
            for side in (4, 12, 40)
        ]
        picture = sum(
            w * np.asarray(layer, np.float32) for w, layer in zip((0.6, 0.3, 0.1), layers)
        )
        y, x = np.mgrid[:height, :width]
        for _ in range(6):
            centre_y, centre_x = random.uniform(0, height), random.uniform(0, width)
            inside = np.hypot(y - centre_y, x - centre_x) < random.uniform(10, 80)
            picture[inside] = 0.5 * picture[inside] + 0.5 * random.uniform(0, 255, 3)
        picture += random.normal(0, 4, (height, width, 1))
        image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
        image.save(target / f"{number:05d}.jpg", quality=90)
    return target.parent


def unpack(path: Path, folder: Path) -> Path:
    """The JPEGs of a .beton as files, for the peers."""
    table, data = OpenBeton(path).table, np.memmap(path, np.uint8, "r")
    target = folder / path.stem / "all"
    target.mkdir(parents=True, exist_ok=True)
    for number, (start, size) in enumerate(zip(table.offsets, table.sizes)):
        (target / f"{number:05d}.jpg").write_bytes(data[start : start + size].tobytes())
    return target.parent


def contest(
    folder: Path, path: Path, options: argparse.Namespace, names: Sequence[str] = EVERY
) -> dict[str, list[Turn]]:
    batch, workers, images = options.batch, options.workers, options.images
    contestants = [
        Contestant(
            name,
            peer(folder, name, workers, batch, images)
            if name in (PIL_FLOAT, PIL_UINT8, IO_V2)
            else ours(path, name, workers, batch),
        )
        for name in names
    ]
    turns: dict[str, list[Turn]] = {one.name: [] for one in contestants}
    for number in range(options.repeats + 1):
        for one in contestants:
            turn = one.turn(batch, images)
            if number:  # the first warms the page cache, workers and compiled code
                turns[one.name].append(turn)
    for one in contestants:
        if isinstance(one.loader, TrainLoader):
            one.loader.close()
    return turns


def report(title: str, turns: dict[str, list[Turn]]) -> None:
    rates = {name: statistics.median(turn.rate for turn in own) for name, own in turns.items()}
    cpu = {name: statistics.median(turn.cpu for turn in own) for name, own in turns.items()}
    lock = {name: statistics.median(turn.lock for turn in own) for name, own in turns.items()}
    print(f"\n{title}\n  {'':26}images/s    spread    ours is   CPU ms/image   ours is    lock")
    for name, own in turns.items():
        low = min(turn.rate for turn in own) / rates[name] - 1
        high = max(turn.rate for turn in own) / rates[name] - 1
        speed, work = rates[OURS] / rates[name], cpu[name] / cpu[OURS]
        print(
            f"  {name:26}{rates[name]:8.0f} {low:+5.0%}{high:+5.0%}   x {speed:5.2f}"
            f"   {cpu[name]:10.2f}     x {work:5.2f}  {lock[name]:5.0f} us"
        )
    if OURS_ONE in turns:
        print(
            f"  two views take {rates[OURS_ONE] / rates[OURS]:.2f} x the time of one, "
            f"{cpu[OURS] / cpu[OURS_ONE]:.2f} x the processor time",
            flush=True,
        )
    if OURS_MANY in turns:
        print(
            f"  with six of 96 pixels beside them {rates[OURS] / rates[OURS_MANY]:.2f} x, "
            f"{cpu[OURS_MANY] / cpu[OURS]:.2f} x the processor time, for 1.55 x the pixels",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trashnet", type=Path, help="image folder, 320 x 240 pixels")
    parser.add_argument("--imagenette", type=Path, help="image folder, 224 x 224 pixels")
    parser.add_argument("--generated", type=int, default=640, help="images; 0: none")
    parser.add_argument("--images", type=int, default=1024, help="timed per turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    many = argparse.Namespace(**vars(options))
    many.workers, many.images = cores_alone(), max(options.images, 2 * MANY)
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        folders = {"TrashNet 320": options.trashnet, "Imagenette 224": options.imagenette}
        if options.generated:
            folders["generated 500"] = generate(scratch, options.generated)
        for title, folder in folders.items():
            if folder is None:
                continue
            path = scratch / f"{folder.name}.beton"
            pack(str(folder), path, PackConfig(format="jpeg"), progress=False)
            report(f"{title}, full size, {options.workers} workers", contest(folder, path, options))
            many.batch = min(MANY, len(OpenBeton(path).table.sizes))
            report(
                f"{title}, batches of {many.batch}, {many.workers} workers",
                contest(folder, path, many, (OURS, IO_V2)),
            )
            if title == "Imagenette 224":
                continue  # smaller than 256 already
            small = scratch / f"{folder.name}-256.beton"
            pack(str(folder), small, PackConfig(format="jpeg", max_side=256), progress=False)
            shrunk = unpack(small, scratch)
            report(f"{title}, packed to 256", contest(shrunk, small, options))


if __name__ == "__main__":
    main()
