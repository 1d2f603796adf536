"""Of pixels that eight bits in three bands do not hold, what is lost is said, or they stay out."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.packing.image_codec import CodecConfig, ImageCodec, LeftOut, Stored
from tests.data_pipeline import images
from tests.data_pipeline.packed import packed
from tests.data_pipeline.packing.test_image_codec import pixels_of


def random(dtype: str, *shape: int, levels: int = 0) -> np.ndarray:
    """Numbers below ``levels``, by default over the type's whole range."""
    high = levels or np.iinfo(dtype).max + 1
    return np.random.default_rng(0).integers(0, high, shape).astype(dtype)


def encode(tmp_path: Path, data: bytes, **settings: Any) -> Stored | LeftOut:
    path = tmp_path / "image"
    path.write_bytes(data)
    return ImageCodec(CodecConfig(**settings)).encode(str(path))


def reason(tmp_path: Path, data: bytes, **settings: Any) -> str:
    result = encode(tmp_path, data, **settings)
    assert isinstance(result, LeftOut), result
    assert "\n" not in result.reason
    return result.reason


def stored(tmp_path: Path, data: bytes, **settings: Any) -> Stored:
    result = encode(tmp_path, data, **settings)
    assert isinstance(result, Stored), result
    return result


def pgm(pixels: np.ndarray, most: int) -> bytes:
    kind = b"P6" if pixels.ndim == 3 else b"P5"
    head = b"%s\n%d %d\n%d\n" % (kind, pixels.shape[1], pixels.shape[0], most)
    return head + pixels.astype(">u2").tobytes()


TWELVE = random("u2", 64, 64, levels=4096)
COLOUR = random("u2", 64, 64, 3, levels=4096)


@pytest.mark.parametrize(
    ("data", "kept"),
    [
        (images.deep_png(TWELVE), f"17 of {len(np.unique(TWELVE))} levels"),
        (images.tiff(TWELVE), f"17 of {len(np.unique(TWELVE))} levels"),
        (pgm(TWELVE, 65535), f"17 of {len(np.unique(TWELVE))} levels"),
        (images.deep_png(random("u2", 64, 64, levels=60)), "1 of 60 levels"),
        (images.deep_png(COLOUR), "16 levels"),
        (images.tiff(COLOUR, photometric=2), "16 levels"),
        (images.tiff(random("u2", 64, 64, 4, levels=4096), photometric=5), "16 levels"),
    ],
    ids=["png", "tiff", "pgm", "dark", "png RGB", "tiff RGB", "tiff CMYK"],
)
def test_what_would_turn_black_is_left_out_unless_asked_for(
    tmp_path: Path, data: bytes, kept: str
) -> None:
    said = reason(tmp_path, data)
    assert f"16-bit pixels that would keep {kept}, fewer than --min-levels 64" in said
    assert f"16 bits to 8: {kept}" in stored(tmp_path, data, min_levels=0).changes


def test_few_levels_are_kept_where_all_are(tmp_path: Path) -> None:
    two = random("u2", 64, 64, levels=2) * np.uint16(65535)
    assert "16 bits to 8: 2 of 2 levels" in stored(tmp_path, images.deep_png(two)).changes


@pytest.mark.parametrize(
    ("data", "loss"),
    [
        (images.deep_png(random("u2", 64, 64, 3)), "16 bits to 8: 256 levels"),
        (images.deep_png(random("u2", 64, 64, 4)), "16 bits to 8: 256 levels"),
        (images.tiff(random("u2", 64, 64, 3), photometric=2), "16 bits to 8: 256 levels"),
        (pgm(COLOUR, 4095), "12 bits to 8: 256 levels"),
        (pgm(TWELVE, 4095), f"12 bits to 8: 256 of {len(np.unique(TWELVE))} levels"),
    ],
)
def test_low_bytes_do_not_go_uncounted(tmp_path: Path, data: bytes, loss: str) -> None:
    assert loss in stored(tmp_path, data).changes


def test_twelve_bits_that_say_so_keep_their_range(tmp_path: Path) -> None:
    """Pillow leaves them in the lowest sixteenth of 16 bits."""
    pairs = TWELVE.reshape(64, 32, 2).astype(np.uint32)
    high, low = pairs[..., 0], pairs[..., 1]
    three = np.stack([high >> 4, (high & 15) << 4 | low >> 8, low & 255], -1).astype(np.uint8)
    data = bytearray(images.tiff(three.reshape(64, 96)))
    for tag, value in ((256, 64), (258, 12)):
        at = data.rindex(tag.to_bytes(2, "little") + b"\4\0\1\0\0\0")
        data[at + 8 : at + 12] = value.to_bytes(4, "little")
    result = stored(tmp_path, bytes(data))
    assert f"12 bits to 8: 256 of {len(np.unique(TWELVE))} levels" in result.changes
    expected = np.round(TWELVE / 4095 * 255)
    np.testing.assert_array_equal(pixels_of(result)[..., 0], expected)


def test_white_is_zero_where_a_deep_tiff_says_so(tmp_path: Path) -> None:
    deep = random("u2", 64, 64)
    plain, turned = (stored(tmp_path, images.tiff(deep, photometric=p)) for p in (1, 0))
    np.testing.assert_array_equal(pixels_of(turned), 255 - pixels_of(plain))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (images.tiff(random("i2", 8, 8)), "TIFF of 16-bit signed numbers"),
        (images.tiff(random("i1", 8, 8)), "TIFF of 8-bit signed numbers"),
        (images.tiff(np.ones((8, 8), "f4")), "TIFF of 32-bit floating-point numbers"),
        (images.tiff(np.ones((8, 8), "f8")), "TIFF of 64-bit floating-point numbers"),
        (
            images.tiff(np.ones((8, 8, 3), "f4"), photometric=2),
            "TIFF of 3 bands of 32-bit floating-point numbers",
        ),
        (images.tiff(random("u4", 8, 8)), "32-bit pixels, which have no range"),
        (
            images.tiff(random("u1", 8, 8, 13), extra=(0,) * 12),
            "TIFF of 13 bands of 8-bit unsigned numbers",
        ),
        (
            images.tiff(random("u2", 8, 8, 13), extra=(0,) * 12, planes=True),
            "TIFF of 13 bands of 16-bit unsigned numbers, plane by plane",
        ),
        (
            images.tiff(random("u1", 8, 8, 4), photometric=2, extra=(0,), planes=True),
            "TIFF of 4 bands of 8-bit unsigned numbers, plane by plane",
        ),
        # Pillow opens these, and gives noise.
        (
            images.tiff(random("u2", 64, 64, 3), photometric=2, planes=True),
            "TIFF of 3 bands of 16-bit unsigned numbers, plane by plane",
        ),
        (images.tiff(random("u1", 8, 8, 3), photometric=8), "LAB colour"),
        (b"Pf\n8 8\n-1.0\n" + np.ones((8, 8), "<f4").tobytes(), "floating-point pixels"),
        (images.jpeg().replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "JPEG of 12 bits"),
    ],
)
def test_pixels_that_cannot_be_packed_are_named(tmp_path: Path, data: bytes, what: str) -> None:
    said = reason(tmp_path, data)
    assert said.startswith(what)
    assert "save it as" in said


@pytest.mark.parametrize("extra", [(0,), ()])
def test_near_infrared_is_dropped_and_said_not_taken_for_transparency(
    tmp_path: Path, extra: tuple[int, ...]
) -> None:
    pixels = random("u1", 32, 32, 4)
    result = stored(tmp_path, images.tiff(pixels, photometric=2, extra=extra))
    assert result.changes == ("further bands dropped: 3 of 4 kept",)
    np.testing.assert_array_equal(pixels_of(result), pixels[..., :3])


def test_transparency_that_is_named_is_laid_on_white(tmp_path: Path) -> None:
    pixels = random("u1", 32, 32, 4)
    result = stored(tmp_path, images.tiff(pixels, photometric=2, extra=(2,)))
    assert result.changes == ("transparency laid on white",)


def test_pages_that_are_not_packed_are_counted(tmp_path: Path) -> None:
    bands = [Image.fromarray(band) for band in random("u1", 13, 32, 32)]
    data = images.encoded(bands[0], "TIFF", save_all=True, append_images=bands[1:])
    assert stored(tmp_path, data).changes == ("first page only: 1 of 13", "grey to RGB")
    smaller = bands[1].resize((16, 16))
    smaller.encoderinfo = {"tiffinfo": {254: 1}}  # an overview: nothing that the page lacks
    data = images.encoded(bands[0], "TIFF", save_all=True, append_images=[smaller])
    assert getattr(Image.open(BytesIO(data)), "n_frames", 1) == 2
    assert stored(tmp_path, data).changes == ("grey to RGB",)


def test_the_manifest_says_what_each_file_lost(tmp_path: Path) -> None:
    deep = random("u2", 64, 64)
    files = {
        "a.png": images.deep_png(deep),
        "b.png": images.deep_png(TWELVE),
        "c.jpg": images.jpeg(),
    }
    report = packed(images.write_folder(tmp_path / "set", files), tmp_path / "x.beton")
    assert report.changes == {"16 bits to 8": 1, "grey to RGB": 1}
    assert [name for name, _ in report.left_out] == ["b.png"]
    manifest = json.loads((tmp_path / "x.beton.json").read_bytes())
    assert manifest["changed"]["16 bits to 8"] == {
        "count": 1,
        "first_1000": ["a.png"],
        "lost": {"a.png": f"256 of {len(np.unique(deep))} levels"},
    }
    assert manifest["settings"]["min_levels"] == 64
