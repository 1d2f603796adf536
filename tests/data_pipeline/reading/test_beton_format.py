"""What is packed is what stock FFCV reads, and the check says what a sound file holds."""

import hashlib
import logging
import os
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.packing import beton_writer
from data_pipeline.packing.beton_writer import BetonWriter
from data_pipeline.packing.image_codec import CodecConfig, ImageCodec, Stored
from data_pipeline.reading import beton
from data_pipeline.reading.manifest import dump_manifest, manifest_path
from tests.data_pipeline import images
from tests.data_pipeline.betons import check_beton, read_sample_table
from tests.data_pipeline.small_beton import COUNT, SIZE, pack_small_beton


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_small_beton(tmp_path_factory.mktemp("beton"))


def source_pixels(packed: Path) -> list[np.ndarray]:
    paths = sorted((packed.parent / "set").rglob("*.*g"))
    return [np.asarray(Image.open(path).convert("RGB")) for path in paths]


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
    table = read_sample_table(path)
    assert (table.heights.max(), table.widths.max()) == (25, 30)


# ---- what the check says of sound files ----


def test_info_says_what_was_packed(packed: Path) -> None:
    info = check_beton(packed)
    assert info.num_samples == COUNT
    assert info.has_label
    assert info.class_names == ("class 0", "class 1", "class 2")
    table = read_sample_table(packed)
    assert (table.heights.max(), table.widths.max()) == (SIZE, SIZE)
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


def test_without_its_manifest_a_file_is_known_by_its_identity(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "x.beton").write_bytes(packed.read_bytes())
    info = check_beton(tmp_path / "x.beton")
    assert info.fingerprint == ""
    assert info.identity == check_beton(packed).identity
    assert info.class_names == ()


def test_checking_reads_no_image_data_and_no_ffcv(packed: Path, tmp_path: Path) -> None:
    """Ten gigabytes of images are checked in a moment: here they are a hole in the file."""
    import subprocess
    import sys

    code = (
        "import sys; from data_pipeline.reading.open_beton import OpenBeton;"
        "OpenBeton(sys.argv[1]);"
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


def test_a_long_checksum_shows_how_far_it_is(
    packed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    digest = hashlib.sha256(packed.read_bytes()).hexdigest()
    with packed.open("rb") as file:
        assert beton.sha256_of(file) == digest
        assert not caplog.messages
        monkeypatch.setattr(beton, "_LONG_TO_READ", 1)
        assert beton.sha256_of(file) == digest
        assert caplog.messages[-1].startswith("checking the data's content: ")
        caplog.clear()
        monkeypatch.setenv("RANK", "1")
        assert beton.sha256_of(file) == digest
        assert not caplog.messages
