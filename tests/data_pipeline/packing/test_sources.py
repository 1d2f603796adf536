"""Which images a source finds, how it numbers and labels them, and what it says of the rest."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torchvision

from common.errors import DataError
from data_pipeline.packing.folder_source import IMAGE_EXTENSIONS, FolderSource
from data_pipeline.packing.image_codec import LeftOut
from data_pipeline.packing.sources import Source, open_source
from tests.data_pipeline import images


def opened(source: object, *, root: Path = Path("nowhere"), labels: bool = True) -> Source:
    return open_source(
        str(source), root=root, download=False, labels=labels, extensions=IMAGE_EXTENSIONS
    )


def names_and_labels(source: Source) -> list[tuple[str, int]]:
    return [(source.name(i), source.sample(i).label) for i in range(len(source))]


def test_ids_and_labels_are_those_of_image_folder(tmp_path: Path) -> None:
    files = [
        *("zebra/b.jpg", "zebra/a.JPEG", "zebra/more/c.png", "zebra/more-x/c.png", "zebra/B.jpg"),
        *(f"zebra/{name}/1.jpg" for name in ("y", "x", "w", "x y", "v")),
        *("Ant/10.jpg", "Ant/9.jpg", "Ant/deep/er/1.webp", "bee 2/x.bmp", "bee 10/x.tif"),
    ]
    folder = images.write_folder(tmp_path / "set", dict.fromkeys(files, b"x"))
    (folder / "zebra" / "notes.txt").write_text("not an image")
    theirs = torchvision.datasets.ImageFolder(folder)
    ours = opened(folder)
    assert list(ours.class_names) == theirs.classes
    assert [(str(folder / name), label) for name, label in names_and_labels(ours)] == theirs.samples


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    images.write_folder(tmp_path, {"b.jpg": b"x", "a.png": b"x", "empty/readme.txt": b"x"})
    source = opened(tmp_path)
    assert source.class_names == ()
    assert names_and_labels(source) == [("a.png", -1), ("b.jpg", -1)]
    assert source.passed_over == {"not an image file (.txt)": ["empty/readme.txt"]}


def test_without_labels_all_images_below_a_folder_count(tmp_path: Path) -> None:
    images.write_folder(tmp_path, {"b/1.jpg": b"x", "a/c/1.jpg": b"x", "0.jpg": b"x"})
    source = opened(tmp_path, labels=False)
    assert names_and_labels(source) == [("0.jpg", -1), ("a/c/1.jpg", -1), ("b/1.jpg", -1)]


def test_nothing_is_passed_over_in_silence(tmp_path: Path) -> None:
    files = ["a/1.jpg", "a/._1.jpg", "a/x.txt", "a/README", "a/.x/2.jpg", "b/1.png", "3.jpg"]
    images.write_folder(tmp_path, dict.fromkeys([*files, ".git/4.jpg", ".DS_Store"], b"x"))
    source = opened(tmp_path)
    assert [name for name, _ in names_and_labels(source)] == ["a/1.jpg", "b/1.png"]
    assert source.passed_over == {
        "hidden": [".DS_Store", ".git", "a/._1.jpg", "a/.x"],
        "not an image file (.txt)": ["a/x.txt"],
        "not an image file (no extension)": ["a/README"],
        "outside the class folders": ["3.jpg"],
    }


def test_what_systems_leave_behind_is_no_class(tmp_path: Path) -> None:
    left = ["@eaDir", "__MACOSX", "lost+found", "Thumbs", "$RECYCLE.BIN", ".ipynb_checkpoints"]
    left += ["@Recycle", "@Recently-Snapshot", ".@__thumb", "@__thumb", "LOST.DIR", "thumbs"]
    left += ["FOUND.000", "RECYCLER", "Network Trash Folder", "Temporary Items", "@EADIR"]
    files = ["cat/1.jpg", "cat/@eaDir/1.jpg", "found/1.jpg", *(f"{name}/1.jpg" for name in left)]
    images.write_folder(tmp_path, dict.fromkeys(files, b"x"))
    source = opened(tmp_path)
    assert source.class_names == ("cat", "found")
    assert names_and_labels(source) == [("cat/1.jpg", 0), ("found/1.jpg", 1)]
    hidden = [name for name in left if name.startswith(".")]
    assert source.passed_over == {
        "hidden": sorted(hidden),
        "folder of the system's": sorted([*set(left) - set(hidden), "cat/@eaDir"]),
    }
    assert len(opened(tmp_path, labels=False)) == 2


@pytest.mark.parametrize("labels", [True, False])
def test_links_are_followed_but_not_in_circles(tmp_path: Path, labels: bool) -> None:
    images.write_folder(tmp_path, {"elsewhere/x.jpg": b"x", "set/a/1.jpg": b"x"})
    (tmp_path / "set/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/again").symlink_to(tmp_path / "set/a")
    (tmp_path / "set/a/2.jpg").symlink_to(tmp_path / "elsewhere/x.jpg")
    (tmp_path / "set/a/gone.jpg").symlink_to("nowhere")
    circles = {"a/itself": ".", "a/up": "..", "a/two up": "../..", "c": ".", "b/back": "../set"}
    for name, target in circles.items():
        (tmp_path / "set" / name).symlink_to(target)
    source = opened(tmp_path / "set", labels=labels)
    found = dict(names_and_labels(source))
    in_a = {"a/1.jpg": 0, "a/2.jpg": 0, "a/gone.jpg": 0}
    in_b = {"b/x.jpg": 1, "b/again/1.jpg": 1, "b/again/2.jpg": 1, "b/again/gone.jpg": 1}
    assert found == (in_a | in_b if labels else dict.fromkeys(in_a | in_b, -1))
    assert source.class_names == (("a", "b") if labels else ())
    again = [name.replace("a/", "b/again/") for name in circles if name.startswith("a/")]
    assert source.passed_over == {"link to a folder above it": sorted([*circles, *again])}


def test_an_empty_class_keeps_its_number(tmp_path: Path) -> None:
    images.write_folder(tmp_path, {"a/1.jpg": b"x", "b/readme.txt": b"x", "c/1.jpg": b"x"})
    source = opened(tmp_path)
    assert source.class_names == ("a", "b", "c")
    assert [label for _, label in names_and_labels(source)] == [0, 2]


def test_split_folders_are_not_taken_for_classes(tmp_path: Path) -> None:
    images.write_folder(tmp_path, {"train/a/1.jpg": b"x", "val/a/1.jpg": b"x"})
    with pytest.raises(DataError, match=r"are splits, not classes; pack them one by one \(as .*tr"):
        opened(tmp_path)
    assert len(opened(tmp_path, labels=False)) == 2


def test_what_cannot_be_looked_into_is_passed_over_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """os.walk, and so ImageFolder, leaves its images out without a word."""
    images.write_folder(tmp_path, {"a/1.jpg": b"x", "b/1.jpg": b"x", "c/b/1.jpg": b"x"})
    (tmp_path / "a" / "selfloop.jpg").symlink_to("selfloop.jpg")
    (tmp_path / "loop").symlink_to("loop")
    scandir, closed = os.scandir, "/b"

    def refuse(folder: str) -> object:
        if folder.endswith(closed):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    source = opened(tmp_path)
    assert names_and_labels(source) == [("a/1.jpg", 0)]
    assert source.class_names == ("a", "b", "c")
    assert source.passed_over == {
        "cannot be listed: Permission denied": ["b", "c/b"],
        "Too many levels of symbolic links": ["a/selfloop.jpg", "loop"],
    }
    assert len(opened(tmp_path, labels=False)) == 1
    closed = "/"
    with pytest.raises(DataError, match=r"cannot be listed: Permission denied; check its mode"):
        opened(tmp_path)


@pytest.mark.parametrize("files", [{}, {"a/x.txt": b"x"}, {".hidden.jpg": b"x"}])
def test_no_images_is_an_error(tmp_path: Path, files: dict[str, bytes]) -> None:
    images.write_folder(tmp_path, files)
    with pytest.raises(DataError, match="no image files"):
        opened(tmp_path)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match="not a folder"):
        opened(tmp_path / "x.jpg")


def test_other_extensions_can_be_named(tmp_path: Path) -> None:
    images.write_folder(tmp_path, {"a.gif": b"x", "b.jpg": b"x"})
    source = FolderSource(tmp_path, labels=True, extensions=(".gif",))
    assert names_and_labels(source) == [("a.gif", -1)]


def test_an_unknown_source_says_what_it_might_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither a folder nor .* did you mean cifar100"):
        opened("cifar1000")
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match=r"photso: no such folder; did you mean .*/photos\?"):
        opened(tmp_path / "photso")
    with pytest.raises(DataError, match="no data set of this name; did you mean stl10"):
        opened("torchvision:STL11")


@pytest.mark.parametrize("name", ["cifar10", "torchvision:CIFAR10:test", "Fashion-MNIST", "stl10"])
def test_a_missing_set_is_not_downloaded_unasked_and_says_where_it_was_sought(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(DataError) as error:
        opened(name, root=tmp_path / "sets")
    assert "--download fetches it" in str(error.value)
    assert str(tmp_path / "sets") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["cifar10:val", "stl10:valid", "eurosat:train"])
def test_an_unknown_split_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=name.split(":")[1]):
        opened(name, root=tmp_path)


def _write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape)
    path.write_bytes(head + array.astype(np.uint8).tobytes())
    with gzip.open(f"{path}.gz", "wb") as archive:
        archive.write(path.read_bytes())


def test_a_set_of_arrays_gives_its_pixels_labels_and_classes(tmp_path: Path) -> None:
    grey = np.arange(5 * 28 * 28, dtype=np.uint32).reshape(5, 28, 28) % 251
    for part, count in (("train", 5), ("t10k", 2)):
        raw = tmp_path / "FashionMNIST/raw"
        _write_idx(raw / f"{part}-images-idx3-ubyte", grey[:count])
        _write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(count))
    source = opened("fashion-mnist:train", root=tmp_path)
    assert len(source) == 5
    assert source.class_names[0] == "T-shirt/top"
    assert source.sample(3).label == 3
    np.testing.assert_array_equal(source.sample(3).image, grey[3])
    assert len(opened("torchvision:FashionMNIST:test", root=tmp_path)) == 2


def test_a_set_of_files_gives_their_paths(tmp_path: Path) -> None:
    """So the files' own bytes can be packed."""
    base = tmp_path / "eurosat/2750"
    images.write_folder(base, {f"{c}/{c}_1.jpg": images.jpeg() for c in ("Forest", "River")})
    source = opened("torchvision:EuroSAT", root=tmp_path)
    assert source.class_names == ("Forest", "River")
    assert source.sample(1).image == str(base / "River/River_1.jpg")
    assert source.sample(1).label == 1
    assert source.name(1) == "eurosat/2750/River/River_1.jpg"


def test_a_set_without_classes_is_refused(tmp_path: Path) -> None:
    images.write_folder(tmp_path / "VOCdevkit/VOC2012", {"JPEGImages/1.jpg": images.jpeg()})
    images.write_folder(
        tmp_path / "VOCdevkit/VOC2012",
        {
            "ImageSets/Main/train.txt": b"1\n",
            "Annotations/1.xml": b"<annotation><object><name>cat</name></object></annotation>",
        },
    )
    source = opened("VOCDetection", root=tmp_path)
    with pytest.raises(DataError, match="targets are dict, not classes"):
        source.sample(0)


def test_a_broken_file_inside_a_set_is_left_out_with_its_reason(tmp_path: Path) -> None:
    base = tmp_path / "caltech101/101_ObjectCategories"
    files = {"ant/image_0001.jpg": b"broken", "bee/image_0001.jpg": images.jpeg()}
    images.write_folder(base, files | {"BACKGROUND_Google/x.jpg": b""})
    images.write_folder(tmp_path / "caltech101/Annotations", {"x": b""})
    source = opened("caltech101", root=tmp_path)
    assert isinstance(source.sample(0).image, LeftOut)
    # Opened by the set, not altered: so the file itself can be packed.
    assert source.sample(1).image == str(base / "bee/image_0001.jpg")


def test_the_embedded_set_comes_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipeline.packing import embedded

    def few(split: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
        count = {"train": 5, "test": 2}[split]
        pixels = np.arange(count * 12, dtype=np.uint8).reshape(count, 2, 2, 3)
        return pixels, np.arange(count), tuple("abcde")

    monkeypatch.setattr(embedded, "embedded_images", few)
    for name, count in (("", 5), (":train", 5), (":test", 2)):
        source = opened(f"embedded:{embedded.NAME}{name}")
        assert len(source) == count
        assert source.class_names == tuple("abcde")
        assert source.sample(1).label == 1
        np.testing.assert_array_equal(source.sample(1).image, few("test")[0][1])
    for name in ("other", f"{embedded.NAME}:val"):
        with pytest.raises(DataError, match=f"there are embedded:{embedded.NAME} and"):
            opened(f"embedded:{name}")
