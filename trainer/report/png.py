"""The figures of a run as PNG files, for slides and for pages elsewhere, drawn by matplotlib.

Where colour tells classes apart or right from wrong, a sign does too. Matplotlib's global state is
left alone.

Shape suffixes: R rows and K columns of a grid, S side of an image in pixels, N points.
"""

import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ConfigError
from common.files.atomic_file import write_atomically
from trainer.report.contents import Contents, title
from trainer.report.evaluations import Bar, names_of
from trainer.report.history import Metrics, curves, running_mean
from trainer.report.pictures import EmbeddingMap, Queries
from trainer.report.samples import Images, Views
from trainer.report.task import TaskPictures

log = logging.getLogger(__name__)

_MARKERS = "osD^v<>P*X"  # with the colours: 100 classes that differ
Part = Any
"""A figure of matplotlib's or a part of one."""


def write_figures(contents: Contents, out: Path) -> list[Path]:
    """Draw what there is of a run.

    ``curves.png``, ``accuracy.png``, ``views.png``, ``task.png``, ``neighbours.png``, ``map.png``,
    and ``overview.png`` with the best of them. Neighbours need labels; not every task has pictures.

    Returns:
        The files written, in ``out``, which is made if need be.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    pictures, queries = contents.pictures, contents.pictures.queries
    groups = len({bar.group for bar in contents.bars})
    drawings: dict[str, tuple[Callable[[Part, Any], None], Any, float, float]] = {
        "curves": (_curves, contents.history.metrics, 9.0, 11.0),
        "accuracy": (_accuracy, contents.bars, max(5.0, 1.5 + 3.0 * groups), 3.6),
        "views": (_views, pictures.views, 4.0, 8.0),
        "task": (_task, pictures.task, 4.0, 16.0),
        "neighbours": (_neighbours, queries if queries and queries.labelled else None, 10.0, 6.5),
        "map": (_maps, pictures.map, 10.1, 4.9),
        "overview": (_overview, contents, 10.0, 7.2),
    }
    drawings = {name: drawing for name, drawing in drawings.items() if drawing[1]}
    if len(drawings) == 1:
        log.warning("%s: nothing to draw yet", contents.run)
        return []
    out.mkdir(parents=True, exist_ok=True)
    return [_save(out / f"{name}.png", *drawing) for name, drawing in drawings.items()]


def _save(
    path: Path, draw: Callable[[Part, Any], None], found: Any, width: float, height: float
) -> Path:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "figures need matplotlib, which is not installed; run `pip install matplotlib`"
        ) from None
    encoded = io.BytesIO()
    figure = Figure((width, height), dpi=120, layout="constrained")
    draw(figure, found)
    figure.savefig(encoded, format="png", metadata={"Software": None})
    write_atomically(path, encoded.getvalue())
    return path


def _curves(figure: Part, metrics: Metrics) -> None:
    present = curves(metrics)
    for place, curve in enumerate(present, 1):
        _curve(figure.add_subplot(-(-len(present) // 2), 2, place), metrics, *curve)


def _curve(axes: Any, metrics: Metrics, column: str, label: str, factor: float) -> None:
    """Values against steps; where they are many, a faint line and its running mean."""
    known_N = np.isfinite(metrics[column])
    steps_N, values_N = metrics["step"][known_N], metrics[column][known_N] * factor
    if len(values_N) > 50:
        axes.plot(steps_N, values_N, color="C0", alpha=0.35, linewidth=0.8)
        axes.plot(steps_N, running_mean(values_N), color="C0")
    else:
        axes.plot(steps_N, values_N, color="C0", marker="o", markersize=4)
    axes.set_xlabel("step")
    axes.set_title(label, loc="left")


def _accuracy(figure: Part, bars: Sequence[Bar]) -> None:
    """Grouped bars in percent, each with its figure on top, over the level of guessing."""
    axes = figure.add_subplot()
    groups = list(dict.fromkeys(bar.group for bar in bars))
    names = names_of(bars)
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        mine = [bar for bar in bars if bar.name == name]
        places = [groups.index(bar.group) + (number - (len(names) - 1) / 2) * width for bar in mine]
        heights = [100 * bar.value for bar in mine]
        drawn = axes.bar(places, heights, width * 0.92, label=name)
        axes.bar_label(drawn, fmt="%.1f")
    chance = 100 * min(bar.chance for bar in bars)
    axes.axhline(chance, color="black", linewidth=1, linestyle=":", label="chance")
    axes.set_xticks(range(len(groups)), groups)
    axes.set(ylim=(0, 100), ylabel="Top-1 accuracy (%)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def _views(figure: Part, views: Views, rows: int | None = None) -> None:
    """A row per sample: the image, and the views that one step made of it."""
    images = np.concatenate([views.originals_RSS3[:, None], views.views_RVSS3], axis=1)
    _grid(figure.add_subplot(), images[:rows], "image, and its views")


def _task(figure: Part, task: TaskPictures) -> None:
    """A row per image: what the run's task makes of it; or per cluster."""
    heading = ", ".join(filter(None, task.titles)) or "images of a cluster in each row"
    _grid(figure.add_subplot(), task.images_NKSS3, heading)


def _grid(axes: Any, images_RKSS3: Images, heading: str) -> int:
    """A grid of images with white between them; returns the distance from one to the next."""
    rows, columns, side = images_RKSS3.shape[:3]
    gap = max(1, side // 12)
    pitch = side + gap
    padded = np.pad(images_RKSS3, [(0, 0), (0, 0), (0, gap), (0, gap), (0, 0)], constant_values=255)
    canvas = padded.swapaxes(1, 2).reshape(rows * pitch, columns * pitch, 3)
    axes.imshow(canvas[:-gap, :-gap], interpolation="nearest")
    axes.set_title(heading)
    axes.set_axis_off()
    return pitch


def _neighbours(figure: Part, queries: Queries) -> None:
    """Queries, and their nearest images by each measure; those of another class are crossed."""
    widths = [1, *(answer.labels_RK.shape[1] for answer in queries.answers)]
    first, *places = figure.subplots(1, len(widths), width_ratios=widths)
    _grid(first, queries.asked.images_NSS3[:, None], "query")
    for axes, answer in zip(places, queries.answers):
        agree_RK = queries.agree(answer)
        heading = f"{answer.title}: {100 * agree_RK.mean():.0f} % of its class"
        pitch = _grid(axes, answer.images_RKSS3, heading)
        y, x = (np.argwhere(~agree_RK) * pitch).T
        right = pitch * 0.75  # in the upper right corner, white on black: seen on any image
        for colour, width in (("black", 3.4), ("white", 1.8)):
            axes.scatter(x + right, y + pitch * 0.15, 50, colour, marker="x", linewidths=width)
    figure.supxlabel("nearest first; a cross marks a neighbour of another class", fontsize=9)


def _maps(figure: Part, found: EmbeddingMap) -> None:
    """The same images by each measure, coloured and shaped by class."""
    places: Sequence[Any] = figure.subplots(1, len(found.points), squeeze=False)[0]
    for axes, (heading, points_N2) in zip(places, found.points.items()):
        for label in np.unique(found.samples.labels_N):
            axes.scatter(
                *points_N2[found.samples.labels_N == label].T,
                s=16,
                color=f"C{label % 10}",
                marker=_MARKERS[(label % 10 + label // 10) % 10],
                label=found.samples.class_name(label),
            )
        axes.set(xticks=[], yticks=[], title=heading)
    handles, names = places[0].get_legend_handles_labels()
    if len(names) <= 20:
        figure.legend(handles, names, loc="outside right center", title="class")


def _overview(figure: Part, contents: Contents) -> None:
    """One picture of a run: what went in, how it went, what came out."""
    figure.suptitle(title(contents.settings), fontsize=13, fontweight="bold")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.0, 1.15])
    views, loss, bars = upper.subfigures(1, 3, width_ratios=[1.0, 1.3, 1.6])
    if contents.pictures.views:
        _views(views, contents.pictures.views, rows=4)
    if "loss" in contents.history.metrics:
        _curve(loss.add_subplot(), contents.history.metrics, *curves(contents.history.metrics)[0])
    if contents.bars:
        _accuracy(bars, contents.bars)
    if contents.pictures.map:
        _maps(lower, contents.pictures.map)
