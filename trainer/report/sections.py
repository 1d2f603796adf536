"""What the parts of a page show, from the contents of the runs: charts, and cells of tables."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from trainer.report.charts import (
    Chart,
    Line,
    accuracy_bars,
    line_chart,
    phase_bars,
    short,
    similarity_histogram,
)
from trainer.report.contents import Contents
from trainer.report.evaluations import KINDS
from trainer.report.history import CURVES, Events, History
from trainer.report.settings import changed, differing, flat, section, title

_LAST_STEPS = 0.02  # of a run: what a final value is the mean of


def values(runs: Sequence[Contents]) -> dict[str, Any]:
    """What ``page.html`` shows, by name; empty where no run has something for it."""
    several = len(runs) > 1
    facts = [dict(_facts(run)) for run in runs]
    lacks = dict.fromkeys(lack for run in runs for lack in run.missing)
    return {
        "runs": runs,
        "names": [run.name for run in runs],
        "facts": [
            [name, *(column.get(name, "-") for column in facts)]
            for name in dict.fromkeys(name for column in facts for name in column)
        ],
        "curves": list(_curves(runs)),
        "events": [f"{run.name}: {event}" if several else event for run, event in _events(runs)],
        "phases": list(_phases(runs)),
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
            similarity_histogram("similarity", run.looks.similarities)
            for run in runs
            if run.looks.similarities
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
    yield "data", str(section(run.settings, "data").get("train", "-"))
    if run.history is not None:
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


def _curves(runs: Sequence[Contents]) -> Iterator[Chart]:
    told = [run.history or History({}, Events()) for run in runs]
    for column, heading, factor in CURVES:
        lines = [  # empty where a run has none, so that runs keep their colours
            Line(run.name, history.metrics["step"], history.metrics[column] * factor)
            if column in history.metrics
            else Line(run.name, np.zeros(0), np.zeros(0))
            for run, history in zip(runs, told)
        ]
        if any(len(line.steps_N) for line in lines):
            events = told[0].events if len(told) == 1 else Events()
            yield line_chart(f"curve-{column}", heading, lines, events)


def _events(runs: Sequence[Contents]) -> Iterator[tuple[Contents, str]]:
    for run in runs:
        events = run.history.events if run.history else Events()
        for words, steps in (
            ("left out for gradients that were not finite: step", events.skipped),
            ("started again after step", events.restarts),
            (
                f"{events.substitute_count} damaged samples replaced, noted at step",
                events.substitutes,
            ),
        ):
            if steps:
                more = f" and {len(steps) - 8} more" if len(steps) > 8 else ""
                yield run, f"{words} {', '.join(f'{step:,}' for step in steps[:8])}{more}"


def _phases(runs: Sequence[Contents]) -> Iterator[Chart]:
    told = {run.name: run.history for run in runs if run.history and run.history.phases}
    if told:
        yield phase_bars("phases", {name: history.phases for name, history in told.items()})
    for history in told.values():
        readings = history.phase_metrics
        if len(told) == 1 and readings is not None and len(readings["step"]) > 1:
            lines = [
                Line(phase.name, readings["step"], 1000 * readings[phase.name])
                for phase in history.phases
            ]
            yield line_chart("curve-phases", "Phases (ms a step)", lines)


def _settings(run: Contents) -> tuple[str, str, list[list[str]], list[tuple[str, str]]]:
    """Name, what is to be said of the recipe, what differs from it, and all settings."""
    recipe, changes = run.settings.get("recipe"), changed(run.settings)
    if changes is None:
        said = f"No recipe {recipe!r} here to compare with."
    elif changes:
        said = f"Different from the recipe {recipe}:"
    else:
        said = f"As the recipe {recipe} has them, but for the data."
    rows = [[name, *pair] for name, pair in (changes or {}).items()]
    return run.name, said, rows, list(flat(run.settings).items())
