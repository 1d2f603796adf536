"""The map of embeddings as inline SVG, with the images for its pointer and its slider.

Shape suffixes: N points.
"""

import numpy as np
import numpy.typing as npt

from common.files.strict_json import dump_json
from trainer.report.html import Html, tag
from trainer.report.looks import EmbeddingMap
from trainer.report.pictures import SHEET_COLUMNS, class_name, sheet

_SIDE, _RIM = 360.0, 10.0
_THUMBNAIL = 48  # pixels
_COLOURS = 10  # classes k0 ... of the style sheet
_MOST_NAMED = 30  # classes in the legend
# Around the point, about 8 units wide: with the colours, 100 classes differ.
_SHAPES = (
    "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "m-3.5 -3.5h7v7h-7z",
    "m0 -4.8l4.8 4.8l-4.8 4.8l-4.8 -4.8z",
    "m0 -4.6l4.6 8h-9.2z",
    "m0 4.6l4.6 -8h-9.2z",
    "m-4.6 0l8 -4.6v9.2z",
    "m4.6 0l-8 -4.6v9.2z",
    "m-1.5 -4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "m-4.2 -4.2l4.2 2.2l4.2 -2.2l-2.2 4.2l2.2 4.2l-4.2 -2.2l-4.2 2.2l2.2 -4.2z",
    "m0 -5l1.5 3.4l3.6 .3l-2.8 2.4l.9 3.6l-3.2 -2l-3.2 2l.9 -3.6l-2.8 -2.4l3.6 -.3z",
)


def embedding_map(identity: str, found: EmbeddingMap) -> Html:
    """A map for each measure side by side, what the points are, and all their images.

    Args:
        identity: of the element, unique on its page.
        found: the points; those of one class follow each other on the slider.
    """
    order_N = np.lexsort((found.ids_N, found.labels_N))
    labels_N = found.labels_N[order_N]
    names = [class_name(int(label), found.class_names) for label in labels_N]
    uri, side = sheet(found.images_NSS3[order_N], _THUMBNAIL)
    maps = [
        tag(
            "figure",
            tag("figcaption", tag("h3", title)),
            tag("div", _svg(title, points[order_N], labels_N), class_="plot"),
            class_="map",
        )
        for title, points in found.points.items()
    ]
    facts = {
        "columns": SHEET_COLUMNS,
        "side": side,
        "texts": [f"{n}, sample {i}" for n, i in zip(names, found.ids_N[order_N])],
        "points": [_placed(points[order_N]).round(1).tolist() for points in found.points.values()],
    }
    every = tag(
        "img",
        src=uri,
        alt=f"the {len(names)} images of the map, sorted by class",
        class_="sheet pixels" if side <= _THUMBNAIL // 2 else "sheet",
    )
    return tag(
        "div",
        tag("div", maps, class_="maps"),
        _classes(labels_N, found),
        tag("details", tag("summary", "All images of the map, sorted by class"), every),
        class_="embedding",
        id=identity,
        data_facts=dump_json(facts, separators=(",", ":")),
    )


def _placed(points_N2: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Points in the units of the SVG; both axes fill the room, for they have no unit."""
    low, high = points_N2.min(axis=0), points_N2.max(axis=0)
    spread = np.where(high > low, high - low, 1.0)
    return _RIM + (points_N2 - low) / spread * (_SIDE - 2 * _RIM)


def _svg(title: str, points_N2: npt.NDArray[np.float64], labels_N: npt.NDArray[np.int64]) -> Html:
    groups, placed_N2 = [], _placed(points_N2)
    for label in np.unique(labels_N):
        places = placed_N2[labels_N == label]
        d = "".join(f"M{x:.1f} {y:.1f}{_shape(int(label))}" for x, y in places)
        groups.append(tag("path", d=d, class_=f"point k{label % _COLOURS}"))
    return tag(
        "svg",
        groups,
        viewBox=f"0 0 {_SIDE:g} {_SIDE:g}",
        role="img",
        aria_label=f"Map of {len(points_N2)} images by {title}: alike images lie together",
    )


def _shape(label: int) -> str:
    return _SHAPES[(label % _COLOURS + label // _COLOURS) % len(_SHAPES)]


def _classes(labels_N: npt.NDArray[np.int64], found: EmbeddingMap) -> Html | None:
    labels = [int(label) for label in np.unique(labels_N)]
    if len(labels) > _MOST_NAMED or labels == [-1]:
        return None
    items = []
    for label in labels:
        mark = tag("path", d=f"M6 6{_shape(label)}", class_=f"point k{label % _COLOURS}")
        sample = tag("svg", mark, viewBox="0 0 12 12", class_="swatch", aria_hidden="true")
        items.append(tag("li", sample, " ", tag("bdi", class_name(label, found.class_names))))
    return tag("ul", items, class_="legend", aria_label="classes")
