"""Pictures of a run, drawn from plain values: curves, bars, image grids, maps.

``draw_*`` functions fill given axes, so that a page or a slide can arrange them anew; the others
return a figure of their own. Nothing here reads a run: see :mod:`trainer.report`. Colours are Okabe
and Ito's and Paul Tol's, which people with any colour vision can tell apart; where colour says
right or wrong, a sign says it too.

Matplotlib is imported when something is drawn, and its global state (``pyplot``) is left alone.

Shape suffixes: R rows and K columns of a grid, S side of an image in pixels, N points.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError
from common.files.atomic_file import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Images = npt.NDArray[np.uint8]
Metrics = Mapping[str, npt.NDArray[np.float64]]
"""Columns of ``metrics.jsonl``, NaN where a step has no value."""

DPI = 120  # dots per inch
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8C8C8C"
_CLASS_COLOURS = (
    *("#332288", "#88CCEE", "#44AA99", "#117733", "#999933"),
    *("#DDCC77", "#CC6677", "#882255", "#AA4499", "#6E6E6E"),
)
_MARKERS = "osD^v<>P*X"  # with the colours: 100 classes that differ
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.facecolor": "white",
}


@dataclass(frozen=True)
class Bar:
    """One accuracy."""

    group: str
    """How it was measured; bars of a group stand together."""
    name: str
    """What was measured."""
    value: float
    """Fraction in [0, 1]."""
    rank: int = 0
    """Place among the names, the same in every group."""


@dataclass(frozen=True)
class Neighbours:
    """The nearest images of some queries, by one measure."""

    title: str
    images_RKSS3: Images  # noqa: N815
    agree_RK: npt.NDArray[np.bool_]  # noqa: N815
    """Whether a neighbour has its query's label."""


@contextmanager
def new_figure(width: float, height: float) -> Iterator["Figure"]:
    """An empty figure of so many inches, in the house style while the block lasts.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "figures need matplotlib, which is not installed; run `pip install matplotlib`"
        ) from None
    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def save_png(figure: "Figure", path: Path, *, max_colours: int | None = None) -> Path:
    """Write ``figure``, whole or not at all.

    Args:
        figure: what to write.
        path: the file; its folder is there.
        max_colours: store a palette of so many colours (at most 256): a third of the size.
    """
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", dpi=DPI, metadata={"Software": None})
    if max_colours is not None:
        from PIL import Image

        image = Image.open(encoded).convert("RGB")
        encoded = io.BytesIO()
        image.quantize(max_colours, dither=Image.Dither.NONE).save(encoded, "PNG", optimize=True)
    write_atomically(path, encoded.getvalue())
    return path


def curves(metrics: Metrics) -> "Figure":
    """Loss, learning rate, online kNN and throughput, of those that ``metrics`` has."""
    panels = [
        ("loss", "Loss (nats)", 1.0),
        ("knn_top1", "Online kNN, top-1 (%)", 100.0),
        ("lr", "Learning rate", 1.0),
        ("images_per_second", "Throughput (images/s)", 1.0),
        ("gradient_norm", "Gradient norm", 1.0),
        ("loader_wait_seconds", "Wait for data (ms per step)", 1000.0),
    ]
    present = [panel for panel in panels if panel[0] in metrics]
    rows = -(-len(present) // 2)
    with new_figure(9.0, 2.6 * rows) as figure:
        for place, (key, label, scale) in enumerate(present):
            axes = figure.add_subplot(rows, 2, place + 1)
            draw_curve(axes, metrics["step"], metrics[key] * scale, label)
    return figure


def draw_curve(
    axes: "Axes",
    steps_N: npt.NDArray[np.float64],
    values_N: npt.NDArray[np.float64],
    label: str,
    *,
    title: bool = True,
) -> None:
    """Values against steps; where they are many, a faint line and its running mean."""
    known, last = np.isfinite(values_N), float(steps_N.max())
    steps_N, values_N = steps_N[known], values_N[known]
    sparse = len(values_N) <= 50
    axes.plot(
        steps_N,
        values_N,
        color=BLUE,
        alpha=1.0 if sparse else 0.35,
        linewidth=1.6 if sparse else 0.8,
        marker="o" if sparse and len(values_N) <= 25 else "",
        markersize=4,
    )
    if not sparse:
        axes.plot(steps_N, running_mean(values_N), color=BLUE, linewidth=1.6)
    axes.set_xlim(0, last * 1.02)
    axes.set_xlabel("Step")
    if title:
        axes.set_title(label, loc="left")
    else:
        axes.set_ylabel(label)
    if len(values_N) and values_N.min() >= 0:
        axes.set_ylim(bottom=0 if values_N.min() < 0.5 * values_N.max() else None)


def running_mean(values_N: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Mean over a fiftieth of the run around each value, narrower at both ends."""
    half = max(1, len(values_N) // 100)
    sums = np.concatenate([[0.0], np.cumsum(values_N)])
    centre = np.arange(len(values_N))
    reach = np.minimum(half, np.minimum(centre, len(values_N) - 1 - centre))
    return (sums[centre + reach + 1] - sums[centre - reach]) / (2 * reach + 1)


def accuracy_bars(bars: Sequence[Bar], chance: float) -> "Figure":
    """Accuracies, grouped by how they were measured: see :func:`draw_bars`."""
    groups = len({bar.group for bar in bars})
    with new_figure(max(5.0, 1.5 + 3.0 * groups), 3.6) as figure:
        draw_bars(figure.add_subplot(), bars, chance)
    return figure


def draw_bars(axes: "Axes", bars: Sequence[Bar], chance: float) -> None:
    """Grouped bars in percent, each with its figure on top, over the level of guessing.

    Args:
        axes: where.
        bars: groups stand in the order in which they first occur, names by their rank; a name
            keeps its colour in every group.
        chance: accuracy of guessing, a fraction.
    """
    groups = list(dict.fromkeys(bar.group for bar in bars))
    names = list(dict.fromkeys(bar.name for bar in sorted(bars, key=lambda bar: bar.rank)))
    colours = dict(zip(names, [GREY, ORANGE, BLUE, GREEN, *_CLASS_COLOURS]))
    width = 0.8 / len(names)
    for name in names:
        mine = [bar for bar in bars if bar.name == name]
        x = [
            groups.index(bar.group) + (names.index(name) - (len(names) - 1) / 2) * width
            for bar in mine
        ]
        heights = [100 * bar.value for bar in mine]
        axes.bar(x, heights, width * 0.92, color=colours[name], label=name)
        for place, height in zip(x, heights):
            axes.text(place, height + 1, f"{height:.1f}", ha="center", va="bottom")
    axes.axhline(100 * chance, color="black", linewidth=1, linestyle=":")
    axes.text(
        *(1.01, 100 * chance, "chance"),
        transform=axes.get_yaxis_transform(),
        va="center",
        fontsize=8,
    )
    axes.set_xticks(range(len(groups)), groups)
    axes.grid(axis="x", visible=False)
    axes.set_ylim(0, 100)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylabel("Top-1 accuracy (%)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(names), handlelength=1.0)


def views_grid(originals_RSS3: Images, views_RVSS3: Images) -> "Figure":
    """A row per sample: the image, and the views that one step made of it."""
    rows, views, side = views_RVSS3.shape[:3]
    halves = 2 if rows >= 6 else 1
    per_half = -(-rows // halves)
    cells = np.concatenate([originals_RSS3[:, None], views_RVSS3], axis=1)
    titles = ["image", *[f"view {number + 1}" for number in range(views)]]
    inch = 1.05  # side of an image
    with new_figure(inch * halves * (views + 1.6), inch * per_half + 0.5) as figure:
        axes = figure.add_subplot()
        left = 0.0
        for first in range(0, rows, per_half):
            left = draw_images(axes, cells[first : first + per_half], titles, left=left)
            left += 0.5 * side
    return figure


def draw_images(
    axes: "Axes", images_RKSS3: Images, titles: Sequence[str] = (), *, left: float = 0.0
) -> float:
    """A grid of images with white between them, and a title over each column.

    Args:
        axes: its unit is an image's pixel; it may take several grids beside each other.
        images_RKSS3: the images.
        titles: one for each column, or one for all of them.
        left: where the grid begins.

    Returns:
        Where it ends.
    """
    rows, columns, side = images_RKSS3.shape[:3]
    pitch = _pitch(side)
    gap = pitch - side
    canvas = np.full((rows * pitch - gap, columns * pitch - gap, 3), 255, np.uint8)
    for row in range(rows):
        for column in range(columns):
            y, x = row * pitch, column * pitch
            canvas[y : y + side, x : x + side] = images_RKSS3[row, column]
    height, width = (float(length) for length in canvas.shape[:2])
    right = left + width
    axes.imshow(canvas, interpolation="nearest", extent=(left, right, height, 0.0))
    lowest = max(height, axes.get_ylim()[0]) if left else height
    axes.set(xlim=(0.0, right), ylim=(lowest, 0.0), aspect="equal")
    axes.set_axis_off()
    share = width / len(titles) if titles else 0.0
    for number, title in enumerate(titles):
        axes.text(left + (number + 0.5) * share, -gap, title, ha="center", va="bottom")
    return right


def _pitch(side: int) -> int:
    """Distance between the images of a grid, in their pixels."""
    return side + max(1, side // 12)


def neighbours(queries_RSS3: Images, measures: Sequence[Neighbours]) -> "Figure":
    """Queries, and beside them their nearest images by each measure, nearest first."""
    rows, side = queries_RSS3.shape[:2]
    columns = 1 + sum(measure.images_RKSS3.shape[1] for measure in measures)
    inch = 0.65  # side of an image
    with new_figure(inch * (columns + 1 + 0.5 * len(measures)), inch * rows + 1.0) as figure:
        axes = figure.add_subplot()
        right = draw_images(axes, queries_RSS3[:, None], ["query"])
        for measure in measures:
            right = draw_neighbours(axes, measure, left=right + 0.5 * side)
        figure.supxlabel("nearest first; a cross marks a neighbour of another class", fontsize=9)
    return figure


def draw_neighbours(axes: "Axes", measure: Neighbours, *, left: float = 0.0) -> float:
    """A row of nearest images per query, crossed where the label is another; returns its end."""
    images, agree_RK = measure.images_RKSS3, measure.agree_RK
    title = f"{measure.title}: {100 * agree_RK.mean():.0f} % of its class"
    right = draw_images(axes, images, [title], left=left)
    side = images.shape[2]
    for row, column in np.argwhere(~agree_RK):
        # In the upper right corner, white on black: seen on any image.
        x, y = left + column * _pitch(side) + 0.76 * side, row * _pitch(side) + 0.06 * side
        size = 0.18 * side
        for colour, width in (("black", 3.4), ("white", 1.8)):
            axes.plot([x, x + size], [y, y + size], color=colour, linewidth=width)
            axes.plot([x, x + size], [y + size, y], color=colour, linewidth=width)
    return right


def embedding_maps(
    maps: Mapping[str, npt.NDArray[np.float64]],
    labels_N: npt.NDArray[np.int64],
    class_names: Sequence[str],
) -> "Figure":
    """Two-dimensional maps (N, 2) of the same images side by side, coloured by class."""
    with new_figure(4.6 * len(maps) + 0.9, 4.9) as figure:
        _draw_maps(figure, maps, labels_N, class_names)
    return figure


def draw_map(
    axes: "Axes",
    points_N2: npt.NDArray[np.float64],
    labels_N: npt.NDArray[np.int64],
    class_names: Sequence[str],
) -> None:
    """Points coloured and shaped by class; both axes fill the room, for they have no unit."""
    for label in np.unique(labels_N):
        mine = labels_N == label
        name = class_names[label] if 0 <= label < len(class_names) else str(label)
        axes.scatter(
            points_N2[mine, 0],
            points_N2[mine, 1],
            s=16,
            linewidths=0.2,
            edgecolors="white",
            color=_CLASS_COLOURS[label % 10],
            marker=_MARKERS[(label % 10 + label // 10) % 10],
            label=name,
        )
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color("#BBBBBB")


@dataclass(frozen=True, kw_only=True)
class Overview:
    """What :func:`overview` shows; a part that is not there is left out."""

    title: str
    metrics: Metrics | None = None
    bars: Sequence[Bar] = ()
    chance: float = 0.0
    originals_RSS3: Images | None = None  # noqa: N815
    views_RVSS3: Images | None = None  # noqa: N815
    maps: Mapping[str, npt.NDArray[np.float64]] | None = None
    labels_N: npt.NDArray[np.int64] | None = None  # noqa: N815
    class_names: Sequence[str] = ()


def overview(parts: Overview) -> "Figure":
    """One picture of a run: what went in, how it went, what came out."""
    with new_figure(10.0, 7.2) as figure:
        figure.suptitle(parts.title, fontsize=13, fontweight="bold")
        halves: Any = figure.subfigures(2, 1, height_ratios=[1.0, 1.15])
        upper, lower = halves
        views, loss, bars = upper.subplots(1, 3, width_ratios=[1.25, 1.2, 1.55])
        if parts.originals_RSS3 is not None and parts.views_RVSS3 is not None:
            cells = np.concatenate([parts.originals_RSS3[:, None], parts.views_RVSS3], axis=1)
            draw_images(views, cells[:4], ["image", "view 1", "view 2"])
        else:
            views.set_axis_off()
        if parts.metrics is not None and "loss" in parts.metrics:
            draw_curve(loss, parts.metrics["step"], parts.metrics["loss"], "Loss (nats)")
        else:
            loss.set_axis_off()
        if parts.bars:
            draw_bars(bars, parts.bars, parts.chance)
        else:
            bars.set_axis_off()
        if parts.maps and parts.labels_N is not None:
            _draw_maps(lower, parts.maps, parts.labels_N, parts.class_names)
    return figure


def _draw_maps(
    figure: Any,  # a figure or a part of one
    maps: Mapping[str, npt.NDArray[np.float64]],
    labels_N: npt.NDArray[np.int64],
    class_names: Sequence[str],
) -> None:
    places = figure.subplots(1, len(maps), squeeze=False)[0]
    for axes, (title, points_N2) in zip(places, maps.items()):
        draw_map(axes, points_N2, labels_N, class_names)
        axes.set_title(title)
    handles, names = places[0].get_legend_handles_labels()
    if len(names) <= 20:
        figure.legend(handles, names, loc="outside right center", markerscale=1.8, title="class")
