"""Curves as inline SVG, legible without a script, alive with one; axes and legends of any chart.

A chart is a ``<figure>``: its SVG, a legend, and its numbers in a table that opens. Each scale is
drawn; which one is seen, a class decides. ``page.js`` reads the points from ``data-points`` for
the read-out.

Shape suffixes: N points.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.files.strict_json import dump_json
from trainer.report.figures import running_mean
from trainer.report.html import Html, join, tag
from trainer.report.ticks import Axis, labels, linear_axis, log_axis, short

Numbers = npt.NDArray[np.float64]

WIDTH, HEIGHT = 360.0, 216.0  # of a chart, in its own units: about a phone's pixels
LEFT, RIGHT, TOP, BOTTOM = 44.0, 12.0, 10.0, 36.0
_MOST_POINTS = 180  # of a line: half a chart's pixels
_MOST_ROWS = 12  # of a chart's table
DASHES = (None, "6 3", "2 3", "9 3 2 3")
"""Of lines, so that they differ without colour."""
COLOURS = 8
"""Classes ``c0`` ... of the style sheet."""


@dataclass(frozen=True)
class Line:
    """Values against steps."""

    name: str
    steps_N: Numbers  # noqa: N815
    values_N: Numbers  # noqa: N815
    key: int = 0
    """Decides colour and dashes; lines of one key are shown and hidden together."""


@dataclass(frozen=True)
class Mark:
    """Something that happened at steps."""

    sign: str
    """``skip``, ``restart`` or ``substitute``."""
    name: str
    steps: Sequence[int]


@dataclass(frozen=True)
class _Drawn:
    """A line as it is drawn: few enough points, each for some steps."""

    line: Line
    steps: Numbers
    means: Numbers
    """The running mean."""
    exact: Numbers
    """Mean of the values that a point stands for."""
    zigzag_steps: Numbers
    zigzag: Numbers
    """Least and most of these values by turns."""


def line_chart(
    identity: str,
    title: str,
    lines: Sequence[Line],
    *,
    unit: str = "",
    marks: Sequence[Mark] = (),
    legend: bool = False,
    x_title: str = "step",
) -> Html:
    """Lines in the same axes, linear and (where it can be) logarithmic.

    Args:
        identity: of the element, unique on its page.
        title: what the values are.
        lines: NaN where a step has no value.
        unit: of the values.
        marks: drawn on the first of the steps' axis.
        legend: whether it has one of its own.
        x_title: what the horizontal axis is.
    """
    drawn = [_thinned(line) for line in lines]
    across = linear_axis(
        min(0.0, *(float(d.steps[0]) for d in drawn)),
        max(float(d.steps[-1]) for d in drawn),
        about=5,
        tight=True,
    )
    everything = np.concatenate([d.zigzag for d in drawn])
    low, high = float(everything.min()), float(everything.max())
    low = 0.0 if 0 <= low < 0.5 * high else low
    axes = [linear_axis(low, high), log_axis(everything)]
    svg = tag(
        "svg",
        *(_plot(drawn, across, axis, marks, x_title) for axis in axes if axis is not None),
        viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
        role="img",
        aria_label=_described(title, unit, drawn),
    )
    heading = f"{title} ({unit})" if unit else title
    return tag(
        "figure",
        tag("figcaption", tag("h3", heading), tag("p", class_="readout")),
        tag("div", svg, class_="plot"),
        _legend(lines) if legend else None,
        _table(drawn, x_title),
        class_="chart linear",
        id=identity,
        data_points=_points(drawn, across, axes, unit),
        data_log=axes[1] is not None,
    )


def _thinned(line: Line) -> _Drawn:
    known = np.isfinite(line.values_N)
    steps, values = line.steps_N[known], line.values_N[known]
    means = running_mean(values) if len(values) > 50 else values
    edges = np.unique(np.linspace(0, len(values), min(len(values), _MOST_POINTS) + 1).round())
    parts = [slice(int(a), int(b)) for a, b in itertools.pairwise(edges)]
    if len(parts) == len(values):
        return _Drawn(line, steps, means, values, steps, values)
    middles = np.array([(part.start + part.stop - 1) // 2 for part in parts])
    middles[0], middles[-1] = 0, len(values) - 1  # a line begins and ends where the run does
    extremes = np.array([[values[part].min(), values[part].max()] for part in parts])
    return _Drawn(
        line,
        steps[middles],
        means[middles],
        np.array([values[part].mean() for part in parts]),
        np.repeat(steps[middles], 2),
        extremes.ravel(),
    )


def x_on(across: Axis, steps: Numbers) -> Numbers:
    """Where values lie on a chart's horizontal axis, in its own units."""
    return LEFT + across.place(steps) * (WIDTH - LEFT - RIGHT)


def y_on(axis: Axis, values: Numbers) -> Numbers:
    """Where they lie on its vertical axis."""
    return HEIGHT - BOTTOM - axis.place(values) * (HEIGHT - TOP - BOTTOM)


def _plot(
    drawn: Sequence[_Drawn], across: Axis, axis: Axis, marks: Sequence[Mark], x_title: str
) -> Html:
    curves = []
    for each in drawn:
        dashes = DASHES[each.line.key % len(DASHES)]
        smooth = tag(
            "path",
            d=path(x_on(across, each.steps), y_on(axis, each.means)),
            stroke_dasharray=dashes,
        )
        raw = tag(
            "path",
            d=path(x_on(across, each.zigzag_steps), y_on(axis, each.zigzag)),
            class_="raw",
        )
        few = len(each.steps) <= 25
        dots = [
            tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r="2.5")
            for x, y in zip(x_on(across, each.steps), y_on(axis, each.exact))
            if few and np.isfinite(y)
        ]
        curves.append(
            tag(
                "g",
                raw if len(each.exact) > 50 else None,
                smooth,
                dots,
                class_=f"line c{each.line.key % COLOURS}",
                data_series=each.line.key,
            )
        )
    return tag(
        "g",
        frame(across, axis, x_title),
        curves,
        list(_marks(across, marks)),
        class_=f"scale {axis.scale}",
    )


def path(xs: Numbers, ys: Numbers) -> str:
    """A path through points; broken where one is not finite."""
    parts, pen = [], "M"
    for x, y in zip(xs, ys):
        if not np.isfinite(y):
            pen = "M"
            continue
        parts.append(f"{pen}{x:.1f} {y:.1f}")
        pen = "L"
    return "".join(parts)


def frame(across: Axis, axis: Axis, x_title: str) -> Html:
    """Both axes with their ticks, and lines across."""
    bottom = HEIGHT - BOTTOM
    parts = []
    for y, label in zip(y_on(axis, np.array(axis.ticks)), labels(axis)):
        parts.append(tag("path", d=f"M{LEFT:g} {y:.1f}H{WIDTH - RIGHT:g}", class_="grid"))
        parts.append(tag("text", label, x=LEFT - 5, y=f"{y + 3.5:.1f}", class_="end"))
    for x, label in zip(x_on(across, np.array(across.ticks)), labels(across)):
        parts.append(tag("path", d=f"M{x:.1f} {bottom:g}v4", class_="tick"))
        parts.append(tag("text", label, x=f"{x:.1f}", y=bottom + 16, class_="middle"))
    parts.append(tag("path", d=f"M{LEFT:g} {bottom:g}H{WIDTH - RIGHT:g}", class_="tick"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(tag("text", x_title, x=middle, y=HEIGHT - 5, class_="middle"))
    return join(parts)


def _marks(across: Axis, marks: Sequence[Mark]) -> Iterator[Html]:
    bottom = HEIGHT - BOTTOM
    for mark in marks:
        steps = np.array(mark.steps, np.float64)
        for x in np.unique(x_on(across, steps[(steps >= across.low) & (steps <= across.high)])):
            if mark.sign == "restart":
                d = f"M{x:.1f} {TOP:g}V{bottom:g}"
            elif mark.sign == "skip":
                d = f"M{x - 3:.1f} {TOP - 6:g}l6 6m0 -6l-6 6"
            else:
                d = f"M{x:.1f} {bottom - 7:g}l3.5 3.5l-3.5 3.5l-3.5 -3.5z"
            yield tag("path", tag("title", mark.name), d=d, class_=f"mark {mark.sign}")


def _legend(lines: Sequence[Line]) -> Html:
    return legend([(line.key, line.name) for line in lines], "figure")


def legend(entries: Sequence[tuple[int, str]], scope: str) -> Html:
    """Names of lines; a script makes switches of them.

    Args:
        entries: key and name of each.
        scope: what the switches work on: ``figure`` or ``section``.
    """
    items = []
    for key, name in entries:
        sample = tag("path", d="M1 6H23", stroke_dasharray=DASHES[key % len(DASHES)])
        picture = tag(
            "svg",
            tag("g", sample, class_=f"line c{key % COLOURS}"),
            viewBox="0 0 24 12",
            class_="sample",
            aria_hidden="true",
        )
        items.append(tag("li", tag("span", picture, tag("bdi", name), data_toggle=key)))
    return tag("ul", items, class_="legend", data_scope=scope)


def _described(title: str, unit: str, drawn: Sequence[_Drawn]) -> str:
    parts = [
        f"{each.line.name} from {short(each.exact[0])} at step {each.steps[0]:g} to "
        f"{short(each.exact[-1])} at step {each.steps[-1]:g}"
        for each in drawn
    ]
    return f"{title}{f' in {unit}' if unit else ''}: {'; '.join(parts)}"


def _table(drawn: Sequence[_Drawn], x_title: str) -> Html:
    rows = []
    for each in drawn:
        count = len(each.steps)
        for index in np.unique(np.linspace(0, count - 1, min(count, _MOST_ROWS)).round()):
            at = int(index)
            cells = [f"{each.steps[at]:,.0f}", short(float(each.exact[at]))]
            names = [tag("td", tag("bdi", each.line.name))] if len(drawn) > 1 else []
            rows.append(tag("tr", names, [tag("td", cell, class_="number") for cell in cells]))
    first = [tag("th", "line", scope="col")] if len(drawn) > 1 else []
    heads = [tag("th", name, scope="col", class_="number") for name in (x_title, "value")]
    return tag(
        "details",
        tag("summary", "Numbers"),
        tag("table", tag("thead", tag("tr", first, heads)), tag("tbody", rows)),
    )


def _points(drawn: Sequence[_Drawn], across: Axis, axes: Sequence[Axis | None], unit: str) -> str:
    """What ``page.js`` needs for the read-out, as JSON."""
    rounded = [
        {
            "key": each.line.key,
            "name": each.line.name,
            "x": [round(float(x), 1) for x in x_on(across, each.steps)],
            "steps": [int(step) for step in each.steps],
            "values": [float(f"{value:.5g}") for value in each.exact],
            "linear": _heights(axes[0], each.exact),
            "log": _heights(axes[1], each.exact),
        }
        for each in drawn
    ]
    return dump_json({"unit": unit, "lines": rounded}, separators=(",", ":"))


def _heights(axis: Axis | None, values: Numbers) -> list[float | None]:
    if axis is None:
        return []
    return [round(float(y), 1) if np.isfinite(y) else None for y in y_on(axis, values)]
