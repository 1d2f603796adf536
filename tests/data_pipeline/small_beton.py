"""A small .beton of raw images and JPEGs, and copies of it with other bytes."""

from pathlib import Path

from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.reading.manifest import manifest_path
from tests.data_pipeline import images

SIZE = 32
"""Pixels, height and width."""
COUNT = 12
"""Samples: raw ones have even numbers, JPEGs odd ones."""


def pack_small_beton(folder: Path) -> Path:
    """``COUNT`` images of three classes in ``folder / "set"``, packed as ``good.beton``."""
    files = {}
    for i in range(COUNT):
        data, kind = (images.png("RGB", SIZE, SIZE), "png")
        if i % 2:
            data, kind = images.jpeg(SIZE, SIZE, seed=i, quality=95), "jpg"
        files[f"class {i % 3}/{i:02d}.{kind}"] = data
    images.write_folder(folder / "set", files)
    pack(str(folder / "set"), folder / "good.beton", PackConfig(workers=1), progress=False)
    return folder / "good.beton"


def with_manifest(packed: Path, path: Path, data: bytes) -> Path:
    """``data`` as a file at ``path``, beside a copy of the manifest of ``packed``."""
    path.write_bytes(data)
    manifest_path(path).write_bytes(manifest_path(packed).read_bytes())
    return path
