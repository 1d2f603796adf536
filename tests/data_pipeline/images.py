"""Images of every odd kind, made in memory: what folders of real photographs hold."""

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

ORIENTATION_TAG = 0x0112


def picture(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """A smooth colour image with a bright corner at the top left; uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = rng.uniform(1, 6, (3, 2))
    channels = [np.sin(a * x + b * y) * 60 + 100 for a, b in waves]
    pixels = np.stack(channels, -1)
    pixels[: height // 4, : width // 4] = 250
    return pixels.astype(np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    """The bytes of an image file."""
    out = BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()


def jpeg(height: int = 40, width: int = 60, seed: int = 0, **options: Any) -> bytes:
    return encoded(picture(height, width, seed), "JPEG", **{"quality": 90} | options)


def turned_jpeg(orientation: int, height: int = 200, width: int = 300) -> bytes:
    """A JPEG whose EXIF says how to turn it upright."""
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    return jpeg(height, width, exif=exif)


def xmp(orientation: int, form: bytes = b'tiff:Orientation="%d"') -> bytes:
    """An XMP packet that says how to turn an image upright."""
    return (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-'
        b'syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
        + form % orientation
        + b"/></rdf:RDF></x:xmpmeta>"
    )


def cmyk_jpeg() -> bytes:
    return encoded(Image.fromarray(picture(40, 60)).convert("CMYK"), "JPEG")


def garbled_jpeg() -> bytes:
    """A JPEG with noise in its coefficients: Pillow shows it, libjpeg warns of it."""
    data = bytearray(jpeg(120, 160, quality=95))
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(range(1, 201))
    return bytes(data)


def png(mode: str, height: int = 40, width: int = 60) -> bytes:
    rgb = Image.fromarray(picture(height, width))
    if mode == "I;16":
        deep = np.asarray(rgb.convert("L")).astype(np.uint16) * 257
        return encoded(Image.fromarray(deep), "PNG")
    return encoded(rgb.convert(mode), "PNG")


def deep_png(pixels: npt.NDArray[np.uint16]) -> bytes:
    """A PNG of 16 bits a channel: grey (H, W), RGB (H, W, 3) or RGBA (H, W, 4)."""
    kind = {1: 0, 3: 2, 4: 6}[pixels[0, 0].size]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, kind, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def tiff(
    pixels: np.ndarray, *, photometric: int = 1, extra: tuple[int, ...] = (), planes: bool = False
) -> bytes:
    """An uncompressed TIFF of any number of bands and of any numbers: (H, W) or (H, W, bands)."""
    height, width, *rest = pixels.shape
    bands = rest[0] if rest else 1
    if planes:
        pixels = pixels.transpose(2, 0, 1)
    data = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    strips = bands if planes else 1
    sizes = [len(data) // strips] * strips
    tags = {
        **{256: [width], 257: [height], 258: [8 * pixels.itemsize] * bands, 259: [1]},
        **{262: [photometric], 273: [8 + i * sizes[0] for i in range(strips)], 277: [bands]},
        **{278: [height], 279: sizes, 284: [2 if planes else 1], 338: list(extra)},
        339: [{"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]] * bands,
    }
    body, entries = bytearray(struct.pack("<2sHI", b"II", 42, 0) + data), b""
    for tag, values in tags.items():
        if not values:
            continue
        raw = struct.pack(f"<{len(values)}I", *values)
        if len(values) > 1:
            at = len(body)
            body += raw
            raw = struct.pack("<I", at)
        entries += struct.pack("<HHI", tag, 4, len(values)) + raw
    body[4:8] = struct.pack("<I", len(body))
    return bytes(body) + struct.pack("<H", len(entries) // 12) + entries + bytes(4)


def bomb_png() -> bytes:
    """A small file that declares 30000 x 30000 pixels."""
    data = bytearray(png("L"))
    data[16:24] = (30000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files, by path below the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def class_folders(folder: Path, classes: int = 3, images: int = 8) -> Path:
    """Class folders of JPEGs of various sizes."""
    files = {
        f"class {c}/{i:03d}.jpg": jpeg(30 + 3 * (i % 20), 90 - 2 * (i % 20), seed=c * 100 + i)
        for c in range(classes)
        for i in range(images)
    }
    return write_folder(folder, files)
