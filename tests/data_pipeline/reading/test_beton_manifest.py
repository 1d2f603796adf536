"""A manifest and its .beton belong together: neither passes beside another file."""

import json
from pathlib import Path

import pytest

from common.errors import DataError
from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.reading.manifest import load_manifest, manifest_path
from tests.data_pipeline import images
from tests.data_pipeline.betons import check_beton, read_sample_table
from tests.data_pipeline.small_beton import COUNT, pack_small_beton, with_manifest


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_small_beton(tmp_path_factory.mktemp("beton"))


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
    assert check_beton(first).identity == check_beton(second).identity


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
