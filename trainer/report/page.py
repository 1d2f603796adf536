"""One self-contained page of one or more runs: no other file, no network."""

import base64
import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from common.files.atomic_file import as_utf8, write_atomically
from common.files.strict_json import dump_json
from trainer.report.charts import (
    PLOTLY,
    Chart,
    Line,
    accuracy_bars,
    line_chart,
    maps,
    phase_bars,
    short,
    similarity_histogram,
    themes,
)
from trainer.report.contents import Contents, differing, title
from trainer.report.evaluations import KINDS
from trainer.report.history import Events, History, accuracies, curves
from trainer.report.samples import Images
from trainer.state.run_data import section, stored_paths
from trainer.state.settings import changed, flat

_FOLDER = Path(__file__).parent
_STYLE = (_FOLDER / "page.css").read_text("utf-8")
_SCRIPT = (_FOLDER / "page.js").read_text("utf-8")
# What HTML does not allow even in escaped form, and halves of surrogate pairs.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
_LAST_STEPS = 0.02  # of a run: what a final value is the mean of
_LOSSLESS_UP_TO = 48  # pixels: small images are shown pixel by pixel
_SHEET_COLUMNS = 20


def content_security_policy(*, live: bool) -> str:
    """What a page may do: show its own images, use its own style and scripts, nothing else.

    A live one asks its server for Plotly and for news.
    """
    own = "'self'"
    rules = [
        "default-src 'none'",
        "img-src data: blob:",  # Plotly saves a chart as PNG by way of a blob
        "style-src 'unsafe-inline'",  # Plotly adds styles of its own
        f"script-src {_hash(_SCRIPT)} {own if live else _hash(PLOTLY[1])}",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    return "; ".join([*rules, f"connect-src {own}"] if live else rules)


def _hash(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def page(runs: Sequence[Contents], *, live_seconds: float = 0.0) -> str:
    """The page of a run, or of several compared. The same contents make the same text.

    A server keeps it up to date where it looks for news every ``live_seconds``; 0: it stands alone.
    """
    policy = content_security_policy(live=live_seconds > 0)
    return _PAGE.render(_values(runs), policy=policy, live=live_seconds)


def write_page(path: Path, content: str) -> None:
    """Write a page, whole or not at all; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, as_utf8(content))


def _values(runs: Sequence[Contents]) -> dict[str, Any]:
    """What ``page.html`` shows, by name; empty where no run has something for it."""
    several = len(runs) > 1
    facts = [dict(_facts(run)) for run in runs]
    lacks = dict.fromkeys(lack for run in runs for lack in run.missing)
    phases = {run.name: run.history.phases for run in runs if run.history.phases}
    return {
        "runs": runs,
        "names": [run.name for run in runs],
        "facts": [
            [name, *(column.get(name, "-") for column in facts)]
            for name in dict.fromkeys(name for column in facts for name in column)
        ],
        "curves": list(_curves(runs)),
        "phases": [phase_bars("phases", phases)] if phases else [],
        "accuracies": [
            accuracy_bars(
                f"accuracy-{number}",
                f"Top-1 accuracy, {run.name}" if several else "Top-1 accuracy",
                run.bars,
            )
            for number, run in enumerate(runs)
            if run.bars
        ],
        "measured": [
            [
                f"{run.name}: {each.file}" if several else each.file,
                *(each.method, each.of),
                ", ".join(f"{name} {value}" for name, value in each.figures),
            ]
            for run in runs
            for each in run.measured
        ],
        "similarities": [
            similarity_histogram("similarity", run.pictures.similarities)
            for run in runs
            if run.pictures.similarities
        ],
        "differing": [[name, *row] for name, row in differing([r.settings for r in runs]).items()],
        "settings": [_settings(run) for run in runs],
        "missing": [
            (", ".join(run.name for run in runs if lack in run.missing), *lack) for lack in lacks
        ],
    }


def _facts(run: Contents) -> Iterator[tuple[str, str]]:
    yield "state", run.state
    yield "recipe", title(run.settings)
    yield "data", ", ".join(map(str, stored_paths(run.settings, "train"))) or "-"
    if run.history.metrics:
        yield from _measures(run.history)
    for bar in run.bars:
        if bar.name == KINDS["run"]:
            yield f"{' '.join(bar.group.split())}, top-1", f"{100 * bar.value:.1f} %"
    versions = section(section(run.settings, "run"), "versions")
    code = [f"{name} {versions[name]}" for name in ("widebatch", "torch") if name in versions]
    if code:
        yield "made by", ", ".join(code)
    if versions.get("commit"):
        yield "commit", str(versions["commit"])


def _measures(history: History) -> Iterator[tuple[str, str]]:
    metrics, count = history.metrics, len(history.metrics["step"])
    tail = max(1, round(_LAST_STEPS * count))
    for name, words in (("loss", "loss"), *accuracies(metrics)):
        if name in metrics and np.isfinite(metrics[name][-tail:]).any():
            mean = float(np.nanmean(metrics[name][-tail:]))
            yield f"{words}, at the end", short(mean) if name == "loss" else f"{100 * mean:.1f} %"
    for column, words in (("knn_top1", "online kNN"), ("linear_top1", "online linear")):
        if column in metrics:
            known = metrics[column][np.isfinite(metrics[column])]
            yield f"{words}, last and best", f"{100 * known[-1]:.1f} %, {100 * known.max():.1f} %"
    if "images_per_second" in metrics:
        speed = float(np.nanmedian(metrics["images_per_second"]))
        yield "throughput, median", f"{short(speed)} images/s"
    events = history.events
    yield "steps left out", f"{len(events.skipped)}"
    yield "damaged samples replaced", f"{events.substitute_count}"


def _curves(runs: Sequence[Contents]) -> Iterator[Chart]:
    events = runs[0].history.events if len(runs) == 1 else Events()
    for column, heading, factor in curves(*(run.history.metrics for run in runs)):
        lines = [  # empty where a run has none, so that runs keep their colours
            Line(run.name, run.history.metrics["step"], run.history.metrics[column] * factor)
            if column in run.history.metrics
            else Line(run.name, np.zeros(0), np.zeros(0))
            for run in runs
        ]
        yield line_chart(f"curve-{column}", heading, lines, events)


def _settings(run: Contents) -> tuple[str, Any, list[list[str]] | None, list[tuple[str, str]]]:
    """Name, recipe, what differs from it (``None``: it is not here), and all settings."""
    changes = changed(run.settings)
    rows = None if changes is None else [[name, *pair] for name, pair in changes.items()]
    return run.name, run.settings.get("recipe"), rows, list(flat(run.settings).items())


def _data_uri(image_SS3: Images, most: int) -> str:
    """An image as WebP inside an address, its sides at most ``most`` pixels."""
    image = Image.fromarray(image_SS3)
    image.thumbnail((most, most), Image.Resampling.LANCZOS)
    return _encoded(image, lossless=max(image_SS3.shape) <= _LOSSLESS_UP_TO)


def _sheet(images_NSS3: Images, most: int) -> str:
    """The address of one image with many on it."""
    side = min(images_NSS3.shape[1], most)
    rows = -(-len(images_NSS3) // _SHEET_COLUMNS)
    canvas = Image.new("RGB", (_SHEET_COLUMNS * side, rows * side))
    for number, image in enumerate(images_NSS3):
        row, column = divmod(number, _SHEET_COLUMNS)
        small = Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS)
        canvas.paste(small, (column * side, row * side))
    return _encoded(canvas)


def _encoded(image: Image.Image, *, lossless: bool = False) -> str:
    encoded = io.BytesIO()
    image.save(encoded, "WEBP", lossless=lossless, quality=100 if lossless else 82, method=4)
    return f"data:image/webp;base64,{base64.b64encode(encoded.getvalue()).decode()}"


def _allowed(value: Any) -> Any:
    plain = isinstance(value, str) and not isinstance(value, Markup)
    return _FORBIDDEN.sub("\ufffd", value) if plain else value


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_FOLDER),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=_allowed,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.globals |= {
    "columns": _SHEET_COLUMNS,
    "data_uri": _data_uri,
    "maps": maps,
    "plotly": Markup(PLOTLY[1]),  # noqa: S704  # as it was installed
    "library": PLOTLY[0],
    "recipe_title": title,
    "script": Markup(_SCRIPT),  # noqa: S704
    "sheet": _sheet,
    "style": Markup(_STYLE),  # noqa: S704
    "themes": dump_json(themes()),
}
_PAGE = _TEMPLATES.get_template("page.html")
