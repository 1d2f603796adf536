"""What becomes of each kind of image, as the table in data_pipeline.packing.image_codec says."""

import os
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipeline.packing import image_codec
from data_pipeline.packing.image_codec import CodecConfig, ImageCodec, LeftOut, Stored
from data_pipeline.packing.image_file import jpeg_orientation
from data_pipeline.reading import jpeg as jpeg_module
from data_pipeline.reading.beton import JPEG_MODE, RAW_MODE
from tests.data_pipeline import images


def encode(tmp_path: Path, data: bytes, **settings: object) -> Stored | LeftOut:
    path = tmp_path / "image"
    path.write_bytes(data)
    return ImageCodec(CodecConfig(**settings)).encode(str(path))  # type: ignore[arg-type]


def stored(tmp_path: Path, data: bytes, **settings: object) -> Stored:
    result = encode(tmp_path, data, **settings)
    assert isinstance(result, Stored), result
    return result


def pixels_of(image: Stored) -> np.ndarray:
    if image.mode == RAW_MODE:
        return np.frombuffer(image.payload, np.uint8).reshape(image.height, image.width, 3)
    return np.asarray(Image.open(BytesIO(image.payload)).convert("RGB"))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_sound_jpeg_keeps_its_bytes(tmp_path: Path, options: dict[str, object]) -> None:
    data = images.jpeg(123, 77, **options)
    result = stored(tmp_path, data, max_side=123)
    assert (result.mode, result.height, result.width) == (JPEG_MODE, 123, 77)
    assert result.payload == data
    assert result.fate == "passed through"
    assert not result.changes


def test_a_grey_jpeg_keeps_its_bytes(tmp_path: Path) -> None:
    data = images.encoded(images.picture(50, 60)[..., 0], "JPEG")
    assert stored(tmp_path, data).payload == data


def test_a_jpeg_with_a_wrong_extension_and_trailing_bytes_keeps_its_bytes(tmp_path: Path) -> None:
    data = images.jpeg() + b"appended by a camera"
    assert stored(tmp_path, data).payload == data


def test_a_large_image_shrinks_to_max_side_and_keeps_its_shape(tmp_path: Path) -> None:
    result = stored(tmp_path, images.jpeg(300, 900), max_side=200)
    assert (result.height, result.width) == (67, 200)
    assert result.changes == ("shrunk",)
    whole = Image.fromarray(images.picture(300, 900)).resize((200, 67), Image.Resampling.LANCZOS)
    assert np.abs(pixels_of(result).astype(int) - np.asarray(whole)).mean() < 4


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("max_side", [0, 150])
def test_a_turned_jpeg_is_stored_upright(tmp_path: Path, orientation: int, max_side: int) -> None:
    data = images.turned_jpeg(orientation)
    result = stored(tmp_path, data, max_side=max_side)
    assert "turned upright" in result.changes
    upright = ImageOps.exif_transpose(Image.open(BytesIO(data)))
    if max_side:
        upright = upright.resize((result.width, result.height))
    assert pixels_of(result).shape == np.asarray(upright).shape
    assert np.abs(pixels_of(result).astype(int) - np.asarray(upright)).mean() < 6
    # What is stored says nothing of turning any more: no reader turns it twice.
    assert jpeg_orientation(result.payload) == 1


def test_orientation_can_be_left_as_stored(tmp_path: Path) -> None:
    data = images.turned_jpeg(6)
    assert stored(tmp_path, data, upright=False).payload == data


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[images.ORIENTATION_TAG] = orientation
    return exif


def _behind_64_kib(data: bytes) -> bytes:
    """The JPEG with a comment before its other segments."""
    filler = b"\xff\xfe" + (60_002).to_bytes(2, "big") + bytes(60_000)
    return data[:2] + 2 * filler + data[2:]


_STATED = {  # by file kind: how it says that it is turned
    "exif": lambda o: images.jpeg(200, 300, exif=_exif(o)),
    "exif behind 64 KiB": lambda o: _behind_64_kib(images.jpeg(200, 300, exif=_exif(o))),
    "xmp alone": lambda o: images.jpeg(200, 300, xmp=images.xmp(o)),
    "png": lambda o: images.encoded(images.picture(200, 300), "PNG", exif=_exif(o)),
    "webp": lambda o: images.encoded(images.picture(200, 300), "WEBP", exif=_exif(o)),
    "webp xmp": lambda o: images.encoded(images.picture(200, 300), "WEBP", xmp=images.xmp(o)),
    "xmp in single quotes": lambda o: images.jpeg(
        200, 300, xmp=images.xmp(o, b"tiff:Orientation = '%d'")
    ),
    "xmp element": lambda o: images.jpeg(
        200, 300, xmp=images.xmp(o, b"><tiff:Orientation>\n %d\n</tiff:Orientation")
    ),
    "tiff xmp": lambda o: images.encoded(
        images.picture(200, 300), "TIFF", tiffinfo={700: images.xmp(o, b"tiff:Orientation= '%d'")}
    ),
    "tiff": lambda o: images.encoded(
        images.picture(200, 300), "TIFF", tiffinfo={images.ORIENTATION_TAG: o}
    ),
    "tiff deflated": lambda o: images.encoded(
        images.picture(200, 300), "TIFF", tiffinfo={images.ORIENTATION_TAG: o}, compression="zip"
    ),
}


@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize("encoding", ["auto", "raw"])  # passed through where it may be, decoded
@pytest.mark.parametrize("kind", _STATED)
def test_every_file_is_turned_once_and_counted_or_left_as_stored(
    tmp_path: Path, kind: str, encoding: str, upright: bool
) -> None:
    for orientation in (2, 6, 8):
        data = _STATED[kind](orientation)
        result = stored(tmp_path, data, format=encoding, upright=upright)
        expected = Image.fromarray(images.picture(200, 300))
        if upright:
            expected.getexif()[images.ORIENTATION_TAG] = orientation
            expected = ImageOps.exif_transpose(expected)
        assert result.changes == (("turned upright",) if upright else ())
        pixels = pixels_of(result)
        assert pixels.shape == np.asarray(expected).shape
        assert np.abs(pixels.astype(int) - np.asarray(expected)).mean() < 6
        if "passed" in result.fate:
            assert result.payload == data


def test_broken_exif_means_upright(tmp_path: Path) -> None:
    data = images.turned_jpeg(6).replace(b"MM\0*", b"XX\0*").replace(b"II*\0", b"XX*\0")
    assert stored(tmp_path, data).payload == data


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    result = stored(tmp_path, images.cmyk_jpeg())
    assert result.changes == ("CMYK to RGB",)
    difference = np.abs(pixels_of(result).astype(int) - images.picture(40, 60))
    assert difference.mean() < 6


@pytest.mark.parametrize(
    ("mode", "change"),
    [("L", "grey to RGB"), ("P", "palette to RGB"), ("1", "grey to RGB"), ("RGB", None)],
)
def test_small_png_is_stored_without_loss(tmp_path: Path, mode: str, change: str | None) -> None:
    data = images.png(mode)
    result = stored(tmp_path, data)
    assert result.mode == RAW_MODE
    assert result.changes == ((change,) if change else ())
    np.testing.assert_array_equal(
        pixels_of(result), np.asarray(Image.open(BytesIO(data)).convert("RGB"))
    )


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    rgba = np.zeros((20, 20, 4), np.uint8)
    rgba[:10] = (200, 30, 40, 255)
    result = stored(tmp_path, images.encoded(rgba, "PNG"))
    assert result.changes == ("transparency laid on white",)
    assert (pixels_of(result)[:10] == (200, 30, 40)).all()
    assert (pixels_of(result)[10:] == 255).all()


def test_a_transparent_palette_colour_is_laid_on_white(tmp_path: Path) -> None:
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    result = stored(tmp_path, images.encoded(palette, "PNG", transparency=0))
    assert pixels_of(result).tolist() == [[[255, 255, 255], [40, 50, 60]]]


@pytest.mark.parametrize("kind", ["PNG", "PPM", "TIFF"])
def test_sixteen_bits_keep_their_range(tmp_path: Path, kind: str) -> None:
    grey = np.asarray(Image.fromarray(images.picture(40, 60)).convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    result = stored(tmp_path, images.encoded(deep, kind))
    levels = len(np.unique(grey))
    assert result.changes == (f"16 bits to 8: {levels} of {levels} levels", "grey to RGB")
    np.testing.assert_array_equal(pixels_of(result), np.repeat(grey[..., None], 3, -1))


def test_floating_point_pixels_are_left_out(tmp_path: Path) -> None:
    data = images.encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF")
    result = encode(tmp_path, data)
    assert isinstance(result, LeftOut)
    assert "32-bit" in result.reason


def test_only_the_first_frame_of_an_animation_is_stored(tmp_path: Path) -> None:
    frames = [Image.fromarray(images.picture(20, 20, seed)) for seed in range(3)]
    data = images.encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    result = stored(tmp_path, data)
    assert result.changes == ("first frame only: 1 of 3",)
    np.testing.assert_array_equal(pixels_of(result), np.asarray(frames[0]))


def test_large_pixels_become_jpeg_and_every_format_can_be_asked_for(tmp_path: Path) -> None:
    large, small = images.png("RGB", 200, 300), images.png("RGB")
    assert stored(tmp_path, large).mode == JPEG_MODE
    assert stored(tmp_path, large, format="raw").mode == RAW_MODE
    assert stored(tmp_path, small, format="jpeg").mode == JPEG_MODE
    photo = stored(tmp_path, images.jpeg(), format="raw")
    np.testing.assert_array_equal(pixels_of(photo), np.asarray(Image.open(BytesIO(images.jpeg()))))
    assert len(stored(tmp_path, large, quality=30).payload) < len(stored(tmp_path, large).payload)


def test_arrays_are_stored_without_loss(tmp_path: Path) -> None:
    codec = ImageCodec(CodecConfig())
    colour = images.picture(32, 32)
    result = codec.encode(colour)
    assert isinstance(result, Stored)
    np.testing.assert_array_equal(pixels_of(result), colour)
    result = codec.encode(colour[..., 0])
    assert isinstance(result, Stored)
    np.testing.assert_array_equal(pixels_of(result), np.repeat(colour[..., :1], 3, -1))


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4), np.float32), np.zeros((0, 4, 3), np.uint8)],
)
def test_arrays_that_are_no_images_are_left_out(array: np.ndarray) -> None:
    assert isinstance(ImageCodec(CodecConfig()).encode(array), LeftOut)


def _half(kind: str, **options: object) -> bytes:
    data = images.encoded(images.picture(200, 300), kind, **options)
    return data[: len(data) // 2]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"not an image at all", "not an image"),
        (images.jpeg()[:400], "damaged JPEG"),
        (images.jpeg()[: len(images.jpeg()) // 2], "damaged JPEG"),
        (images.jpeg()[:-2], "damaged JPEG"),
        (images.garbled_jpeg(), "damaged JPEG"),
        (b"\xff\xd8\xff\xe0" + bytes(100), "damaged JPEG"),
        (images.png("RGB", 200, 200)[:300], "damaged PNG: truncated"),
        (images.png("RGB", 200, 200)[:-12], "damaged PNG: truncated"),
        (_half("WEBP"), "truncated"),
        (_half("WEBP", lossless=True), "truncated"),
        (_half("TIFF", compression="tiff_lzw"), "truncated"),
        (_half("TIFF", compression="tiff_adobe_deflate"), "truncated"),
        (images.tiff(images.picture(40, 60))[:-50], "truncated"),
        (_half("TIFF"), "truncated"),
        (images.bomb_png(), "--max-pixels"),
    ],
)
def test_what_cannot_be_used_is_left_out_with_its_reason(
    tmp_path: Path, data: bytes, reason: str
) -> None:
    result = encode(tmp_path, data)
    assert isinstance(result, LeftOut)
    assert reason in result.reason
    assert "\n" not in result.reason


@pytest.mark.parametrize("mode", ["RGB", "P", "I;16"])
def test_one_flipped_bit_of_a_png_is_found_out(tmp_path: Path, mode: str) -> None:
    whole = images.png(mode, 200, 300)
    start, end = whole.index(b"IDAT") + 4, whole.rindex(b"IEND") - 8
    for at in np.linspace(start, end - 1, 20).astype(int):
        data = bytearray(whole)
        data[at] ^= 4
        refused = encode(tmp_path, bytes(data))
        assert isinstance(refused, LeftOut)
        assert refused.reason.startswith("damaged PNG: wrong checksum of IDAT at byte ")
    assert stored(tmp_path, whole + b"appended") == stored(tmp_path, whole)


def test_a_damaged_png_is_kept_when_asked(tmp_path: Path) -> None:
    data = bytearray(images.png("RGB"))
    data[data.rindex(b"IEND") - 8] ^= 1  # of the checksum of the pixels, which are sound
    assert isinstance(encode(tmp_path, bytes(data)), LeftOut)
    kept = stored(tmp_path, bytes(data), keep_damaged=True)
    assert kept.changes == ("kept though damaged",)
    np.testing.assert_array_equal(pixels_of(kept), images.picture(40, 60))


def test_what_libtiff_says_of_a_file_is_its_reason_and_not_on_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = bytearray(
        images.encoded(images.picture(200, 300), "TIFF", compression="tiff_adobe_deflate")
    )
    data[len(data) // 2] ^= 4
    refused = encode(tmp_path, bytes(data))
    assert isinstance(refused, LeftOut)
    assert refused.reason.startswith("damaged TIFF: ZIPDecode: Decoding error at scanline")
    assert capfd.readouterr().err == ""
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


def test_a_huge_jpeg_is_left_out_undecoded(tmp_path: Path) -> None:
    result = encode(tmp_path, images.jpeg(100, 101), max_pixels=10_000)
    assert isinstance(result, LeftOut)
    assert result.reason.startswith("101 x 100 pixels: more than --max-pixels 10000; raise it")


def test_a_huge_jpeg_that_shrinks_is_decoded_scaled(tmp_path: Path) -> None:
    """As large as 156 megapixels: what is held of it decides, not what it has."""
    data, settings = images.jpeg(400, 600), {"max_pixels": 300 * 200}
    result = stored(tmp_path, data, max_side=75, **settings)
    assert (result.height, result.width) == (50, 75)
    whole = Image.fromarray(images.picture(400, 600)).resize((75, 50), Image.Resampling.LANCZOS)
    assert np.abs(pixels_of(result).astype(int) - np.asarray(whole)).mean() < 6
    for left, side in ((data, 400), (images.jpeg(400, 600, progressive=True), 75)):
        refused = encode(tmp_path, left, max_side=side, **settings)
        assert isinstance(refused, LeftOut)
        assert "600 x 400 pixels: more than --max-pixels 60000" in refused.reason


def test_a_jpeg_beyond_what_pillow_opens_is_decoded_scaled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 100)
    assert stored(tmp_path, images.jpeg(400, 600), max_side=75).width == 75
    assert stored(tmp_path, images.png("RGB", 400, 600), max_side=75).width == 75
    assert Image.MAX_IMAGE_PIXELS == 100 * 100


def test_a_jpeg_that_no_beton_holds_is_not_passed_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_codec, "MAX_PIXELS", 100 * 100)
    refused = encode(tmp_path, images.jpeg(100, 101))
    assert refused == LeftOut("101 x 100 pixels are more than a .beton holds; set --max-side")


def test_a_jpeg_a_few_pixels_high_shrinks(tmp_path: Path) -> None:
    result = stored(tmp_path, images.jpeg(4, 4000), max_side=100)
    assert (result.height, result.width) == (1, 100)


def test_damaged_jpegs_are_kept_when_asked_as_sound_ones(tmp_path: Path) -> None:
    result = stored(tmp_path, images.garbled_jpeg(), keep_damaged=True)
    assert result.changes[0] == "kept though damaged"
    assert isinstance(encode(tmp_path, result.payload), Stored)
    # Half a picture is not what anybody made of it.
    assert isinstance(encode(tmp_path, images.jpeg()[:400], keep_damaged=True), LeftOut)


def test_what_is_no_regular_file_is_left_out_without_waiting(tmp_path: Path) -> None:
    codec = ImageCodec(CodecConfig())
    pipe, dangling = tmp_path / "pipe.jpg", tmp_path / "dangling.jpg"
    os.mkfifo(pipe)
    dangling.symlink_to("nowhere")
    assert codec.encode(str(pipe)) == LeftOut("not a regular file")
    assert codec.encode(str(dangling)) == LeftOut("No such file or directory")
    assert codec.encode("/dev/zero") == LeftOut("not a regular file")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("seed", range(6))
def test_no_damage_raises(tmp_path: Path, seed: int) -> None:
    """Every kind of file, cut or with bytes flipped, is stored or left out."""
    rng = np.random.default_rng(seed)
    sources = [
        images.jpeg(),
        images.turned_jpeg(3),
        images.cmyk_jpeg(),
        images.png("P"),
        images.png("I;16"),
        images.encoded(images.picture(20, 20), "TIFF"),
        images.encoded(images.picture(20, 20), "WEBP"),
        images.encoded(images.picture(20, 20), "BMP"),
    ]
    for source in sources:
        for _ in range(8):
            data = bytearray(source)
            for at in rng.integers(0, len(data), 4):
                data[at] = rng.integers(0, 256)
            data = data[: rng.integers(1, len(data) + 1)]
            assert isinstance(encode(tmp_path, bytes(data)), Stored | LeftOut)


def test_without_ffcv_pillow_checks_jpegs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jpeg_module, "_turbo_decoder", lambda: None)
    assert ImageCodec(CodecConfig()).checked_by == "Pillow"
    assert stored(tmp_path, images.jpeg()).fate == "passed through"
    assert isinstance(encode(tmp_path, images.jpeg()[:-200]), LeftOut)


def test_with_ffcv_its_own_decoder_checks_jpegs() -> None:
    assert ImageCodec(CodecConfig()).checked_by == "libjpeg-turbo"
