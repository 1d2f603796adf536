"""No damage to a .beton gets past its check, and what is packed is what stock FFCV reads."""

import json
import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline import beton, beton_writer
from data_pipeline.beton import check_beton, read_sample_table
from data_pipeline.beton_writer import BetonWriter
from data_pipeline.errors import DataError
from data_pipeline.image_codec import CodecConfig, ImageCodec, Stored
from data_pipeline.manifest import dump_manifest, load_manifest, manifest_path
from data_pipeline.pack import PackConfig, pack
from tests.data_pipeline import images

SIZE = 32  # pixels
JPEG = 4  # the number of a sample that is a JPEG; 5 is raw
COUNT = 12
TABLES = beton.HEADER.itemsize + 2 * beton.FIELD.itemsize  # bytes before the samples' metadata


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("beton")
    files = {}
    for i in range(COUNT):
        data, kind = (images.png("RGB", SIZE, SIZE), "png")
        if i % 2:
            data, kind = images.jpeg(SIZE, SIZE, seed=i, quality=95), "jpg"
        files[f"class {i % 3}/{i:02d}.{kind}"] = data
    images.write_folder(folder / "set", files)
    pack(str(folder / "set"), folder / "good.beton", PackConfig(workers=1), progress=False)
    return folder / "good.beton"


def source_pixels(packed: Path) -> list[np.ndarray]:
    paths = sorted((packed.parent / "set").rglob("*.*g"))
    return [np.asarray(Image.open(path).convert("RGB")) for path in paths]


def with_manifest(packed: Path, path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    manifest_path(path).write_bytes(manifest_path(packed).read_bytes())
    return path


# ---- the format is FFCV's ----


def test_the_types_are_those_of_ffcv() -> None:
    from ffcv import types
    from ffcv.fields import FloatField, IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES
    from ffcv.memory_allocator import MemoryAllocator  # noqa: F401  (the writer's layout rule)
    from ffcv.writer import MAX_PAGE_SIZE, MIN_PAGE_SIZE

    assert types.HeaderType == beton.HEADER
    assert types.FieldDescType == beton.FIELD
    assert types.ALLOC_TABLE_TYPE == beton.ALLOCATION
    assert types.CURRENT_VERSION == beton.VERSION
    for number, field in ((0, FloatField), (1, IntField), (2, RGBImageField)):
        assert types.TYPE_ID_HANDLER[number] is field
        assert field().metadata_type == beton.FIELD_TYPES[number]
    assert types.get_metadata_type([RGBImageField(), IntField()]) == beton_writer.METADATA
    assert (IMAGE_MODES["jpg"], IMAGE_MODES["raw"]) == (beton.JPEG_MODE, beton.RAW_MODE)
    assert MIN_PAGE_SIZE == beton.MIN_PAGE_SIZE <= beton_writer.PAGE_SIZE < MAX_PAGE_SIZE


@pytest.mark.parametrize("os_cache", [True, False])
def test_stock_ffcv_reads_what_is_packed(packed: Path, os_cache: bool) -> None:
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.memory_managers.os_cache import OSCacheManager
    from ffcv.reader import Reader

    reader = Reader(str(packed))
    assert reader.num_samples == COUNT
    assert reader.field_names == ["image", "label"]
    if os_cache:  # the one way of reading that needs compiled code's memory map
        assert OSCacheManager(reader).ptrs.tolist() == sorted(reader.alloc_table["ptr"].tolist())
    loader = Loader(
        str(packed),
        batch_size=COUNT,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        os_cache=os_cache,
        drop_last=False,
        pipelines={"image": [SimpleRGBImageDecoder()]},
    )
    ((pixels, labels),) = [(np.array(batch[0]), np.array(batch[1])) for batch in loader]
    assert labels.ravel().tolist() == [0] * 4 + [1] * 4 + [2] * 4
    table = read_sample_table(packed)
    for sample, (ours, source) in enumerate(zip(pixels, source_pixels(packed))):
        if table.modes[sample] == beton.RAW_MODE:
            np.testing.assert_array_equal(ours, source)
        else:  # FFCV asks for the fast transform, Pillow for the accurate one
            assert np.abs(ours.astype(int) - source).max() <= 8


def test_a_file_of_stock_ffcv_passes(tmp_path: Path) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    path = tmp_path / "stock.beton"
    dataset = [(images.picture(20 + i, 30), i % 2) for i in range(6)]
    fields = {"image": RGBImageField(write_mode="jpg"), "label": IntField()}
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(dataset)
    info = check_beton(path, verify=True)
    assert (info.num_samples, info.has_label, info.class_names) == (6, True, ())
    assert (info.max_height, info.max_width) == (25, 30)


# ---- what the check says of sound files ----


def test_info_says_what_was_packed(packed: Path) -> None:
    info = check_beton(packed)
    assert info.num_samples == COUNT
    assert info.has_label
    assert info.class_names == ("class 0", "class 1", "class 2")
    assert (info.max_height, info.max_width) == (SIZE, SIZE)
    assert info == check_beton(str(packed), verify=True)


def test_the_sample_table_finds_every_image(packed: Path) -> None:
    table, data = read_sample_table(packed), packed.read_bytes()
    for sample, source in enumerate(source_pixels(packed)):
        start = table.offsets[sample]
        payload = data[start : start + table.sizes[sample]]
        if table.modes[sample] == beton.RAW_MODE:
            assert payload == source.tobytes()
        else:
            np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(payload))), source)


def test_without_its_manifest_a_file_is_hashed(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "x.beton").write_bytes(packed.read_bytes())
    info = check_beton(tmp_path / "x.beton")
    assert info.fingerprint == check_beton(packed).fingerprint
    assert info.class_names == ()


def test_checking_reads_no_image_data_and_no_ffcv(packed: Path, tmp_path: Path) -> None:
    """Ten gigabytes of images are checked in a moment: here they are a hole in the file."""
    import subprocess
    import sys

    code = (
        "import sys; from data_pipeline.beton import check_beton; check_beton(sys.argv[1]);"
        "assert not {'ffcv', 'torch', 'numba', 'cv2'} & set(sys.modules)"
    )
    path = tmp_path / "sparse.beton"
    codec = ImageCodec(CodecConfig())
    raw = codec.encode(images.picture(100, 100))
    assert isinstance(raw, Stored)
    with path.open("w+b") as file:
        writer = BetonWriter(file, 2)
        writer.append(raw, 0)
        writer._end += 10 << 30
        writer.append(raw, 1)
        content = writer.finish()
        size = file.seek(0, os.SEEK_END)
    head = {"count": 2, "bytes": size, "classes": [], "sha256": "0" * 64}
    manifest_path(path).write_bytes(dump_manifest(head | {"content_sha256": content}))
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=30)


def test_images_larger_than_a_page_lie_within_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = ImageCodec(CodecConfig(format="raw"))
    sizes = [(100, 100), (2000, 2000), (60, 60), (1200, 1500), (5, 5)]
    path = tmp_path / "x.beton"
    with path.open("w+b") as file:
        writer = BetonWriter(file, len(sizes))
        for height, width in sizes:
            stored = codec.encode(np.full((height, width, 3), height % 251, np.uint8))
            assert isinstance(stored, Stored)
            writer.append(stored, -1)
        writer.finish()
    table = read_sample_table(path)  # checks pages too
    header = np.fromfile(path, beton.HEADER, 1)[0]
    assert header["page_size"] == 1 << 24
    data = path.read_bytes()
    for (height, width), start, size in zip(sizes, table.offsets, table.sizes):
        assert data[start : start + size] == bytes([height % 251]) * (height * width * 3)
    assert not check_beton(path).has_label


# ---- damage ----


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


Change = Callable[[np.ndarray, np.ndarray, np.ndarray], None]


def changed(packed: Path, path: Path, change: Change) -> Path:
    """A copy with its header, metadata and allocation table changed, without a manifest."""
    data = bytearray(packed.read_bytes())
    header = np.frombuffer(data, beton.HEADER, 1)
    metadata = np.frombuffer(data, beton_writer.METADATA, COUNT, TABLES)
    allocations = np.frombuffer(data, beton.ALLOCATION, COUNT, int(header["alloc_table_ptr"][0]))
    change(header, metadata, allocations)
    path.write_bytes(data)
    return path


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
    with pytest.raises(DataError, match=r"not a regular file|cannot be read"):
        check_beton(tmp_path)
    os.mkfifo(tmp_path / "pipe.beton")
    with pytest.raises(DataError, match="not a regular file"):
        check_beton(tmp_path / "pipe.beton")
    (tmp_path / "photo.beton").write_bytes(images.jpeg())
    with pytest.raises(DataError, match=r"not a \.beton"):
        check_beton(tmp_path / "photo.beton")


# ---- the manifest and the file belong together ----


def test_a_manifest_beside_another_file_is_found_out(packed: Path, tmp_path: Path) -> None:
    """Even one whose tables are the same to the byte: raw images of equal sizes and labels."""
    paths = []
    for seed in (1, 2):
        folder = images.write_folder(
            tmp_path / f"{seed}",
            {f"a/{i}.png": images.encoded(images.picture(16, 16, seed + i), "PNG") for i in (0, 9)},
        )
        paths.append(tmp_path / f"{seed}.beton")
        pack(str(folder), paths[-1], PackConfig(workers=1), progress=False)
    first, second = paths
    assert first.stat().st_size == second.stat().st_size
    first.write_bytes(second.read_bytes())
    with pytest.raises(DataError, match=r"describes another file than 1\.beton"):
        check_beton(first)
    manifest_path(first).unlink()
    assert check_beton(first).fingerprint == check_beton(second).fingerprint


def test_a_changed_pixel_is_found_by_verifying(packed: Path, tmp_path: Path) -> None:
    data = bytearray(packed.read_bytes())
    data[int(read_sample_table(packed).offsets[0]) + 50] ^= 1
    path = with_manifest(packed, tmp_path / "x.beton", data)
    check_beton(path)
    with pytest.raises(DataError, match="has changed since it was packed"):
        check_beton(path, verify=True)


@pytest.mark.parametrize(
    "manifest",
    [b"", b"{}", b"[" * 100_000, b"null", b"\xff", b'{"format": "widebatch-manifest"}'],
)
def test_a_broken_manifest_is_refused(packed: Path, tmp_path: Path, manifest: bytes) -> None:
    path = tmp_path / "x.beton"
    path.write_bytes(packed.read_bytes())
    manifest_path(path).write_bytes(manifest)
    with pytest.raises(DataError, match=r"x\.beton\.json"):
        check_beton(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 2),
        ("count", COUNT + 1),
        ("count", "12"),
        ("bytes", 1),
        ("classes", ["one"]),
        ("classes", {"a": 1}),
        ("classes", [1, 2, 3]),
        ("sha256", "short"),
        ("content_sha256", "0" * 64),
    ],
)
def test_a_manifest_that_says_otherwise_is_refused(
    packed: Path, tmp_path: Path, key: str, value: object
) -> None:
    fields = load_manifest(packed)
    assert fields is not None
    path = with_manifest(packed, tmp_path / "x.beton", packed.read_bytes())
    manifest_path(path).write_text(json.dumps(fields | {key: value}))
    with pytest.raises(DataError):
        check_beton(path)


# ---- fuzzing: a sound file or a DataError, never anything else ----


def only_data_errors(path: Path) -> None:
    try:
        info = check_beton(path)
    except DataError:
        return
    assert info.num_samples <= path.stat().st_size


FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(data=st.binary(max_size=4000))
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.beton"
    path.write_bytes(data)
    only_data_errors(path)


@FUZZ
@given(draw=st.data())
def test_flipped_bits_in_the_tables_and_cuts(
    packed: Path, tmp_path: Path, draw: st.DataObject
) -> None:
    data = bytearray(packed.read_bytes())
    tail = int(np.frombuffer(data, beton.HEADER, 1)["alloc_table_ptr"][0])
    head = TABLES + COUNT * beton_writer.METADATA.itemsize
    names = st.integers(0, beton.HEADER.itemsize + 20)  # where the header and first name lie
    places = st.one_of(names, st.integers(TABLES, head - 1), st.integers(tail, len(data) - 1))
    for at, bit in draw.draw(st.lists(st.tuples(places, st.integers(0, 7)), max_size=4)):
        data[at] ^= 1 << bit
    keep = draw.draw(st.sampled_from([0, 0, 0, 1, 24, len(data) // 2]))
    path = tmp_path / "x.beton"
    path.write_bytes(data[: len(data) - keep])
    only_data_errors(path)


@FUZZ
@given(
    header=st.tuples(
        st.sampled_from([2, 2, 2, 0, 3]),
        st.integers(0, 2**16 - 1) | st.sampled_from([1, 2, 3]),
        st.integers(0, 2**32 - 1) | st.sampled_from([1 << 21, 1 << 23, 1 << 31]),
        st.integers(0, 2**64 - 1) | st.integers(0, 20),
        st.integers(0, 2**64 - 1) | st.integers(0, 20_000),
    ),
    kinds=st.lists(st.integers(0, 6), min_size=2, max_size=2),
)
def test_any_header(
    packed: Path, tmp_path: Path, header: tuple[int, ...], kinds: list[int]
) -> None:
    data = bytearray(packed.read_bytes())
    data[: beton.HEADER.itemsize] = np.array(header, beton.HEADER).tobytes()
    fields = np.frombuffer(data, beton.FIELD, 2, beton.HEADER.itemsize)
    fields["type_id"] = kinds
    path = tmp_path / "x.beton"
    path.write_bytes(data)
    only_data_errors(path)
