"""Tar files are packed as the images in them would be; nothing in one is lost in silence."""

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError
from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.packing.tar_source import TarSource
from data_pipeline.reading.manifest import manifest_path
from data_pipeline.reading.open_data import OpenData
from tests.data_pipeline import images
from tests.data_pipeline.packed import photographs
from trainer.evaluation.labelled_subset import packed_names


def _tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def _packed(source: Path, out: Path, **settings: object) -> OpenData:
    config = PackConfig(workers=1, **settings)  # type: ignore[arg-type]
    pack(str(source), out, config, progress=False)
    return OpenData([out])


def _said(data: OpenData) -> dict:
    manifest: dict = json.loads(manifest_path(data.files[0].path).read_text())
    return manifest


def _pixels(data: OpenData) -> list[np.ndarray]:
    return [data.read(sample) for sample in range(data.info.num_samples)]


def test_an_archive_of_class_folders_is_the_folder(tmp_path: Path) -> None:
    folder = photographs(tmp_path / "photos")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    members = {f"./photos/{path.relative_to(folder)}": path.read_bytes() for path in files}
    theirs = _packed(folder, tmp_path / "folder.beton")
    ours = _packed(_tar(tmp_path / "photos.tar", members), tmp_path / "tar.beton")
    assert ours.info.class_names == theirs.info.class_names
    assert np.array_equal(ours.table.labels, theirs.table.labels)
    assert all(np.array_equal(*pair) for pair in zip(_pixels(ours), _pixels(theirs), strict=True))
    assert packed_names(ours) == [f"photos.tar/photos/{name}" for name in packed_names(theirs)]
    left_out = [[each["reason"] for each in _said(data)["left_out"]] for data in (ours, theirs)]
    assert sorted(left_out[0]) == sorted(left_out[1]) and len(left_out[0]) == 4


def test_webdatasets_shards_have_classes_by_number(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in (1, 0):
        members = {}
        for number in range(3):
            key = f"{shard}{number}"
            members[f"{key}.cls"] = f"{(number + shard) % 3}\n".encode()
            members[f"{key}.jpg"] = images.jpeg()
            members[f"{key}.mask.png"] = images.png("L")
            members[f"{key}.json"] = b"{}"
        _tar(folder / f"{shard:06d}.tar", members)
    data = _packed(folder, tmp_path / "x.beton")
    assert data.table.labels.tolist() == [0, 1, 2, 1, 2, 0]
    assert packed_names(data)[0] == "000000.tar/00.jpg"
    passed_over = {why: each["count"] for why, each in _said(data)["passed_over"].items()}
    assert passed_over == {"another image of the same sample": 6, "not an image file (.json)": 6}
    assert not _packed(folder, tmp_path / "y.beton", labels=False).info.num_labelled


def test_dots_in_names_do_not_make_one_sample_of_two(tmp_path: Path) -> None:
    members = {f"frame.{number}.jpg": images.jpeg() for number in range(3)}
    data = _packed(_tar(tmp_path / "a.tar", members), tmp_path / "x.beton")
    assert data.info.num_samples == 3 and not data.info.num_labelled


def test_links_are_passed_over_and_never_followed(tmp_path: Path) -> None:
    path = _tar(tmp_path / "a.tar", {"a.jpg": images.jpeg()})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    data = _packed(path, tmp_path / "x.beton")
    assert packed_names(data) == ["a.tar/a.jpg"]
    assert list(_said(data)["passed_over"]) == ["link, device or sparse file in a tar"]


def test_shards_of_a_tar_and_processes_make_the_same(tmp_path: Path) -> None:
    members = {f"{number:03d}.jpg": images.jpeg() for number in range(200)}
    path = _tar(tmp_path / "a.tar", members)
    pack(str(path), tmp_path / "whole.beton", PackConfig(workers=2), progress=False)
    whole = OpenData([tmp_path / "whole.beton"])
    parts = [_packed(path, tmp_path / f"{n}.beton", shard=f"{n}/3") for n in (1, 2, 3)]
    assert [name for part in parts for name in packed_names(part)] == packed_names(whole)
    assert sum(part.info.num_samples for part in parts) == whole.info.num_samples == 200


def test_a_later_member_stands_for_an_older_one_of_its_name(tmp_path: Path) -> None:
    grey, colour = images.png("L"), images.png("RGB")
    path = _tar(tmp_path / "a.tar", {"1.png": grey, "1.cls": b"1"})
    _tar(path, {"1.png": colour, "1.cls": b"7"}, "a")
    data = _packed(path, tmp_path / "x.beton")
    assert data.table.labels.tolist() == [7]
    other = _packed(_tar(tmp_path / "b.tar", {"1.png": colour}), tmp_path / "y.beton")
    assert np.array_equal(data.read(0), other.read(0))
    assert _said(data)["passed_over"]["older member of the same name"]["count"] == 2


def test_images_above_the_class_folders_are_passed_over(tmp_path: Path) -> None:
    names = ("./././x/a/1.jpg", "x/./b/2.jpg", "/x/logo.jpg")
    path = _tar(tmp_path / "a.tar", {name: images.jpeg() for name in names})
    data = _packed(path, tmp_path / "x.beton")
    assert data.info.class_names == ("a", "b") and data.table.labels.tolist() == [0, 1]
    assert list(_said(data)["passed_over"]) == ["outside the class folders"]


def test_of_a_folder_of_tars_hidden_things_do_not_count(tmp_path: Path) -> None:
    folder, blobs = tmp_path / "set", tmp_path / "blobs"
    for made in (folder, folder / ".cache", blobs):
        made.mkdir()
    (folder / "s-0.tar").symlink_to(_tar(blobs / "ff00", {"1.jpg": images.jpeg()}))
    (folder / "._s-0.tar").write_bytes(b"of a Mac")
    (folder / "notes.txt").write_bytes(b"")
    data = _packed(folder, tmp_path / "x.beton")
    assert packed_names(data) == ["s-0.tar/1.jpg"]
    assert list(_said(data)["passed_over"]) == ["not a tar file"]


def test_a_tar_that_changes_is_told(tmp_path: Path) -> None:
    path = _tar(tmp_path / "a.tar", {name: images.jpeg() for name in ("1.jpg", "2.jpg")})
    source = TarSource([path], labels=True, extensions=(".jpg",))
    _tar(tmp_path / "b.tar", {name: images.jpeg() for name in ("2.jpg", "1.jpg")}).replace(path)
    with pytest.raises(DataError, match="changed while it was packed"):
        source.sample(0)


def _four(path: Path) -> bytearray:
    _tar(path, {f"{number}.jpg": b"x" * 600 for number in range(4)})
    return bytearray(path.read_bytes())


DAMAGES: dict[str, Callable[[bytearray], bytes]] = {
    "a flipped bit of a head": lambda data: bytes([*data[:3072], data[3072] ^ 1, *data[3073:]]),
    "cut between members": lambda data: bytes(data[:3072]),
    "cut in a head": lambda data: bytes(data[:3172]),
    "cut in an image": lambda data: bytes(data[:3700]),
    "a block of zeros": lambda data: bytes([*data[:3072], *bytes(512), *data[3584:]]),
    "two in one file": lambda data: bytes(data + data),
    "compressed": lambda data: gzip.compress(bytes(data)),
    "no tar": lambda data: b"nothing" * 1000,
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tar_is_not_packed_in_part(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(DAMAGES[damage](_four(path)))
    with pytest.raises(DataError, match="no tar that can be read") as told:
        _packed(path, tmp_path / "x.beton")
    assert str(path) in str(told.value) and not (tmp_path / "x.beton").exists()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("size", [-512, -1, 1 << 63, 1 << 80])
def test_a_size_that_cannot_be_ends_at_once(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.tar"
    head = tarfile.TarInfo("1.jpg")
    buffer = bytearray(head.tobuf(tarfile.GNU_FORMAT))
    buffer[124:136] = size.to_bytes(12, "big", signed=size < 0)
    buffer[124] |= 0x80
    buffer[148:156] = b" " * 8
    buffer[148:156] = f"{sum(buffer):06o}\0 ".encode()
    path.write_bytes(bytes(buffer) + bytes(10240))
    with pytest.raises(DataError, match=r"no tar that can be read|cannot be read"):
        _packed(path, tmp_path / "x.beton")


def test_a_pipe_is_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    _tar(tmp_path / "b.tar", {"1.jpg": images.jpeg()})
    with pytest.raises(DataError, match="not a regular file"):
        _packed(tmp_path, tmp_path / "x.beton")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.txt": b""}, "no images"),
        ({"a.jpg": b"", "a.cls": b"cat"}, "a.cls holds no class's number"),
        ({"x/train/a/1.jpg": b"", "x/val/a/2.jpg": b""}, "train, val are splits, not classes"),
    ],
)
def test_what_cannot_be_packed_is_told(
    tmp_path: Path, members: dict[str, bytes], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        _packed(_tar(tmp_path / "a.tar", members), tmp_path / "x.beton")


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst"])
def test_a_compressed_tar_is_to_be_unpacked(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match="a compressed tar; unpack it"):
        _packed(tmp_path / name, tmp_path / "x.beton")
