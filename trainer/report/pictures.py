"""Images inside a page, as data URIs: one by one, and many on a sheet.

Shape suffixes: N images, S side in pixels.
"""

import base64
import io

from PIL import Image

from trainer.report.samples import Images

_LOSSLESS_UP_TO = 48  # pixels: small images are shown pixel by pixel
SHEET_COLUMNS = 20


def data_uri(image_SS3: Images, most: int) -> str:
    """An image as WebP inside an address, its sides at most ``most`` pixels."""
    image = Image.fromarray(image_SS3)
    image.thumbnail((most, most), Image.Resampling.LANCZOS)
    return _encoded(image, lossless=max(image_SS3.shape) <= _LOSSLESS_UP_TO)


def sheet(images_NSS3: Images, most: int) -> str:
    """The address of an image with many on it, :data:`SHEET_COLUMNS` in a row."""
    side = min(images_NSS3.shape[1], most)
    rows = -(-len(images_NSS3) // SHEET_COLUMNS)
    canvas = Image.new("RGB", (SHEET_COLUMNS * side, rows * side))
    for number, image in enumerate(images_NSS3):
        row, column = divmod(number, SHEET_COLUMNS)
        small = Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS)
        canvas.paste(small, (column * side, row * side))
    return _encoded(canvas)


def _encoded(image: Image.Image, *, lossless: bool = False) -> str:
    encoded = io.BytesIO()
    image.save(encoded, "WEBP", lossless=lossless, quality=100 if lossless else 82, method=4)
    return f"data:image/webp;base64,{base64.b64encode(encoded.getvalue()).decode()}"
