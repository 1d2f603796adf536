"""Packing a folder of photographs, and what is left behind."""

import os
from pathlib import Path

from data_pipeline.packing.pack import PackConfig, PackReport, pack
from tests.data_pipeline import images


def photographs(folder: Path) -> Path:
    """200 JPEGs in 5 classes, with a file of every odd kind between them."""
    images.class_folders(folder, classes=5, images=40)
    odd = {
        "class 0/grey.png": images.png("L"),
        "class 1/turned.jpg": images.turned_jpeg(6),
        "class 1/cmyk.jpg": images.cmyk_jpeg(),
        "class 2/alpha.png": images.png("RGBA", 200, 300),
        "class 3/deep.png": images.png("I;16"),
        "class 0/cut.jpg": images.jpeg()[:-200],
        "class 2/empty.jpg": b"",
        "class 4/text.jpg": b"this is no image",
        "class 4/bomb.png": images.bomb_png(),
        "class 4/notes.txt": b"notes",
        "class 4/.hidden.jpg": images.jpeg(),
    }
    return images.write_folder(folder, odd)


def packed(source: object, out: Path, **settings: object) -> PackReport:
    """``source`` packed to ``out``, by one process unless ``settings`` say otherwise."""
    config = PackConfig(**{"workers": 1} | settings)  # type: ignore[arg-type]
    return pack(str(source), out, config, progress=False)


def left_in(folder: Path) -> list[str]:
    """The names of what lies in a folder."""
    return sorted(path.name for path in folder.iterdir())


def children() -> set[int]:
    """Ids of the living processes that the main thread of this one has started."""
    return set(map(int, Path("/proc/self/task", str(os.getpid()), "children").read_text().split()))
