"""What an image's file says beside its pixels: is it whole, which way up is it, how deep?

Soundness as far as a format lets tell: :mod:`data_pipeline.reading.jpeg` asks of JPEGs; a PNG's
damage is found here, since Pillow does not compare the checksums of pixels; formats without any
(BMP, WebP, most TIFF) can have wrong pixels that nobody finds.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin

from data_pipeline.reading.jpeg import JpegError, segments

_PNG = b"\x89PNG\r\n\x1a\n"
_TIFFS = {  # head -> where the first directory's place stands; formats of place, count, entry
    b"II*\0": (4, "<I", "<H", "<HHII"),
    b"MM\0*": (4, ">I", ">H", ">HHII"),
    b"II+\0": (8, "<Q", "<Q", "<HHQQ"),
    b"MM\0+": (8, ">Q", ">Q", ">HHQQ"),
}
_BYTES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}  # or 1
_ORIENTATION = 0x0112
_APP1 = 0xE1
_XMP = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([1-8])\b""")
_TRANSPOSES = {  # what turns an image of each EXIF orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BACK = {6: 8, 8: 6}  # the others undo themselves
_BITS, _PHOTOMETRIC, _SAMPLES, _PLANAR, _EXTRA, _FORMAT = 258, 262, 277, 284, 338, 339  # TIFF tags
_SUBFILE, _NOT_A_PAGE = 254, 0b101  # a smaller copy, a mask
_NUMBERS = {1: "unsigned", 2: "signed", 3: "floating-point"}
_IHDR, _IHDR_BITS = b"IHDR", 12  # behind width and height
_JPEG2000_HEAD, _JPEG2000_BITS = b"\xff\x4f\xff\x51", 42  # SOC and SIZ; place of the first Ssiz
_REMEDY = "save it as grey or RGB of 8 or 16 unsigned bits"


# --- whole? ---------------------------------------------------------------------------------------


def png_damage(data: bytes) -> str | None:
    """What is wrong with a PNG up to its end chunk, whatever follows; None also for other files."""
    if not data.startswith(_PNG):
        return None
    at, content = len(_PNG), memoryview(data)
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(content[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        if end + 4 > len(data):
            break
        if zlib.crc32(content[at + 4 : end]) != int.from_bytes(content[end : end + 4], "big"):
            return f"wrong checksum of {kind.decode('ascii', 'backslashreplace')} at byte {at}"
        if kind == b"IEND":
            return None
        at = end + 4
    return "truncated"


def is_cut_short(data: bytes) -> bool:
    """Whether a WebP is shorter than it says, or lacks what the first directory of a TIFF names."""
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if (layout := _TIFFS.get(data[:4])) is None:
        return False
    at, place, count, entry = layout
    try:
        (first,) = struct.unpack_from(place, data, at)
        (entries,) = struct.unpack_from(count, data, first)
        for number in range(entries):
            at = first + struct.calcsize(count) + number * struct.calcsize(entry)
            _, kind, values, value = struct.unpack_from(entry, data, at)
            size = values * _BYTES.get(kind, 1)
            if size > struct.calcsize(place) and value + size > len(data):
                return True
    except (struct.error, OverflowError):
        return True
    return False


# --- which way up? --------------------------------------------------------------------------------


def read_orientation(image: Image.Image) -> int:
    """The orientation that EXIF, TIFF's own tag or else XMP states, 1 (upright) to 8.

    1 too where it cannot be read. Ask before the pixels are loaded: see :func:`turn_to_do`.
    """
    try:
        exif = image.getexif()
        if _ORIENTATION not in exif and (stated := _XMP.search(image.info.get("xmp", b""))):
            # Pillow, which turns TIFFs, reads but one way to write XMP.
            exif[_ORIENTATION] = int(stated[1])
        orientation = exif.get(_ORIENTATION, 1)
    except Exception:  # EXIF is free-form and often broken; Pillow raises whatever its parser meets
        return 1
    return orientation if orientation in _TRANSPOSES else 1


def jpeg_orientation(data: bytes) -> int:
    """:func:`read_orientation` of a JPEG; the many without EXIF and XMP are not opened for it."""
    try:
        if all(marker != _APP1 for marker, _, _ in segments(data)):
            return 1
        with Image.open(BytesIO(data)) as image:
            return read_orientation(image)
    except (JpegError, OSError):
        return 1


def turn_to_do(image: Image.Image, orientation: int, upright: bool) -> int:
    """The orientation by which the loaded pixels are still to be turned with :func:`turned`.

    Pillow turns TIFF files by itself when it loads them, and no others.
    """
    if image.format == "TIFF":
        return 1 if upright else _BACK.get(orientation, orientation)
    return orientation if upright else 1


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """The image turned upright, which is stored in this orientation."""
    return image if orientation == 1 else image.transpose(_TRANSPOSES[orientation])


# --- pixels that one or three bands of eight bits do not hold -------------------------------------


def unidentified(data: bytes) -> str:
    """What a file is that Pillow does not know."""
    first = next(_directories(data), None)
    return "not an image" if first is None else f"{_described(first)}: {_REMEDY}"


def unusable(image: Image.Image) -> str | None:
    """Why an opened image has no pixels of ours, or None."""
    if image.format == "TIFF":
        tags = _tags(image)
        several, deep = tags.get(_SAMPLES, 1) > 1, max(tags.get(_BITS, (1,))) > 8
        # Pillow takes signed for unsigned, and reads planes of 16 bits as if they had 8.
        if set(tags.get(_FORMAT, (1,))) & {2, 3} or (
            several and deep and tags.get(_PLANAR, 1) == 2
        ):
            return f"{_described(tags)}: {_REMEDY}"
    if image.mode == "F":
        return f"floating-point pixels, which have no range: {_REMEDY}"
    if image.mode == "I" and image.format not in ("PPM", "PNG"):
        return f"32-bit pixels, which have no range: {_REMEDY}"
    if image.mode in ("LAB", "HSV"):
        return f"{image.mode} colour: {_REMEDY}"
    return None


def bits_per_channel(image: Image.Image, data: bytes) -> int:
    """What the file has, whatever Pillow makes of it; ask before the pixels are loaded."""
    if image.format == "TIFF":
        return int(max(_tags(image).get(_BITS, (1,))))
    if image.format == "PNG":
        return data[data.find(_IHDR) + _IHDR_BITS]
    if image.format == "PPM":
        how: Any = image.tile[0].args
        most = how[-1] if isinstance(how, tuple) else 0
        return max(8, most.bit_length()) if isinstance(most, int) and most > 0 else _by_mode(image)
    if image.format == "JPEG2000" and (head := data.find(_JPEG2000_HEAD)) >= 0:
        return (data[head + _JPEG2000_BITS] & 0x7F) + 1
    if image.format == "SGI":
        return 8 * data[3]
    return _by_mode(image)


def parts_lost(image: Image.Image, data: bytes) -> list[str]:
    """What of a file with several images or many bands is not packed."""
    lost = []
    if image.format == "TIFF":
        tags, bands = _tags(image), 3 if has_unnamed_band(image) else len(image.getbands())
        if tags.get(_SAMPLES, 1) > bands:
            lost.append(f"further bands dropped: {bands} of {tags[_SAMPLES]} kept")
        pages = sum(not tags.get(_SUBFILE, 0) & _NOT_A_PAGE for tags in _directories(data))
        if pages > 1:
            lost.append(f"first page only: 1 of {pages}")
    # A JPEG's further frames (MPO) are thumbnails and depth maps: nobody misses them.
    elif image.format not in ("JPEG", "MPO") and (frames := getattr(image, "n_frames", 1)) > 1:
        lost.append(f"first frame only: 1 of {frames}")
    return lost


def has_unnamed_band(image: Image.Image) -> bool:
    """Whether Pillow takes a TIFF's fourth band for transparency, which it does not say it is."""
    return image.format == "TIFF" and image.mode == "RGBA" and not _tags(image).get(_EXTRA)


def scaled_to_eight(image: Image.Image, bits: int) -> tuple[Image.Image, int]:
    """A deep grey image over the whole range of eight bits, and how many levels it had."""
    deep_HW = np.asarray(image)
    # Pillow scales what other formats have to 16 bits.
    top = (1 << bits) - 1 if image.format == "TIFF" else 0xFFFF
    grey = ((np.arange(top + 1) * 255 + top // 2) // top).astype(np.uint8)
    if image.format == "TIFF" and _tags(image).get(_PHOTOMETRIC) == 0:  # white is zero
        grey = grey[::-1]
    there = np.zeros(top + 1, bool)
    grey_HW: npt.NDArray[np.uint8] = np.empty(deep_HW.shape, np.uint8)
    for deep_W, grey_W in zip(deep_HW, grey_HW):  # by rows: an index takes eight bytes a pixel
        there[deep_W] = True
        grey_W[:] = grey[deep_W]
    return Image.fromarray(grey_HW), int(there.sum())


def levels(image: Image.Image) -> int:
    """Levels that occur in the colour band of most levels; of an image of eight bits."""
    counts = np.array(image.histogram()).reshape(-1, 256)
    colours = [counts_L for band, counts_L in zip(image.getbands(), counts) if band != "A"]
    return max(int((counts_L > 0).sum()) for counts_L in colours)


def _by_mode(image: Image.Image) -> int:
    return 16 if image.mode.startswith("I") else 8


def _tags(image: Image.Image) -> Any:
    return image.tag_v2


def _described(tags: Any) -> str:
    bands, bits = tags.get(_SAMPLES, 1), max(tags.get(_BITS, (1,)))
    numbers = _NUMBERS.get(max(tags.get(_FORMAT, (1,))), "unknown")
    planes = ", plane by plane" if bands > 1 and tags.get(_PLANAR, 1) == 2 else ""
    several = f"{bands} bands of " if bands > 1 else ""
    return f"TIFF of {several}{bits}-bit {numbers} numbers{planes}"


def _directories(data: bytes) -> Iterator[Any]:
    """The tags of each page of a TIFF; Pillow gives none of a page that it cannot read."""
    if data[:4] not in _TIFFS:
        return
    file, seen = BytesIO(data), set()
    tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(16 if 43 in data[2:4] else 8))
    while tags.next and tags.next not in seen:
        seen.add(tags.next)
        file.seek(tags.next)
        tags.load(file)
        yield tags
