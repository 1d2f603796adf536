"""Images inside a page: as data URIs, in rows, on a sheet.

Shape suffixes: N images, R rows and K columns of a grid, V views, S side in pixels.
"""

import base64
import io
from collections.abc import Sequence

from PIL import Image

from trainer.report.figures import Images
from trainer.report.html import Html, tag
from trainer.report.looks import Queries, Views

_LOSSLESS_UP_TO = 48  # pixels: small images are shown pixel by pixel
_QUALITY = 82
SHEET_COLUMNS = 20


def data_uri(image_HW3: Images, most: int) -> str:
    """An image as WebP inside an address, its longer side at most ``most`` pixels."""
    image = Image.fromarray(image_HW3)
    image.thumbnail((most, most), Image.Resampling.LANCZOS)
    return _encoded(image, lossless=max(image_HW3.shape) <= _LOSSLESS_UP_TO)


def _encoded(image: Image.Image, *, lossless: bool = False) -> str:
    encoded = io.BytesIO()
    image.save(encoded, "WEBP", lossless=lossless, quality=100 if lossless else _QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(encoded.getvalue()).decode()}"


def picture(image_SS3: Images, alt: str, most: int) -> Html:
    """An image at most ``most`` pixels large."""
    small = image_SS3.shape[0] <= _LOSSLESS_UP_TO
    side = min(image_SS3.shape[0], most)
    return tag(
        "img",
        src=data_uri(image_SS3, most),
        alt=alt,
        width=side,
        height=side,
        class_="pixels" if small else None,
    )


def sheet(images_NSS3: Images, most: int) -> tuple[str, int]:
    """Many images on one, :data:`SHEET_COLUMNS` in a row; its address, and the side of a cell."""
    small = [Image.fromarray(image) for image in images_NSS3]
    for image in small:
        image.thumbnail((most, most), Image.Resampling.LANCZOS)
    side = max(small[0].size)
    rows = -(-len(small) // SHEET_COLUMNS)
    canvas = Image.new("RGB", (SHEET_COLUMNS * side, rows * side))
    for number, image in enumerate(small):
        row, column = divmod(number, SHEET_COLUMNS)
        canvas.paste(image, (column * side, row * side))
    return _encoded(canvas), side


def views_grid(views: Views) -> Html:
    """A row for each sample: the image, and the views that one step made of it."""
    rows = []
    for identity, original, made in zip(views.ids_R, views.originals_RSS3, views.views_RVSS3):
        cells = [picture(original, f"sample {identity}", 96)]
        cells += [
            picture(view, f"sample {identity}, view {number}", 96)
            for number, view in enumerate(made, 1)
        ]
        names = [f"sample {identity}", *(f"view {n}" for n in range(1, len(made) + 1))]
        rows.append(_row(cells, names, f"sample {identity} and its views"))
    return tag("div", rows, class_="rows")


def neighbours(queries: Queries) -> Html:
    """Queries, and under each the nearest images by each measure, nearest first."""
    groups = []
    for row, (image, label) in enumerate(zip(queries.images_RSS3, queries.labels_R)):
        asked = class_name(int(label), queries.class_names)
        lines: list[Html] = []
        for answer in queries.answers:
            cells, names = [], []
            for place, (found, its) in enumerate(
                zip(answer.images_RKSS3[row], answer.labels_RK[row]), 1
            ):
                name = class_name(int(its), queries.class_names)
                sign = ("✓ " if its == label else "✗ ") if queries.labelled else ""
                word = {"✓ ": ", the same class", "✗ ": ", another class"}.get(sign, "")
                cells.append(picture(found, f"neighbour {place}: {name}{word}", 64))
                names.append(f"{sign}{name}")
            lines.append(tag("p", answer.title, class_="measure"))
            lines.append(_row(cells, names, f"by {answer.title}"))
        query = tag(
            "figure",
            picture(image, f"query: {asked}", 64),
            tag("figcaption", "query: ", tag("bdi", asked)),
        )
        groups.append(tag("div", query, tag("div", lines), class_="query"))
    return tag("div", groups, class_="queries")


def agreement(queries: Queries) -> str:
    """How many neighbours are of their query's class, by each measure."""
    parts = []
    for answer in queries.answers:
        share = float((answer.labels_RK == queries.labels_R[:, None]).mean())
        parts.append(f"{answer.title} {100 * share:.0f} %")
    return ", ".join(parts)


def class_name(label: int, names: Sequence[str]) -> str:
    """A label in words."""
    if label < 0:
        return "no label"
    return names[label] if label < len(names) else f"class {label}"


def _row(cells: Sequence[Html], names: Sequence[str], label: str) -> Html:
    figures = [
        tag("figure", cell, tag("figcaption", tag("bdi", name)), class_=_tone(name))
        for cell, name in zip(cells, names)
    ]
    return tag("div", figures, class_="row", role="group", aria_label=label)


def _tone(name: str) -> str | None:
    return {"✓": "right", "✗": "wrong"}.get(name[:1])
