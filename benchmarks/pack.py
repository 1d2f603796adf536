"""How fast packing is: original JPEG bytes, against re-encoding by us and by FFCV's own writer.

    python benchmarks/pack.py [--images FOLDER] [--count 4000] [--workers 2] [--rounds 3]

FOLDER has class folders of JPEGs; without it, `count` JPEGs of 256 to 500 pixels are cut from
scikit-learn's two photographs. The methods take turns; wall and CPU time are medians of the rounds.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from common.cores import cores_alone
from data_pipeline.packing.pack import PackConfig, pack


def generate(folder: Path, count: int) -> None:
    """JPEGs of quality 85 to 95 in 8 class folders: turned, scaled, recoloured cuts with grain."""
    from sklearn.datasets import load_sample_images

    draw = np.random.default_rng(0)
    photographs = [
        Image.fromarray(image).rotate(angle, Image.Resampling.BICUBIC)
        for image in load_sample_images().images
        for angle in range(-15, 16, 5)
    ]
    grains = draw.normal(0, 1, (16, 500, 500, 1)).astype(np.float32)
    for i in range(count):
        width, height = (int(side) for side in draw.integers(256, 501, 2))
        image = photographs[draw.integers(len(photographs))]
        scale = draw.uniform(0.6, 1.0) * min(image.width / width, image.height / height)
        w, h = int(width * scale), int(height * scale)
        x, y = int(draw.integers(image.width - w + 1)), int(draw.integers(image.height - h + 1))
        image = image.resize((width, height), Image.Resampling.BICUBIC, (x, y, x + w, y + h))
        grain = grains[draw.integers(len(grains)), :height, :width] * np.float32(draw.uniform(2, 8))
        pixels = np.asarray(image) * draw.uniform(0.7, 1.3, 3).astype(np.float32) + grain
        path = folder / f"{i % 8}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        quality = int(draw.integers(85, 96))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=quality)


def cpu_time() -> float:
    """Of this process and of those that have ended; unlike wall time, true on a busy machine."""
    multiprocessing.active_children()  # waits for those that FFCV leaves to be collected
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def stock_writer(folder: Path, out: Path, workers: int) -> None:
    """FFCV's DatasetWriter as its documentation shows it: decode, re-encode at quality 90."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()}
    writer = DatasetWriter(str(out), fields, num_workers=workers)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        writer.from_indexed_dataset(ImageFolder(folder), chunksize=50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path)
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--workers", type=int, default=cores_alone())
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        folder, out = args.images, Path(scratch, "x.beton")
        if folder is None:
            folder = Path(scratch, "images")
            print(f"making {args.count} JPEGs ...", file=sys.stderr)
            generate(folder, args.count)

        def ours(**settings: object) -> Callable[[], None]:
            config = PackConfig(workers=args.workers, **settings)  # type: ignore[arg-type]
            return lambda: print(pack(str(folder), out, config, progress=False), file=log)

        methods: dict[str, Callable[[], None]] = {
            "ours, JPEG bytes as they are": ours(),
            "ours, every image shrunk to 256 and encoded": ours(max_side=256),
            "ours, decoded to raw pixels": ours(format="raw"),
            "FFCV's writer, re-encoding": lambda: stock_writer(folder, out, args.workers),
        }
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        cpu_seconds: dict[str, list[float]] = {name: [] for name in methods}
        sizes = {}
        log = io.StringIO()
        for _ in range(args.rounds):
            for name, method in methods.items():
                start, cpu_start = time.perf_counter(), cpu_time()
                method()
                seconds[name].append(time.perf_counter() - start)
                cpu_seconds[name].append(cpu_time() - cpu_start)
                print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr)
                sizes[name] = out.stat().st_size
                out.unlink()
        count = sum(1 for _ in folder.rglob("*.*g"))
        base = statistics.median(seconds["ours, JPEG bytes as they are"])
        cpu_base = statistics.median(cpu_seconds["ours, JPEG bytes as they are"])
        print(f"{count} images, {args.workers} processes, medians of {args.rounds} rounds")
        print(f"{'':45} {'s':>7} {'images/s':>9} {'ratio':>6} {'CPU s':>7} {'ratio':>6} {'MB':>5}")
        for name, times in seconds.items():
            wall, cpu = statistics.median(times), statistics.median(cpu_seconds[name])
            numbers = f"{wall:7.2f} {count / wall:9.0f} {wall / base:6.1f} {cpu:7.2f}"
            spread = f"{min(times):.2f}-{max(times):.2f}"
            print(f"{name:45} {numbers} {cpu / cpu_base:6.1f} {sizes[name] / 1e6:5.0f}   {spread}")


if __name__ == "__main__":
    main()
