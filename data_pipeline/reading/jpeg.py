"""JPEG files without decoding them to pixels: dimensions, segments, and are they sound?

FFCV's decoder writes garbage or stale pixels for a damaged JPEG and says nothing. What packing
passes through is therefore read to its last coefficient first, by that same decoder.
"""

import ctypes
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np

_SOI = b"\xff\xd8\xff"
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD8)})  # TEM, RST0-7: markers without a length
_NOT_FRAMES = frozenset({0xC4, 0xC8, 0xCC})  # DHT, JPG, DAC lie among the SOF markers
_DCT_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive; Huffman coded
_PROGRESSIVE = 0xC2
_SOS, _EOI = 0xDA, 0xD9


class JpegError(ValueError):
    """The bytes are not a JPEG whose header can be read."""


@dataclass(frozen=True)
class JpegHeader:
    """A JPEG's frame header (ITU-T T.81, B.2.2)."""

    height: int  # pixels
    width: int  # pixels
    components: int  # 1 grey, 3 colour, 4 CMYK or YCCK
    bits: int  # a channel
    common: bool  # 8 bits, Huffman coded DCT: what every decoder takes


def is_jpeg(data: bytes) -> bool:
    """Whether the bytes begin as a JPEG does; file names say little."""
    return data.startswith(_SOI)


def segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, first byte and end of the content of each segment, up to the first scan's header.

    Raises:
        JpegError: a segment is broken, or the file is no JPEG.
    """
    if not is_jpeg(data):
        raise JpegError("does not begin as a JPEG")
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            raise JpegError(f"no marker at byte {at}")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in _STANDALONE:
            at += 2
            continue
        if marker == _EOI:
            return
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if length < 2:
            raise JpegError(f"segment of {length} bytes at byte {at}")
        yield marker, at + 4, at + 2 + length
        if marker == _SOS:
            return
        at += 2 + length


def read_jpeg_header(data: bytes) -> JpegHeader:
    """The first frame header of a JPEG; reads no further.

    Raises:
        JpegError: there is none, or the segments before it are broken.
    """
    for marker, start, end in segments(data):
        if marker == _SOS:
            raise JpegError("image data before the frame header")
        if _is_frame(marker):
            return _parse_frame(marker, data[start:end])
    raise JpegError("ends before its frame header")


def several_scans(data: bytes) -> bool:
    """Whether a decoder has to hold all of a JPEG's coefficients, at whatever scale it decodes.

    So it is with progressive files, and those with one component a scan. True too where the header
    cannot be read.
    """
    components = 0
    try:
        for marker, start, _ in segments(data):
            if marker == _PROGRESSIVE:
                return True
            if _is_frame(marker):
                components = data[start + 5]
            elif marker == _SOS:
                return data[start] < components
    except (JpegError, IndexError):
        pass
    return True


def _is_frame(marker: int) -> bool:
    return 0xC0 <= marker <= 0xCF and marker not in _NOT_FRAMES


def _parse_frame(marker: int, segment: bytes) -> JpegHeader:
    if len(segment) < 6:
        raise JpegError("ends inside its frame header")
    bits, components = segment[0], segment[5]
    height = int.from_bytes(segment[1:3], "big")
    width = int.from_bytes(segment[3:5], "big")
    if not height or not width:
        raise JpegError(f"declares {width} x {height} pixels")
    common = bits == 8 and marker in _DCT_FRAMES
    return JpegHeader(height, width, components, bits, common)


def soundness_check() -> tuple[str, Callable[[bytes, JpegHeader], str | None]]:
    """The check that this machine can do: its name, and a function giving the problem or None.

    The function takes a JPEG with one or three components and its header. FFCV's libjpeg-turbo is
    the strictest, since every warning counts; Pillow, where FFCV is not built, does not pass on
    libjpeg's warnings and finds only what ends early.
    """
    turbo = _turbo_decoder()
    if turbo is not None:
        return "libjpeg-turbo", turbo
    return "Pillow", _pillow_problem


def turbo_problem(library: ctypes.CDLL, data: bytes, height: int, width: int) -> str | None:
    """What libjpeg-turbo has against a JPEG that is listed with these dimensions, or None.

    The picture has a decoder of its own: one that decoded others before would lend it their Huffman
    tables where it brings none, and the answer would depend on them.
    """
    handle = ctypes.c_void_p(library.tjInitDecompress())
    try:
        size = ctypes.c_ulong(len(data))
        header = [ctypes.c_int() for _ in range(4)]  # width, height, subsampling, colour space
        failed = library.tjDecompressHeader3(handle, data, size, *map(ctypes.byref, header))
        if not failed:
            own_width, own_height = header[0].value, header[1].value
            if (own_height, own_width) != (height, width):
                return f"its own header says {own_width} x {own_height} pixels"
            # To an eighth of its size: all entropy-coded data is read and the same warnings come,
            # but the inverse transform, most of the time, is spared.
            rows, columns = -(-height // 8), -(-width // 8)
            pixels = np.empty((rows, columns, 3), np.uint8)
            target = ctypes.c_void_p(pixels.ctypes.data)
            failed = library.tjDecompress2(handle, data, size, target, columns, 0, rows, 0, 0)
        if not failed:
            return None
        message: bytes = library.tjGetErrorStr2(handle) or b"cannot be decoded"
        return message.decode("ascii", "replace")
    finally:
        library.tjDestroy(handle)


def turbo_library(path: Path | str) -> ctypes.CDLL:
    """FFCV's binary, through which its libjpeg-turbo is called.

    Raises:
        OSError, AttributeError: it or a library that it links is not there, or another build.
    """
    library = ctypes.CDLL(str(path))
    library.tjInitDecompress.restype = ctypes.c_void_p
    library.tjGetErrorStr2.restype = ctypes.c_char_p
    library.tjGetErrorStr2.argtypes = library.tjDestroy.argtypes = (ctypes.c_void_p,)
    for name in ("tjDecompressHeader3", "tjDecompress2"):
        getattr(library, name).restype = ctypes.c_int
    return library


@cache
def _turbo_decoder() -> Callable[[bytes, JpegHeader], str | None] | None:
    spec = importlib.util.find_spec("ffcv")  # finds, does not import: FFCV's import takes seconds
    folders = spec.submodule_search_locations if spec else None
    paths = [path for folder in folders or () for path in Path(folder).glob("_libffcv*.so")]
    try:
        library = turbo_library(paths[0])
    except (IndexError, OSError, AttributeError):  # not built, or without its libraries
        return None
    return lambda data, header: turbo_problem(library, data, header.height, header.width)


def _pillow_problem(data: bytes, header: JpegHeader) -> str | None:
    from PIL import Image

    try:
        with Image.open(BytesIO(data)) as image:
            image.draft(None, (-(-header.width // 8), -(-header.height // 8)))
            image.load()
    except Exception as error:  # Pillow raises many kinds on hostile files
        return str(error) or type(error).__name__
    return None
