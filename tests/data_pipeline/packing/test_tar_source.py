"""Tar files are packed as the images in them would be; nothing in one is lost in silence."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError
from data_pipeline.packing.pack import PackConfig, pack
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


@pytest.mark.parametrize("kind", ["compressed", "cut short", "no tar", "no images", "bad class"])
def test_what_cannot_be_packed_is_told(tmp_path: Path, kind: str) -> None:
    path, one = tmp_path / "a.tar", {"a.jpg": images.jpeg(), "a.cls": b"1"}
    if kind == "compressed":
        _tar(path, one, "w:gz")
    elif kind == "cut short":
        _tar(path, one)
        path.write_bytes(path.read_bytes()[:700])
    elif kind == "no tar":
        path.write_bytes(b"nothing" * 1000)
    else:
        _tar(path, {"a.txt": b""} if kind == "no images" else {**one, "a.cls": b"cat"})
    expected = {"no images": "no images", "bad class": "a.cls holds no class's number"}
    with pytest.raises(DataError, match=expected.get(kind, "no tar that can be read")) as told:
        _packed(path, tmp_path / "x.beton")
    assert str(path) in str(told.value)
    assert not (tmp_path / "x.beton").exists()
