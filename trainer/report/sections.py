"""The parts of a page, each from the contents of the runs; a part that no run has is left out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.report import bars, pictures
from trainer.report.charts import Line, Mark, legend, line_chart
from trainer.report.contents import Contents
from trainer.report.evaluations import KINDS
from trainer.report.history import History
from trainer.report.html import Html, join, tag
from trainer.report.scatter import embedding_map
from trainer.report.settings import section, title
from trainer.report.tables import scroll, settings_tables
from trainer.report.ticks import short

_CURVES = (  # column of metrics.jsonl, what it is, unit, factor
    ("loss", "Loss", "nats", 1.0),
    ("contrastive_top1", "Contrastive top-1", "%", 100.0),
    ("knn_top1", "Online kNN, top-1", "%", 100.0),
    ("lr", "Learning rate", "", 1.0),
    ("images_per_second", "Throughput", "images/s", 1.0),
    ("gradient_norm", "Gradient norm", "", 1.0),
    ("loader_wait_seconds", "Wait for data", "ms a step", 1000.0),
    ("feature_std", "Spread of projections", "", 1.0),
    ("effective_rank", "Effective rank", "", 1.0),
)
_LAST_STEPS = 0.02  # of a run: what a final value is the mean of


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    identity: str
    heading: str
    body: Html


def sections(runs: Sequence[Contents]) -> list[Section]:
    """All parts that the runs have something for, in the order of the page."""
    makers: list[tuple[str, str, Callable[[Sequence[Contents]], Html | None]]] = [
        ("summary", "Summary", _summary),
        ("curves", "Curves", _curves),
        ("time", "Where the step's time went", _time),
        ("evaluations", "Evaluations", _evaluations),
        ("views", "Augmented views", _views),
        ("neighbours", "Nearest neighbours", _neighbours),
        ("map", "Map of the embeddings", _map),
        ("similarities", "Similarity of pairs", _similarities),
        ("settings", "Settings", settings_tables),
        ("missing", "Left out", _missing),
    ]
    made = [(identity, heading, maker(runs)) for identity, heading, maker in makers]
    return [Section(identity, heading, body) for identity, heading, body in made if body]


# --- numbers ------------------------------------------------------------------------------------


def _summary(runs: Sequence[Contents]) -> Html:
    columns = [dict(_facts(run)) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            [tag("td", tag("bdi", column.get(name, "-"))) for column in columns],
        )
        for name in names
    ]
    head = tag("tr", tag("td"), [tag("th", tag("bdi", run.name), scope="col") for run in runs])
    table = tag("table", tag("thead", head) if len(runs) > 1 else None, tag("tbody", rows))
    hint = "At the end: the mean of the last 2 % of the steps."
    return join([scroll(table, "Final numbers", wide=len(runs) > 1), tag("p", hint, class_="hint")])


def _facts(run: Contents) -> Iterator[tuple[str, str]]:
    noted = section(run.settings, "run")
    yield "state", run.state
    yield "recipe", title(run.settings)
    yield "data", str(section(run.settings, "data").get("train", "-"))
    if run.history is not None:
        yield from _measures(run.history)
    for bar in run.bars:
        if bar.name == KINDS["run"]:
            yield f"{' '.join(bar.group.split())}, top-1", f"{100 * bar.value:.1f} %"
    versions = section(noted, "versions")
    code = [f"{name} {versions[name]}" for name in ("widebatch", "torch") if name in versions]
    if code:
        yield "made by", ", ".join(code)
    if versions.get("commit"):
        yield "commit", str(versions["commit"])


def _measures(history: History) -> Iterator[tuple[str, str]]:
    metrics, count = history.metrics, len(history.metrics["step"])
    tail = max(1, round(_LAST_STEPS * count))
    for name, words in (("loss", "loss"), ("contrastive_top1", "contrastive top-1")):
        if name in metrics and np.isfinite(metrics[name][-tail:]).any():
            mean = float(np.nanmean(metrics[name][-tail:]))
            yield f"{words}, at the end", short(mean) if name == "loss" else f"{100 * mean:.1f} %"
    if "knn_top1" in metrics:
        known = metrics["knn_top1"][np.isfinite(metrics["knn_top1"])]
        yield "online kNN, last and best", f"{100 * known[-1]:.1f} %, {100 * known.max():.1f} %"
    if "images_per_second" in metrics:
        speed = float(np.nanmedian(metrics["images_per_second"]))
        yield "throughput, median", f"{short(speed)} images/s"
    events = history.events
    yield "steps left out", f"{len(events.skipped)}"
    yield "restarts", f"{len(events.restarts)}"
    yield "damaged samples replaced", f"{events.substitute_count}"


def _curves(runs: Sequence[Contents]) -> Html | None:
    told = [(key, run, run.history) for key, run in enumerate(runs) if run.history is not None]
    if not told:
        return None
    marks = _marks(told[0][2]) if len(runs) == 1 else ()
    charts = []
    for column, name, unit, factor in _CURVES:
        lines = [
            Line(run.name, history.metrics["step"], history.metrics[column] * factor, key)
            for key, run, history in told
            if column in history.metrics
        ]
        if lines:
            chart = line_chart(f"curve-{column}", name, lines, unit=unit, marks=marks)
            charts.append(chart)
    entries = [(key, run.name) for key, run, _ in told]
    return join(
        [
            legend(entries, "section") if len(entries) > 1 else None,
            tag(
                "p",
                "Faint: every step; strong: the running mean over a fiftieth of the run.",
                class_="hint",
            )
            if any(len(history.metrics["step"]) > 50 for _, _, history in told)
            else None,
            _events(told),
            tag("div", charts, class_="charts"),
        ]
    )


def _marks(history: History) -> tuple[Mark, ...]:
    events = history.events
    return (
        Mark("restart", "started again", events.restarts),
        Mark("skip", "step left out", events.skipped),
        Mark("substitute", "damaged samples replaced", events.substitutes),
    )


def _events(told: Sequence[tuple[int, Contents, History]]) -> Html | None:
    items = []
    for _, run, history in told:
        events = history.events
        for sign, words, steps in (
            ("✕", "left out for gradients that were not finite: step", events.skipped),
            ("┆", "started again after step", events.restarts),
            (
                "◆",
                f"{events.substitute_count} damaged samples replaced, noted at step",
                events.substitutes,
            ),
        ):
            if steps:
                shown = ", ".join(f"{step:,}" for step in steps[:8])
                more = f" and {len(steps) - 8} more" if len(steps) > 8 else ""
                whose = tag("bdi", run.name, ": ") if len(told) > 1 else None
                items.append(tag("li", whose, f"{sign} {words} {shown}{more}"))
    return (
        tag("ul", items, class_="events", aria_label="What happened on the way") if items else None
    )


def _time(runs: Sequence[Contents]) -> Html | None:
    told = {run.name: run.history for run in runs if run.history and run.history.phases}
    if not told:
        return None
    phases = {name: history.phases for name, history in told.items()}
    table = scroll(bars.phase_table(phases), "Phases of a step", wide=len(phases) > 1)
    parts = [tag("div", bars.phase_bars(phases), table)]
    (first, *others) = told.values()
    if not others and first.phase_metrics is not None and len(first.phase_metrics["step"]) > 1:
        columns = {k: v for k, v in first.phase_metrics.items() if k != "step"}
        lines = [
            Line(name, first.phase_metrics["step"], 1000 * values, bars.phase_colour(name))
            for name, values in columns.items()
        ]
        chart = line_chart("curve-phases", "Phases", lines, unit="ms a step", legend=True)
        parts.append(chart)
    hint = "Means of all readings. Waits for other ranks count as collectives, not as work."
    return join([tag("p", hint, class_="hint"), tag("div", parts, class_="split")])


def _evaluations(runs: Sequence[Contents]) -> Html | None:
    charts = [
        join([_whose(runs, run), bars.accuracy_bars(run.bars, run.chance)])
        for run in runs
        if run.bars
    ]
    rows = [
        tag(
            "tr",
            tag("td", tag("bdi", run.name)) if len(runs) > 1 else None,
            [tag("td", tag("bdi", cell)) for cell in (each.file, each.method, each.of)],
            tag("td", ", ".join(f"{name} {value}" for name, value in each.figures)),
        )
        for run in runs
        for each in run.measured
    ]
    if not rows:
        return None
    heads = [*(["run"] if len(runs) > 1 else []), "file", "method", "of", "figures"]
    head = tag("tr", [tag("th", name, scope="col") for name in heads])
    table = tag("table", tag("thead", head), tag("tbody", rows))
    every = tag("details", tag("summary", "All evaluations"), scroll(table, "Evaluations"))
    return join([tag("div", [tag("div", chart) for chart in charts], class_="charts"), every])


# --- pictures -----------------------------------------------------------------------------------


def _each(runs: Sequence[Contents], name: str) -> list[tuple[Contents, Any]]:
    found = [(run, getattr(run.looks, name)) for run in runs]
    return [(run, part) for run, part in found if part is not None]


def _views(runs: Sequence[Contents]) -> Html | None:
    grids = [
        join([_whose(runs, run), pictures.views_grid(views)]) for run, views in _each(runs, "views")
    ]
    hint = "The first samples of the run, and the views that its first epoch made of them."
    return join([tag("p", hint, class_="hint"), *grids]) if grids else None


def _neighbours(runs: Sequence[Contents]) -> Html | None:
    parts = []
    for run, queries in _each(runs, "queries"):
        hint = "The nearest training images by cosine similarity, the nearest first."
        if queries.labelled:
            hint += f" Of their query's class (✓): {pictures.agreement(queries)}."
        parts += [
            _whose(runs, run),
            tag("p", hint, class_="hint"),
            pictures.neighbours(queries),
        ]
    return join(parts) if parts else None


def _map(runs: Sequence[Contents]) -> Html | None:
    parts = []
    for number, (run, found) in enumerate(_each(runs, "map")):
        hint = f"{len(found.ids_N)} images on a plane, by {found.method}."
        parts += [
            _whose(runs, run),
            tag("p", hint, class_="hint"),
            embedding_map(f"map-{number}", found),
        ]
    return join(parts) if parts else None


def _similarities(runs: Sequence[Contents]) -> Html | None:
    charts = [
        join([_whose(runs, run), bars.similarity_histogram(found.positive_P, found.negative_P)])
        for run, found in _each(runs, "similarities")
    ]
    hint = (
        "Cosine of the encoder's features, before any head, of two augmented views: of one image "
        "(positives) and of two images (negatives)."
    )
    grid = tag("div", [tag("div", chart) for chart in charts], class_="charts")
    return join([tag("p", hint, class_="hint"), grid]) if charts else None


def _whose(runs: Sequence[Contents], run: Contents) -> Html | None:
    return tag("p", tag("bdi", run.name), class_="whose") if len(runs) > 1 else None


# --- what else ---------------------------------------------------------------------------------


def _missing(runs: Sequence[Contents]) -> Html | None:
    items = []
    for lack in dict.fromkeys(lack for run in runs for lack in run.missing):
        lacking = [run.name for run in runs if lack in run.missing]
        whose = None if len(lacking) == len(runs) else [tag("bdi", ", ".join(lacking)), ": "]
        items.append(tag("li", whose, f"{lack[0]}: {lack[1]}"))
    return tag("ul", items) if items else None
