"""Shards packed side by side are, as one set, what one packing makes."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from common.errors import ConfigError, DataError
from data_pipeline.packing import pack as packing
from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.reading.open_data import OpenData
from data_pipeline.views import FrameDraw
from tests.data_pipeline.packed import photographs
from trainer.evaluation.labelled_subset import packed_names


def _packed(source: str, out: Path, **settings: object) -> Path:
    pack(source, out, PackConfig(workers=1, **settings), progress=False)  # type: ignore[arg-type]
    return out


def _shards(source: str, folder: Path, count: int, **settings: object) -> list[Path]:
    return [
        _packed(source, folder / f"{number}.beton", shard=f"{number}/{count}", **settings)
        for number in range(1, count + 1)
    ]


def _images(data: OpenData) -> list[str]:
    """A digest of each stored image."""
    found = []
    for file in data.files:
        stored = file.path.read_bytes()
        for offset, size in zip(file.table.offsets.tolist(), file.table.sizes.tolist()):
            found.append(hashlib.sha256(stored[offset : offset + size]).hexdigest())
    return found


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("named", [True, False], ids=["named", "too many to name"])
def test_shards_together_are_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, named: bool
) -> None:
    if not named:
        monkeypatch.setattr(packing, "_NAMED", 0)
    source = str(photographs(tmp_path / "photos"))
    whole = OpenData([_packed(source, tmp_path / "whole.beton")])
    parts = OpenData(_shards(source, tmp_path, count))
    assert _images(parts) == _images(whole)
    assert parts.info.class_names == whole.info.class_names
    assert np.array_equal(parts.table.labels, whole.table.labels)
    assert packed_names(parts) == packed_names(whole)
    sizes = [file.info.num_samples for file in parts.files]
    assert max(sizes) - min(sizes) <= 5, "four images of them are left out"


def test_clips_stay_whole(tmp_path: Path) -> None:
    source = "embedded:moving-digits:test"
    whole = OpenData([_packed(source, tmp_path / "whole.beton", clips=True)])
    parts = OpenData(_shards(source, tmp_path, 3, clips=True))
    assert _images(parts) == _images(whole)
    frames = FrameDraw(gaps=((1, 2), (1, 2)), sample=1)
    weights = [data.clips.weights(frames) for data in (whole, parts)]
    assert weights[0].any() and np.array_equal(*weights)


@pytest.mark.parametrize(
    "shard", ["0/3", "4/3", "3", "a/b", "1/0", "-1/2", "", "१/२", "1/" + "9" * 5000]
)
def test_a_shard_that_cannot_be_is_told(shard: str) -> None:
    with pytest.raises(ConfigError, match="--shard"):
        PackConfig(shard=shard)


def test_more_shards_than_images_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are 720 images alone"):
        _packed("embedded:digits:test", tmp_path / "x.beton", shard="1/1000")
