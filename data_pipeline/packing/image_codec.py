"""One image of any kind -> what a .beton stores of it, or why it is left out.

What becomes of an image (tests hold each line):

=====================================  =============================================================
sound JPEG, grey or colour             its bytes as they are, unless it has to shrink or turn
larger than ``max_side``               shrunk (Lanczos), its longer side then ``max_side``
orientation of EXIF, TIFF or XMP       turned upright; FFCV's decoder does not look at it
grey, palette, bilevel, YCbCr          RGB
CMYK                                   RGB by Pillow's formula, no colour profile
transparent                            laid on white
16 bits per channel                    8 bits, scaled over the whole range; left out where fewer
                                       than ``min_levels`` levels remain
several frames, pages                  the first
more than three bands                  the first three, RGB, where a TIFF says that they are
JPEG data with errors                  left out (``keep_damaged``: what Pillow makes of it)
PNG with a wrong checksum              the same; formats without checksums hide wrong pixels
empty, truncated, not an image         left out
more than ``max_pixels`` to hold       left out, undecoded; JPEGs that shrink are decoded scaled
signed, 32-bit, floating-point pixels  left out: they have no range
bands and planes Pillow cannot read    left out, named
named pipe, device, broken link        left out, never waited for
=====================================  =============================================================

Pixels that are not passed through are stored raw where that is cheap (``auto``: at most
:data:`AUTO_RAW_PIXELS`), so small images lose nothing; else as JPEG.
"""

import contextlib
import dataclasses
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_pipeline.packing import image_file
from data_pipeline.reading.beton import JPEG_MODE, MAX_PIXELS, RAW_MODE
from data_pipeline.reading.jpeg import (
    JpegError,
    JpegHeader,
    is_jpeg,
    read_jpeg_header,
    several_scans,
    soundness_check,
)

AUTO_RAW_PIXELS = 128 * 128  # 48 KiB raw; above it a JPEG of quality 90 is several times smaller
MAX_FILE_BYTES = 1 << 30
_THUMBNAIL = 32  # pixels a side
NO_LABEL = -1
_NAMES = {
    **{"1": "grey", "L": "grey", "LA": "grey", "P": "palette", "PA": "palette"},
    **{"CMYK": "CMYK", "YCbCr": "YCbCr"},
}
_WHITE = (255, 255, 255, 255)

Format = Literal["auto", "jpeg", "raw"]
# A file's path, or its content, or uint8 pixels (H, W) or (H, W, 3).
ImageData = str | bytes | npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """How images are stored."""

    max_side: int = 0
    """Longer side in pixels to which larger images shrink; 0 keeps every size."""
    quality: int = 90
    """JPEG quality, 1 to 100, of images that are not passed through."""
    format: Format = "auto"
    """auto: JPEG files as they are, small images raw, others JPEG; jpeg or raw: all of them so."""
    max_pixels: int = MAX_PIXELS
    """Images of which more pixels would have to be held are left out unread."""
    upright: bool = True
    """Turn images by the orientation they state; off keeps pixels as they are stored."""
    min_levels: int = 64
    """Images of more than 8 bits of which fewer levels would remain, and not all, are left out."""
    clips: bool = False
    """Images are frames of clips: folders of them in the order of their numbers, or videos."""
    keep_damaged: bool = False
    """Keep what Pillow makes of JPEGs and PNGs with errors instead of leaving the image out."""


@dataclass(frozen=True)
class Stored:
    """An image as the file holds it."""

    mode: int  # JPEG_MODE or RAW_MODE
    height: int  # pixels
    width: int  # pixels
    payload: bytes
    digest: bytes  # SHA-256 of the payload
    fate: str  # "passed through", "encoded as JPEG" or "stored raw"
    changes: tuple[str, ...] = ()  # what was done to the pixels; behind ": " how much this one lost
    thumbnail: bytes = b""  # of frames: 32 x 32 grey, as motion is measured by


@dataclass(frozen=True)
class LeftOut:
    """An image that the file does not hold."""

    reason: str


class Sample(NamedTuple):
    """One image of a source, or why it cannot be had, and its label."""

    image: ImageData | LeftOut
    label: int
    """:data:`NO_LABEL` where there is none."""


class _UnusableError(ValueError):
    """Why an image is left out."""


class ImageCodec:
    """Turns images into what is stored. The same input gives the same bytes in every process."""

    def __init__(self, config: CodecConfig) -> None:
        self._config = config
        self._problem: Callable[[bytes, JpegHeader], str | None]
        self.checked_by, self._problem = soundness_check()

    def encode(self, image: ImageData) -> Stored | LeftOut:
        """What becomes of one image; never raises on its content."""
        try:
            stored = self._encode(image)
            if self._config.clips:
                stored = dataclasses.replace(stored, thumbnail=_thumbnail(stored))
            return stored
        except _UnusableError as error:
            return LeftOut(str(error))
        except MemoryError:
            return LeftOut("not enough memory to decode it")
        except OSError as error:
            return LeftOut(error.strerror or f"cannot be decoded: {error}")
        except Exception as error:
            # Pillow's parsers raise whatever kind they stumble over in a hostile file.
            return LeftOut(f"cannot be decoded: {type(error).__name__}: {error}")

    def _encode(self, image: ImageData) -> Stored:
        if isinstance(image, np.ndarray):
            return self._encode_pixels(image)
        data = image if isinstance(image, bytes) else _read_file(image)
        if not data:
            raise _UnusableError("empty file")
        if is_jpeg(data):
            return self._encode_jpeg(data)
        if damage := image_file.png_damage(data):
            return self._convert_damaged(data, f"PNG: {damage}")
        return self._convert(data, [])

    def _encode_pixels(self, pixels: npt.NDArray[np.uint8]) -> Stored:
        shape = pixels.shape
        if pixels.dtype != np.uint8 or len(shape) not in (2, 3) or shape[2:] not in ((), (3,)):
            raise _UnusableError(f"{pixels.dtype} pixels of shape {shape}; needs uint8 (H, W, 3)")
        if 0 in shape:
            raise _UnusableError("an image without pixels")
        self._check_size(shape[0], shape[1])
        return self._finish(Image.fromarray(np.ascontiguousarray(pixels)), [], turn=1)

    def _encode_jpeg(self, data: bytes) -> Stored:
        config = self._config
        try:
            header = read_jpeg_header(data)
        except JpegError as error:
            return self._convert_damaged(data, f"JPEG: {error}")
        if header.bits > 8:
            raise _UnusableError(f"JPEG of {header.bits} bits a channel: save it as 16-bit PNG")
        if not self._decodes_scaled(data):
            self._check_size(header.height, header.width)
        if not header.common or header.components not in (1, 3):
            return self._convert(data, [])  # CMYK, 12 bits, arithmetic coding: Pillow's to judge
        if damage := self._problem(data, header):
            return self._convert_damaged(data, f"JPEG: {damage}")
        longest = config.max_side or 0xFFFF
        fits = header.height * header.width <= MAX_PIXELS
        fits = fits and max(header.height, header.width) <= longest
        upright = not config.upright or image_file.jpeg_orientation(data) == 1
        if fits and upright and config.format != "raw":
            return _stored(JPEG_MODE, header.height, header.width, data, "passed through")
        return self._convert(data, [])

    def _convert_damaged(self, data: bytes, damage: str) -> Stored:
        if not self._config.keep_damaged:
            raise _UnusableError(f"damaged {damage}")
        return self._convert(data, ["kept though damaged"])

    def _convert(self, data: bytes, changes: list[str]) -> Stored:
        # JPEGs are opened at any size: what is held of them is checked when that is known.
        with _pillow_limit(None if is_jpeg(data) else self._config.max_pixels):
            try:
                image = Image.open(BytesIO(data))
            except Image.DecompressionBombError:
                raise self._too_many("far more pixels") from None
            except OSError as error:
                if image_file.is_cut_short(data):
                    raise _UnusableError("truncated") from None
                if isinstance(error, Image.UnidentifiedImageError):
                    raise _UnusableError(image_file.unidentified(data)) from None
                raise
            with image:
                if not self._decodes_scaled(data):
                    self._check_size(image.height, image.width)
                if reason := image_file.unusable(image):
                    raise _UnusableError(reason)
                changes += image_file.parts_lost(image, data)
                return self._decode(image, image_file.bits_per_channel(image, data), changes)

    def _decode(self, image: Image.Image, bits: int, changes: list[str]) -> Stored:
        if image.format in ("JPEG", "MPO") and self._config.max_side:
            # Twice the target leaves Lanczos its samples.
            scale = 2 * self._config.max_side / max(image.size)
            if scale < 1:
                least = [max(1, int(length * scale)) for length in image.size]
                image.draft(None, (least[0], least[1]))
            self._check_size(image.height, image.width)
        orientation = image_file.read_orientation(image)
        with _words_of_libtiff() if image.format == "TIFF" else contextlib.nullcontext():
            image.load()
        if orientation != 1 and self._config.upright:
            changes.append("turned upright")
        turn = image_file.turn_to_do(image, orientation, self._config.upright)
        if bits > 8:
            image = self._to_eight_bits(image, bits, changes)
        elif image_file.has_unnamed_band(image):
            image = image.convert("RGB")
        return self._finish(image, changes, turn)

    def _to_eight_bits(self, image: Image.Image, bits: int, changes: list[str]) -> Image.Image:
        if image.mode.startswith("I"):
            if "transparency" in image.info:
                changes.append("transparency dropped")
            image, had = image_file.scaled_to_eight(image, bits)
            kept = image_file.levels(image)
            share, lost = f"{kept} of {had} levels", kept < had
        else:  # of colour Pillow gives the high bytes alone
            if image_file.has_unnamed_band(image):
                image = image.convert("RGB")
            kept = image_file.levels(image)
            share, lost = f"{kept} levels", True
        if lost and kept < self._config.min_levels:
            raise _UnusableError(
                f"{bits}-bit pixels that would keep {share}, fewer than --min-levels "
                f"{self._config.min_levels}: scale them to the whole range of {bits} bits"
            )
        changes.append(f"{bits} bits to 8: {share}")
        return image

    def _decodes_scaled(self, data: bytes) -> bool:
        """Whether only the pixels that a smaller image needs have to be held."""
        return bool(self._config.max_side) and is_jpeg(data) and not several_scans(data)

    def _check_size(self, height: int, width: int) -> None:
        if height * width > self._config.max_pixels:
            raise self._too_many(f"{width} x {height} pixels: more")

    def _too_many(self, pixels: str) -> _UnusableError:
        return _UnusableError(
            f"{pixels} than --max-pixels {self._config.max_pixels}; raise it as far as memory "
            "allows, or let --max-side shrink JPEGs as they are read"
        )

    def _finish(self, image: Image.Image, changes: list[str], turn: int) -> Stored:
        rgb = _to_rgb(image, changes)
        side = self._config.max_side
        if side and max(rgb.size) > side:
            scale = side / max(rgb.size)
            size = (max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale)))
            rgb = rgb.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
            changes.append("shrunk")
        rgb = image_file.turned(rgb, turn)
        if rgb.height * rgb.width > MAX_PIXELS or max(rgb.size) > 0xFFFF:
            raise _UnusableError(
                f"{rgb.width} x {rgb.height} pixels are more than a .beton holds; set --max-side"
            )
        return self._store(rgb, tuple(changes))

    def _store(self, rgb: Image.Image, changes: tuple[str, ...]) -> Stored:
        small = rgb.width * rgb.height <= AUTO_RAW_PIXELS
        if self._config.format == "raw" or (self._config.format == "auto" and small):
            payload = rgb.tobytes()
            return _stored(RAW_MODE, rgb.height, rgb.width, payload, "stored raw", changes)
        out = BytesIO()
        # Only pixels: Pillow would carry a comment of the source over.
        rgb.save(out, "JPEG", quality=self._config.quality, comment=b"")
        payload = out.getvalue()
        return _stored(JPEG_MODE, rgb.height, rgb.width, payload, "encoded as JPEG", changes)


def _stored(
    mode: int, height: int, width: int, payload: bytes, fate: str, changes: tuple[str, ...] = ()
) -> Stored:
    digest = hashlib.sha256(payload).digest()
    return Stored(mode, height, width, payload, digest, fate, changes)


def _thumbnail(stored: Stored) -> bytes:
    size = stored.width, stored.height
    if stored.mode == RAW_MODE:
        image = Image.frombytes("RGB", size, stored.payload)
    else:
        image = Image.open(BytesIO(stored.payload))
        image.draft("L", (_THUMBNAIL, _THUMBNAIL))  # decodes an eighth of each side at least
    box = Image.Resampling.BOX
    return image.convert("L").resize((_THUMBNAIL, _THUMBNAIL), box).tobytes()


@contextlib.contextmanager
def _pillow_limit(pixels: int | None) -> Iterator[None]:
    """Lets Pillow open images of up to twice so many pixels, None: of any size."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@contextlib.contextmanager
def _words_of_libtiff() -> Iterator[None]:
    """Keep what libtiff writes to standard error off it, and give it as the reason of a failure."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        except OSError as error:
            said.seek(0)
            why = " ".join(said.read().decode(errors="replace").split())
            raise _UnusableError(f"damaged TIFF: {why or error}") from None
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _read_file(path: str) -> bytes:
    # Non-blocking: opening a named pipe would wait for a writer.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise _UnusableError("not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise _UnusableError(f"a file of more than {MAX_FILE_BYTES} bytes")
        return file.read(MAX_FILE_BYTES)


def _to_rgb(image: Image.Image, changes: list[str]) -> Image.Image:
    """An image of eight bits a channel as RGB; says in ``changes`` what that took."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if rgba.getextrema()[3][0] < 255:  # some pixel is not opaque
            changes.append("transparency laid on white")
            return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), rgba).convert("RGB")
        image = rgba if image.mode in ("RGB", "RGBA") else image
    if image.mode in _NAMES:
        changes.append(f"{_NAMES[image.mode]} to RGB")
    return image.convert("RGB")
