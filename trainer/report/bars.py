"""Bars and histograms as inline SVG, each with its numbers in a table.

Shape suffixes: P pairs.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from trainer.health.phases import PHASES, WAITS
from trainer.report.charts import HEIGHT, WIDTH, frame, legend, path, x_on, y_on
from trainer.report.figures import Bar
from trainer.report.history import PhaseTime
from trainer.report.html import Html, tag
from trainer.report.ticks import linear_axis

_BINS = 32
_ROW = 24.0  # of a bar
_NAME = 116.0  # room for a bar's name
_COLOURS = {name: number for number, name in enumerate((*PHASES, WAITS))}  # of phases


def phase_colour(name: str) -> int:
    """The same for a phase wherever it is drawn."""
    return _COLOURS[name]


def accuracy_bars(bars: Sequence[Bar], chance: float) -> Html:
    """Accuracies in percent, grouped by how they were measured, over the level of guessing."""
    names = list(dict.fromkeys(bar.name for bar in sorted(bars, key=lambda bar: bar.rank)))
    groups = {bar.group: [b for b in bars if b.group == bar.group] for bar in bars}
    room = WIDTH - _NAME - 48
    parts, y = [], 6.0
    for group, members in groups.items():
        parts.append(tag("text", " ".join(group.split()), x=0, y=y + 12, class_="strong"))
        y += _ROW
        for bar in sorted(members, key=lambda bar: bar.rank):
            width = room * min(max(bar.value, 0.0), 1.0)
            parts += [
                tag("text", bar.name[:22], x=0, y=y + 13),
                tag(
                    "rect",
                    **{"x": _NAME, "y": y, "width": f"{width:.1f}", "height": _ROW - 7},
                    class_=f"bar c{names.index(bar.name) % 8}",
                ),
                tag("text", f"{100 * bar.value:.1f} %", x=f"{_NAME + width + 5:.1f}", y=y + 13),
            ]
            y += _ROW
        x = _NAME + room * chance
        top = y - len(members) * _ROW
        parts.append(tag("path", d=f"M{x:.1f} {top - 2:g}V{y - 5:g}", class_="chance"))
        y += 6
    parts.append(
        tag("text", f"chance {100 * chance:.1f} %", x=f"{x:.1f}", y=y + 8, class_="middle")
    )
    said = "; ".join(f"{' '.join(b.group.split())}, {b.name}: {100 * b.value:.1f} %" for b in bars)
    svg = tag(
        "svg",
        parts,
        viewBox=f"0 0 {WIDTH:g} {y + 14:g}",
        role="img",
        aria_label=f"Top-1 accuracy: {said}; chance {100 * chance:.1f} %",
    )
    caption = tag("figcaption", tag("h3", "Top-1 accuracy"))
    return tag("figure", caption, tag("div", svg, class_="plot"), class_="chart")


def phase_bars(runs: Mapping[str, Sequence[PhaseTime]]) -> Html:
    """What a step's time is made of: a bar for each run, in the colours of the phases."""
    longest = max(sum(part.median for part in parts) for parts in runs.values()) or 1.0
    drawn, y = [], 0.0
    for name, parts in runs.items():
        total = sum(part.median for part in parts)
        if len(runs) > 1:
            drawn.append(tag("text", name[:48], x=0, y=y + 12))
            y += 18
        x = 0.0
        for part in parts:
            width = (WIDTH - 70) * part.median / longest
            hint = f"{part.name}: {_ms(part.median)} ms, {_share(part.median, total)}"
            box = {"x": f"{x:.1f}", "y": y, "width": f"{width:.1f}", "height": 24}
            drawn.append(
                tag("rect", tag("title", hint), class_=f"bar c{phase_colour(part.name)}", **box)
            )
            x += width
        drawn.append(tag("text", f"{_ms(total)} ms", x=f"{x + 6:.1f}", y=y + 16))
        y += 34
    said = "; ".join(
        f"{name}: " + ", ".join(f"{part.name} {_ms(part.median)} ms" for part in parts)
        for name, parts in runs.items()
    )
    return tag(
        "svg",
        drawn,
        viewBox=f"0 0 {WIDTH:g} {y - 8:g}",
        role="img",
        aria_label=f"Time of a step by phase. {said}",
        class_="phases",
    )


def phase_table(runs: Mapping[str, Sequence[PhaseTime]]) -> Html:
    """The phases' times: of one run the median and the slowest rank's, of several the median's."""
    if len(runs) == 1:
        ((_, parts),) = runs.items()
        heads = ["ms a step, median rank", "share", "slowest rank"]
        rows = [
            _phase_row(part.name, [*_time_and_share(part, parts), _slowest(part)]) for part in parts
        ]
    else:
        heads = [tag("bdi", name) for name in runs]
        names = list(dict.fromkeys(part.name for parts in runs.values() for part in parts))
        rows = [_phase_row(name, [_cell(name, parts) for parts in runs.values()]) for name in names]
    columns = [tag("th", head, scope="col", class_="number") for head in heads]
    head = tag("tr", tag("th", "phase", scope="col"), columns)
    return tag("table", tag("thead", head), tag("tbody", rows))


def _phase_row(name: str, cells: Sequence[str]) -> Html:
    square = tag("rect", width=12, height=12, class_=f"bar c{phase_colour(name)}")
    swatch = tag("svg", square, viewBox="0 0 12 12", class_="swatch", aria_hidden="true")
    return tag(
        "tr",
        tag("th", swatch, " ", name, scope="row", class_="together"),
        [tag("td", cell, class_="number") for cell in cells],
    )


def _time_and_share(part: PhaseTime, parts: Sequence[PhaseTime]) -> tuple[str, str]:
    return _ms(part.median), _share(part.median, sum(each.median for each in parts))


def _slowest(part: PhaseTime) -> str:
    return f"{_ms(part.slowest)} (rank {part.rank})"


def _cell(name: str, parts: Sequence[PhaseTime]) -> str:
    found = next((part for part in parts if part.name == name), None)
    return f"{_ms(found.median)} ms" if found else "-"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:,.0f}"


def _share(part: float, total: float) -> str:
    return f"{100 * part / total:.1f} %" if total else "-"


def similarity_histogram(
    positive_P: npt.NDArray[np.float32], negative_P: npt.NDArray[np.float32]
) -> Html:
    """Shares of pairs by their cosine: positives and negatives in the same axes."""
    both = {"positives": positive_P, "negatives": negative_P}
    low = min(float(cosines.min()) for cosines in both.values())
    edges = np.linspace(np.floor(low * 10) / 10, 1.0, _BINS + 1)
    shares = {
        name: 100 * np.histogram(np.clip(c, -1, 1), edges)[0] / len(c) for name, c in both.items()
    }
    across = linear_axis(float(edges[0]), 1.0, tight=True)
    axis = linear_axis(0.0, max(float(share.max()) for share in shares.values()))
    outlines = []
    for key, share in enumerate(shares.values()):
        heights = np.concatenate([[0.0], np.repeat(share, 2), [0.0]])
        outline = path(x_on(across, np.repeat(edges, 2)), y_on(axis, heights))
        line = tag("path", d=outline, class_="area", stroke_dasharray=None if key == 0 else "6 3")
        outlines.append(tag("g", line, class_=f"line c{key}", data_series=key))
    means = {name: float(cosines.mean()) for name, cosines in both.items()}
    said = ", ".join(f"{name} {mean:.3f} on average" for name, mean in means.items())
    svg = tag(
        "svg",
        tag("g", frame(across, axis, "cosine of two views' features"), outlines),
        viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
        role="img",
        aria_label=f"Histogram of the cosine of pairs of views: {said}",
    )
    rows = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            tag("td", f"{len(c):,}", class_="number"),
            [tag("td", f"{v:.2f}", class_="number") for v in _quantiles(c)],
        )
        for name, c in both.items()
    ]
    heads = ("pairs", "mean", "5\u00a0%", "median", "95\u00a0%")
    head = tag("tr", tag("td"), [tag("th", h, scope="col", class_="number") for h in heads])
    return tag(
        "figure",
        tag("figcaption", tag("h3", "Share of pairs (%) by similarity")),
        tag("div", svg, class_="plot"),
        legend(list(enumerate(both)), "figure"),
        tag("div", tag("table", tag("thead", head), tag("tbody", rows)), class_="scroll"),
        class_="chart",
    )


def _quantiles(cosines_P: npt.NDArray[np.float32]) -> list[float]:
    return [float(cosines_P.mean()), *map(float, np.quantile(cosines_P, [0.05, 0.5, 0.95]))]
