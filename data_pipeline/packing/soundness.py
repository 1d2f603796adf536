"""Is an image file whole, as far as its format lets tell?

:mod:`data_pipeline.reading.jpeg` asks of JPEGs. Formats without checksums (BMP, WebP, most TIFF)
can have wrong pixels that nobody finds; a PNG's are found here, since Pillow does not compare the
checksums of pixels.
"""

import struct
import zlib

_PNG = b"\x89PNG\r\n\x1a\n"
_TIFFS = {  # head -> where the first directory's place stands; formats of place, count, entry
    b"II*\0": (4, "<I", "<H", "<HHII"),
    b"MM\0*": (4, ">I", ">H", ">HHII"),
    b"II+\0": (8, "<Q", "<Q", "<HHQQ"),
    b"MM\0+": (8, ">Q", ">Q", ">HHQQ"),
}
_BYTES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}  # or 1


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
