"""The figures of a run as PNG files, for slides and for pages elsewhere."""

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.report import figures
from trainer.report.contents import Contents
from trainer.report.figures import Neighbours, Overview
from trainer.report.settings import title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


def write_figures(contents: Contents, out: Path) -> list[Path]:
    """Draw what there is of a run.

    ``curves.png``, ``accuracy.png``, ``views.png``, ``neighbours.png``, ``map.png``, and
    ``overview.png`` with the best of them. Neighbours and map need labels.

    Args:
        contents: of the run.
        out: folder for the figures; made if need be.

    Returns:
        The files written.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    out.mkdir(parents=True, exist_ok=True)
    folder = _Folder(out, Overview(title=title(contents.settings)))
    if contents.history is not None:
        metrics = contents.history.metrics
        folder.save(figures.curves(metrics), "curves", metrics=metrics)
    if contents.bars:
        bars, chance = contents.bars, contents.chance
        folder.save(figures.accuracy_bars(bars, chance), "accuracy", bars=bars, chance=chance)
    _draw_looks(contents, folder)
    if folder.written:
        path = out / "overview.png"
        figure = figures.overview(folder.overview)
        folder.written.append(figures.save_png(figure, path, max_colours=256))
    else:
        log.warning("%s: nothing to draw yet", contents.run)
    return folder.written


class _Folder:
    """Where the figures go; what is in them goes into the overview too."""

    def __init__(self, out: Path, overview: Overview) -> None:
        self.out, self.overview = out, overview
        self.written: list[Path] = []

    def save(self, figure: "Figure", name: str, **parts: Any) -> None:
        self.written.append(figures.save_png(figure, self.out / f"{name}.png"))
        self.overview = dataclasses.replace(self.overview, **parts)


def _draw_looks(contents: Contents, folder: _Folder) -> None:
    views, queries, places = contents.looks.views, contents.looks.queries, contents.looks.map
    if views is not None:
        images = {"originals_RSS3": views.originals_RSS3, "views_RVSS3": views.views_RVSS3}
        folder.save(figures.views_grid(*images.values()), "views", **images)
    if queries is not None and queries.labelled:
        measures = [
            Neighbours(a.title, a.images_RKSS3, a.labels_RK == queries.labels_R[:, None])
            for a in queries.answers
        ]
        folder.save(figures.neighbours(queries.images_RSS3, measures), "neighbours")
    if places is not None:
        labels_N, names = places.labels_N, places.class_names
        figure = figures.embedding_maps(places.points, labels_N, names)
        parts = {"maps": places.points, "labels_N": labels_N, "class_names": names}
        folder.save(figure, "map", **parts)
