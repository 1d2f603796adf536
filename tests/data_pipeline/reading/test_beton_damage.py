"""No damage to a .beton gets past its check, which names the sample or the remedy."""

import os
from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError
from data_pipeline.packing import beton_writer
from data_pipeline.packing.beton_writer import BetonWriter
from data_pipeline.packing.image_codec import CodecConfig, ImageCodec, Stored
from data_pipeline.reading import beton
from data_pipeline.reading.manifest import manifest_path
from tests.data_pipeline import images
from tests.data_pipeline.betons import check_beton
from tests.data_pipeline.damaged import Change, changed
from tests.data_pipeline.small_beton import COUNT, SIZE, pack_small_beton, with_manifest

JPEG = 4  # the number of a sample that is a JPEG; 5 is raw


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_small_beton(tmp_path_factory.mktemp("beton"))


# ---- cut short ----


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_cut_file_is_refused(packed: Path, tmp_path: Path, keep: float) -> None:
    data = packed.read_bytes()
    path = with_manifest(packed, tmp_path / "cut.beton", data[: int(len(data) * keep)])
    with pytest.raises(DataError, match=r"cut\.beton.*pack it again with 'widebatch pack'"):
        check_beton(path)


@pytest.mark.parametrize("lost", [1, 8, 16, 24])
def test_the_last_bytes_count(packed: Path, tmp_path: Path, lost: int) -> None:
    """FFCV reads a table cut at a record's end without a word, and shows other pixels."""
    path = tmp_path / "x.beton"
    path.write_bytes(packed.read_bytes()[:-lost])
    with pytest.raises(DataError):
        check_beton(path)


# ---- the header ----


def _set_header(name: str, value: int) -> Change:
    def change(header: np.ndarray, metadata: np.ndarray, allocations: np.ndarray) -> None:
        header[name] = value

    return change


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", 3),
        ("num_fields", 0),
        ("num_fields", 1),
        ("num_fields", 60000),
        ("page_size", 0),
        ("page_size", 12345),
        ("page_size", 1 << 12),
        ("num_samples", 0),
        ("num_samples", COUNT - 1),
        ("num_samples", COUNT + 1),
        ("num_samples", 2**40),
        ("num_samples", 2**64 - 1),
        ("alloc_table_ptr", 0),
        ("alloc_table_ptr", 2**63),
        ("alloc_table_ptr", 2**64 - 1),
    ],
)
def test_an_impossible_header_is_refused(
    packed: Path, tmp_path: Path, name: str, value: int
) -> None:
    path = changed(packed, tmp_path / "x.beton", _set_header(name, value))
    with pytest.raises(DataError, match="pack it again"):
        check_beton(path)


@pytest.mark.parametrize(
    ("field", "kind", "name"),
    [(0, 3, b"image"), (0, 255, b"image"), (0, 1, b"image"), (0, 2, b"photo"), (1, 2, b"label"),
     (1, 0, b"label"), (1, 1, b"image"), (1, 4, b"array"), (1, 1, b"\xff\xfe"),
     (1, 1, b"label\0\0\x80")],
)  # fmt: skip
def test_fields_that_are_not_ours_are_refused(
    packed: Path, tmp_path: Path, field: int, kind: int, name: bytes
) -> None:
    """FFCV's other fields parse arguments from the file and hold pointers of their own."""
    data = bytearray(packed.read_bytes())
    fields = np.frombuffer(data, beton.FIELD, 2, beton.HEADER.itemsize)
    fields[field]["type_id"] = kind
    fields[field]["name"] = np.frombuffer(name.ljust(16, b"\0"), np.uint8)
    path = tmp_path / "x.beton"
    path.write_bytes(data)
    with pytest.raises(DataError):
        check_beton(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file; make it with 'widebatch pack"):
        check_beton(tmp_path / "missing.beton")
    with pytest.raises(DataError, match=r"is a folder; pack it first"):
        check_beton(tmp_path)
    os.mkfifo(tmp_path / "pipe.beton")
    with pytest.raises(DataError, match="not a regular file"):
        check_beton(tmp_path / "pipe.beton")
    (tmp_path / "photo.beton").write_bytes(images.jpeg())
    with pytest.raises(DataError, match=r"not a \.beton"):
        check_beton(tmp_path / "photo.beton")


# ---- samples ----


def _set_image(name: str, value: int, sample: int = 5) -> Change:
    def change(header: np.ndarray, metadata: np.ndarray, allocations: np.ndarray) -> None:
        metadata["f0"][name][sample] = value

    return change


def _move(offset: int, size: int = 0) -> Change:
    """Sample 5's data moved, in both tables alike, and resized."""

    def change(header: np.ndarray, metadata: np.ndarray, allocations: np.ndarray) -> None:
        moved = (int(allocations["ptr"][5]) + offset) % 2**64
        allocations["ptr"][5] = metadata["f0"]["data_ptr"][5] = moved
        allocations["size"][5] = (int(allocations["size"][5]) + size) % 2**64

    return change


def _swap(header: np.ndarray, metadata: np.ndarray, allocations: np.ndarray) -> None:
    allocations["sample_id"][[4, 5]] = allocations["sample_id"][[5, 4]]


def _repeat(header: np.ndarray, metadata: np.ndarray, allocations: np.ndarray) -> None:
    allocations["sample_id"][5] = 6


def _empty(header: np.ndarray, metadata: np.ndarray, allocations: np.ndarray) -> None:
    allocations["size"][JPEG] = 0


def _label(header: np.ndarray, metadata: np.ndarray, allocations: np.ndarray) -> None:
    metadata["f1"][5] = -7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set_image("data_ptr", 2**60), "sample 5 points at data that is not its own"),
        (_set_image("mode", 2), "sample 5 is stored in an unknown way"),
        (_set_image("mode", 1, JPEG), "sample 4 has a size unlike its dimensions"),
        (_set_image("mode", 0), None),
        (_set_image("width", SIZE + 1), "sample 5 has a size unlike its dimensions"),
        (_set_image("height", 0), "sample 5 has an empty image"),
        (_set_image("height", 65535, JPEG), None),
        (_move(-(2**40)), "sample 5 points past the end"),
        (_move(2**40), "sample 5 points past the end"),
        (_move(0, 2**63), "sample 5 points past the end"),
        (_move(0, -1), "sample 5 has a size unlike its dimensions"),
        (_move(0, 70), "sample 5 has a size unlike its dimensions"),
        (_move(-70), "overlaps another sample"),
        (_swap, "sample 4 points at data that is not its own"),
        (_repeat, "sample 5 has not exactly one image"),
        (_empty, "sample 4 has no image data"),
        (_label, "sample 5 has an impossible label"),
    ],
)
def test_an_impossible_sample_is_refused_by_its_number(
    packed: Path, tmp_path: Path, change: Change, message: str | None
) -> None:
    path = changed(packed, tmp_path / "x.beton", change)
    if message is None:  # within bounds: only the JPEG itself, or the whole hash, can tell
        manifest_path(path).write_bytes(manifest_path(packed).read_bytes())
        with pytest.raises(DataError):
            check_beton(path, verify=True)
        return
    with pytest.raises(DataError, match=message):
        check_beton(path)


def test_an_image_across_a_pages_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FFCV's own cache would read it from two unrelated pages."""
    raw = ImageCodec(CodecConfig()).encode(images.picture(100, 100))
    assert isinstance(raw, Stored)
    monkeypatch.setattr(BetonWriter, "_place", lambda self, size: self._end)
    with (tmp_path / "x.beton").open("w+b") as file:
        writer = BetonWriter(file, 1)
        writer._end = beton_writer.PAGE_SIZE - 100
        file.seek(writer._end)
        writer.append(raw, 0)
        writer.finish()
    with pytest.raises(DataError, match="sample 0 lies across a page's end"):
        check_beton(tmp_path / "x.beton")


def test_too_many_pixels_are_refused(packed: Path, tmp_path: Path) -> None:
    def change(header: np.ndarray, metadata: np.ndarray, allocations: np.ndarray) -> None:
        metadata["f0"]["height"][5] = metadata["f0"]["width"][5] = 9000

    with pytest.raises(DataError, match="sample 5 has more than"):
        check_beton(changed(packed, tmp_path / "x.beton", change))


def test_a_jpeg_that_declares_other_dimensions_is_found_by_verifying(
    packed: Path, tmp_path: Path
) -> None:
    path = changed(packed, tmp_path / "x.beton", _set_image("height", SIZE - 1, JPEG))
    check_beton(path)
    with pytest.raises(DataError, match=f"sample {JPEG} is a JPEG of 32 x 32 pixels but"):
        check_beton(path, verify=True)
