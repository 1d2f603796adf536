"""A packed file accounts for every image, and has the same bytes however it was made."""

import hashlib
import json
import os
import socket
import stat
from pathlib import Path

import numpy as np
import pytest

from common.errors import ConfigError, DataError
from common.files.atomic_file import check_replaceable, write_atomically
from data_pipeline.packing import pack as pack_module
from data_pipeline.packing.pack import PackConfig
from data_pipeline.packing.sources import ArraySource
from data_pipeline.reading.beton import JPEG_MODE
from tests.data_pipeline import images
from tests.data_pipeline.betons import check_beton, read_sample_table
from tests.data_pipeline.packed import left_in, packed, photographs


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photographs(tmp_path_factory.mktemp("photos"))


def test_everything_is_accounted_for(photos: Path, tmp_path: Path) -> None:
    report = packed(photos, tmp_path / "x.beton")
    assert report.num_samples == 205
    assert report.class_names == tuple(f"class {c}" for c in range(5))
    assert dict(report.left_out) == {
        "class 0/cut.jpg": "damaged JPEG: Premature end of JPEG file",
        "class 2/empty.jpg": "empty file",
        "class 4/bomb.png": "far more pixels than --max-pixels 67108864; raise it as far as memory "
        "allows, or let --max-side shrink JPEGs as they are read",
        "class 4/text.jpg": "not an image",
    }
    assert report.passed_over == {"hidden": 1, "not an image file (.txt)": 1}
    assert report.fates == {"encoded as JPEG": 2, "passed through": 200, "stored raw": 3}
    assert report.changes["turned upright"] == 1
    manifest = json.loads((tmp_path / "x.beton.json").read_bytes())
    assert manifest["count"] == 205
    assert manifest["class_counts"] == [41, 42, 41, 41, 40]
    assert manifest["fates"] == report.fates | {"left out": 4}
    assert [tuple(entry.values()) for entry in manifest["left_out"]] == list(report.left_out)
    assert manifest["changed"]["CMYK to RGB"] == {"count": 1, "first_1000": ["class 1/cmyk.jpg"]}
    assert manifest["passed_over"]["hidden"]["first_1000"] == ["class 4/.hidden.jpg"]
    assert manifest["settings"]["quality"] == 90
    info = check_beton(tmp_path / "x.beton", verify=True)
    assert (info.num_samples, info.fingerprint) == (205, report.fingerprint)
    assert hashlib.sha256((tmp_path / "x.beton").read_bytes()).hexdigest() == report.fingerprint


def test_any_number_of_workers_gives_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    for workers in (1, 2, 3):
        packed(photos, tmp_path / f"{workers}.beton", workers=workers)
    for suffix in (".beton", ".beton.json"):
        assert len({(tmp_path / f"{w}{suffix}").read_bytes() for w in (1, 2, 3)}) == 1


def test_every_image_comes_with_its_own_label(photos: Path, tmp_path: Path) -> None:
    packed(photos, tmp_path / "x.beton", workers=2)
    table = read_sample_table(tmp_path / "x.beton")
    data = (tmp_path / "x.beton").read_bytes()
    payloads = [data[s : s + n] for s, n in zip(table.offsets, table.sizes)]
    originals = {path.read_bytes(): path for path in photos.rglob("*.jpg")}
    found = [(originals.get(p), label) for p, label in zip(payloads, table.labels)]
    assert sum(path is not None for path, _ in found) == 200
    assert all(path.parent.name == f"class {label}" for path, label in found if path)
    names = [str(path.relative_to(photos)) for path, _ in found if path]
    assert names == sorted(names)


def test_no_image_is_above_max_side(photos: Path, tmp_path: Path) -> None:
    packed(photos, tmp_path / "x.beton", max_side=64)
    table = read_sample_table(tmp_path / "x.beton")
    assert max(table.heights.max(), table.widths.max()) == 64


def test_modes_of_passed_through_images_are_jpeg(photos: Path, tmp_path: Path) -> None:
    packed(photos / "class 0", tmp_path / "x.beton", format="jpeg")
    assert (read_sample_table(tmp_path / "x.beton").modes == JPEG_MODE).all()


def test_arrays_come_out_as_they_went_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), np.uint8)
    labels = np.arange(300) % 10
    source = ArraySource(pixels, labels, [str(i) for i in range(10)], {"kind": "test"})
    monkeypatch.setattr(pack_module, "open_source", lambda *a, **k: source)
    packed("arrays", tmp_path / "x.beton", workers=2)
    table = read_sample_table(tmp_path / "x.beton")
    np.testing.assert_array_equal(table.labels, labels)
    data = np.fromfile(tmp_path / "x.beton", np.uint8)
    for i, start in enumerate(table.offsets):
        np.testing.assert_array_equal(data[start : start + 3072], pixels[i].ravel())


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    images.write_folder(tmp_path / "set", {"1.jpg": images.jpeg(), "2.jpg": images.jpeg()})
    packed(tmp_path / "set", tmp_path / "x.beton")
    info = check_beton(tmp_path / "x.beton")
    assert not info.has_label
    assert info.class_names == ()
    assert (read_sample_table(tmp_path / "x.beton").labels == -1).all()


# ---- refusals ----


def test_strict_refuses_what_it_would_leave_out(tmp_path: Path) -> None:
    photos, out = photographs(tmp_path / "photos"), tmp_path / "x.beton"
    for name in ("notes.txt", ".hidden.jpg"):
        (photos / "class 4" / name).unlink()
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"class 0/cut\.jpg: damaged JPEG.*without --strict"):
            packed(photos, out, strict=True, workers=workers)
        assert left_in(tmp_path) == ["photos"]


def test_strict_refuses_what_it_would_pass_over(photos: Path, tmp_path: Path) -> None:
    message = r"2 of its files .* such as class 4/\.hidden\.jpg \(hidden\).*without --strict"
    with pytest.raises(DataError, match=message):
        packed(photos, tmp_path / "x.beton", strict=True)
    assert left_in(tmp_path) == []


def test_no_usable_image_is_an_error(tmp_path: Path) -> None:
    folder = images.write_folder(tmp_path / "set", {"a/1.jpg": b"", "a/2.jpg": b"x"})
    with pytest.raises(DataError, match=r"none of its 2 images can be used.*a/1\.jpg: empty file"):
        packed(folder, tmp_path / "x.beton")
    assert left_in(tmp_path) == ["set"]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_side": -1},
        {"quality": 0},
        {"quality": 101},
        {"format": "png"},
        {"workers": -1},
        {"max_pixels": 0},
        {"max_pixels": 1 << 50},
        {"extensions": ()},
        {"extensions": ("jpg",)},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        PackConfig(**settings)  # type: ignore[arg-type]


def test_a_target_that_cannot_be_written_is_refused_first(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.beton").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        packed(photos, tmp_path / "folder.beton")
    with pytest.raises(DataError, match="does not exist; make it first"):
        packed(photos, tmp_path / "missing/x.beton")


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "link to a pipe"])
@pytest.mark.parametrize("name", ["x.beton", "x.beton.json"])
def test_what_is_no_regular_file_is_never_replaced(
    photos: Path, tmp_path: Path, kind: str, name: str
) -> None:
    """As root, ``pack SRC /dev/null`` would have made a file of it for the whole system."""
    path = tmp_path / name
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(os.path.relpath(path))  # a longer address is refused
    elif kind == "device":
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("no device can be made here: run this as root, who may")
    else:
        os.mkfifo(tmp_path / "pipe" if "link" in kind else path)
        if "link" in kind:
            path.symlink_to("pipe")
    before = path.lstat()
    for act in (
        lambda: packed(photos, tmp_path / "x.beton"),
        lambda: write_atomically(path, b"content"),
    ):
        with pytest.raises(FileExistsError, match=rf"{name}: is no regular file"):
            act()
    assert path.lstat() == before
    assert set(left_in(tmp_path)) <= {name, "pipe"}


@pytest.mark.parametrize("name", ["stdout", "null", "new"])
def test_nothing_in_dev_is_replaced(name: str) -> None:
    """/dev/stdout is a link to a regular file where a shell has redirected it to one."""
    with pytest.raises(FileExistsError, match=f"/dev/{name}: is no regular file"):
        check_replaceable(Path("/dev", name))  # asks, and writes nothing


def test_a_link_to_a_file_is_replaced_and_the_file_stands(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "before").write_bytes(b"before")
    (tmp_path / "x.beton").symlink_to("before")
    packed(photos / "class 0", tmp_path / "x.beton")
    assert not (tmp_path / "x.beton").is_symlink()
    assert (tmp_path / "before").read_bytes() == b"before"


def test_a_file_that_pack_did_not_make_is_not_replaced(photos: Path, tmp_path: Path) -> None:
    packed(photos / "class 0", tmp_path / "train.beton")
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "boxes.json").write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for name in ("train.beton.json", "notes"):
        with pytest.raises(DataError, match=rf"{name}: exists and is no \.beton; name another"):
            packed(photos / "class 0", tmp_path / name)
    with pytest.raises(DataError, match=r"boxes\.json: not a manifest of 'widebatch pack'"):
        packed(photos / "class 0", tmp_path / "boxes")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    packed(photos / "class 0", tmp_path / "train")  # new
    packed(photos / "class 0", tmp_path / "train")  # ours
    (tmp_path / "train.beton").write_bytes(b"damaged")
    packed(photos / "class 0", tmp_path / "train.beton")  # as the message about it advises
