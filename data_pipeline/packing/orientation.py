"""Which way up an image is: one reader for every format, decoded or passed through."""

import re
from io import BytesIO

from PIL import Image

from data_pipeline.reading.jpeg import JpegError, segments

_TAG = 0x0112
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


def read_orientation(image: Image.Image) -> int:
    """The orientation that EXIF, TIFF's own tag or else XMP states, 1 (upright) to 8.

    1 too where it cannot be read. Ask before the pixels are loaded: see :func:`turn_to_do`.
    """
    try:
        exif = image.getexif()
        if _TAG not in exif and (stated := _XMP.search(image.info.get("xmp", b""))):
            exif[_TAG] = int(stated[1])  # Pillow, which turns TIFFs, reads but one way to write XMP
        orientation = exif.get(_TAG, 1)
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
