"""The charts of a report: Plotly's figures, each with its text alternative and its numbers.

Shape suffixes: N points, P pairs.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError
from trainer.report.evaluations import Bar, names_of
from trainer.report.history import Events, PhaseTime, running_mean
from trainer.report.pictures import EmbeddingMap

try:
    import plotly.graph_objects as go
    import plotly.io
    from plotly.offline import get_plotlyjs
except ImportError:
    raise ConfigError(
        "a report needs plotly, which is not installed; run `pip install plotly`"
    ) from None

PLOTLY = ("plotly.min.js", get_plotlyjs())
"""What draws the figures in a browser: a name for it, and its text."""
Numbers = npt.NDArray[np.float64]

# From Plotly's Dark24, those that stand out from a white and from a black page (WCAG 1.4.11).
COLOURS = (
    *("#2E91E5", "#EB663B", "#00A08B", "#A777F1", "#B68100", "#FB0D0D", "#778AAE", "#E15F99"),
    *("#1CA71C", "#DA16FF"),
)
_DASHES = ("solid", "dash", "dot", "dashdot")  # of lines, so that they differ without colour
_SYMBOLS = 7  # of points: with the colours, 70 classes differ
_MOST_NAMED = 30  # classes in a legend
_STRETCHES = 300  # of a line: each is drawn by its least and its greatest value
_MANY = 50  # values, from which on their running mean is drawn too
_MOST_ROWS = 12  # of a line in a chart's table


@dataclass(frozen=True)
class Line:
    """Values against steps, NaN where a step has none."""

    name: str
    steps_N: Numbers  # noqa: N815
    values_N: Numbers  # noqa: N815


@dataclass(frozen=True)
class Chart:
    """A figure, and the table of its numbers for those who do not see it."""

    identity: str
    """Of its element, unique on its page."""
    title: str
    figure: go.Figure
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def words(self) -> str:
        """All of it in a line of text."""
        return f"{self.title}: {'; '.join(', '.join(row) for row in self.rows)}"


def themes() -> dict[str, Any]:
    """Plotly's templates for a light and a dark page, with our colours and little room around."""
    ours = {
        "colorway": COLOURS,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 8, "r": 8, "t": 28, "b": 8},
        "modebar": {"bgcolor": "rgba(0,0,0,0)"},
        "hovermode": "x",
        "legend": {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"},
    }
    found = {}
    for name, template in (("light", "plotly_white"), ("dark", "plotly_dark")):
        layout = plotly.io.templates[template].layout.to_plotly_json()
        for axis in ("xaxis", "yaxis"):
            layout[axis] |= {"ticks": "outside", "title": {"standoff": 4}}
        found[name] = {"layout": {**layout, **ours}}
    return found


def _name(name: str) -> str:
    """A run or a class as a chart may name it: it takes markup, and has little room."""
    return html.escape(name if len(name) <= 24 else f"{name[:11]}…{name[-12:]}")


def _figure(**layout: Any) -> go.Figure:
    return go.Figure(layout=go.Layout(template="none", **layout))


def line_chart(
    identity: str, title: str, lines: Sequence[Line], events: Events | None = None
) -> Chart:
    """Lines in the same axes; where values are many, a running mean over the faint values."""
    figure = _figure(height=280, xaxis_title="step", yaxis_hoverformat=".4~g")
    rows = []
    for number, line in enumerate(lines):
        known_N = np.isfinite(line.values_N)
        steps_N, values_N = line.steps_N[known_N], line.values_N[known_N]
        if not len(values_N):
            continue
        drawn_N, many = _extremes(values_N), len(values_N) > _MANY
        same = {"name": _name(line.name), "legendgroup": str(number), "x": steps_N[drawn_N]}
        style: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)],
            "dash": _DASHES[number % len(_DASHES)],
        }
        if many:
            mean_N = running_mean(values_N)[drawn_N]
            figure.add_scatter(**same, y=mean_N, mode="lines", line=style, hoverinfo="skip")
            style = {"color": style["color"], "width": 1}
        figure.add_scatter(
            **same,
            y=values_N[drawn_N],
            mode="lines" if many else "lines+markers",
            line=style,
            opacity=0.4 if many else 1,
            showlegend=not many,
        )
        few_N = np.linspace(0, len(values_N) - 1, min(len(values_N), _MOST_ROWS)).round()
        rows += [[line.name, short(steps_N[int(n)]), short(values_N[int(n)])] for n in few_N]
    _add_events(figure, events or Events())
    figure.update_layout(showlegend=len({trace.name for trace in figure.data}) > 1)
    if len(lines) == 1:  # which line needs no saying
        rows = [row[1:] for row in rows]
    heads = ("line", "step", "value")[-len(rows[0]) :]
    return Chart(identity, title, figure, heads, rows)


def short(value: float) -> str:
    """A number for people, four digits where it is not a count."""
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"


def _extremes(values_N: Numbers) -> npt.NDArray[np.int64]:
    """Indices of the first and the last value, and of the least and greatest of every stretch."""
    parts = np.array_split(np.arange(len(values_N)), min(len(values_N), _STRETCHES))
    found = [part[pick(values_N[part])] for part in parts for pick in (np.argmin, np.argmax)]
    return np.unique([0, *found, len(values_N) - 1])


def _add_events(figure: go.Figure, events: Events) -> None:
    """Marks at the steps of events, on an axis of their own from the bottom to the top."""
    figure.update_layout(yaxis2={"overlaying": "y", "range": [0, 1], "visible": False})
    for name, steps, symbol, height in (
        ("step left out", events.skipped, "x-thin-open", 0.98),
        ("damaged samples replaced", events.substitutes, "diamond", 0.02),
    ):
        if steps:
            shown = steps[:: 1 + len(steps) // _STRETCHES]
            figure.add_scatter(
                x=shown,
                y=[height] * len(shown),
                yaxis="y2",
                name=name,
                mode="markers",
                marker={"symbol": symbol, "size": 8},
                hovertemplate="%{x}",
            )


def phase_bars(identity: str, runs: Mapping[str, Sequence[PhaseTime]]) -> Chart:
    """What a step's time is made of: a bar for each run, and the phases' times in a table.

    The table has the median and the slowest rank's of one run, of several the medians.
    """
    figure = _figure(
        barmode="stack",
        legend_traceorder="normal",
        height=150 + 40 * len(runs),
        xaxis_title="ms a step",
    )
    found = [{part.name: part for part in parts} for parts in runs.values()]
    heads, rows = ["phase", *runs], []
    for name in dict.fromkeys(name for parts in found for name in parts):
        times = [parts[name].median if name in parts else 0.0 for parts in found]
        figure.add_bar(
            orientation="h",
            name=name,
            y=list(range(len(runs))),
            x=[1000 * seconds for seconds in times],
            hovertemplate="%{x:.3~g} ms",
        )
        rows.append([name, *(_ms(seconds) if seconds else "-" for seconds in times)])
        if len(runs) == 1:
            heads = ["phase", "a step, median rank", "share", "slowest rank"]
            total = sum(part.median for part in found[0].values()) or 1.0
            slowest = f"{_ms(found[0][name].slowest)} (rank {found[0][name].rank})"
            rows[-1] += [f"{100 * times[0] / total:.1f} %", slowest]
    figure.update_layout(
        hovermode="closest",
        yaxis={
            "visible": len(runs) > 1,
            "autorange": "reversed",
            "tickvals": list(range(len(runs))),
            "ticktext": [_name(run) for run in runs],
        },
    )
    return Chart(identity, "A step by phase", figure, heads, rows)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{1000 * seconds:,.0f} ms"


def accuracy_bars(identity: str, title: str, bars: Sequence[Bar]) -> Chart:
    """Accuracies in percent, grouped by how they were measured, over the level of guessing."""
    figure = _figure(height=360, yaxis={"range": [0, 105], "ticksuffix": " %"}, hovermode=False)
    for name in names_of(bars):
        mine = [bar for bar in bars if bar.name == name]
        figure.add_bar(
            name=name,
            x=[html.escape(bar.group).replace("\n", "<br>") for bar in mine],
            y=[100 * bar.value for bar in mine],
            texttemplate="%{y:.1f}",
            textposition="outside",
        )
    chance = min(bar.chance for bar in bars)
    figure.add_hline(100 * chance, line={"dash": "dot", "width": 1}, name="chance", showlegend=True)
    rows = [[" ".join(bar.group.split()), bar.name, f"{100 * bar.value:.1f} %"] for bar in bars]
    rows.append(["chance", "guessing", f"{100 * chance:.1f} %"])
    return Chart(identity, title, figure, ("measured", "of", "top-1"), rows)


def similarity_histogram(identity: str, found: Mapping[str, npt.NDArray[np.float32]]) -> Chart:
    """Shares of pairs by their cosine: positives and negatives in the same axes."""
    figure = _figure(
        height=320, barmode="overlay", bargap=0, xaxis_title="cosine of two views' features"
    )
    low = min(float(cosine_P.min()) for cosine_P in found.values())
    edges = np.linspace(np.floor(low * 10) / 10, 1.0, 41)
    rows = []
    for name, cosine_P in found.items():
        share = 100 * np.histogram(np.clip(cosine_P, -1, 1), edges)[0] / len(cosine_P)
        figure.add_bar(
            name=name,
            x=(edges[1:] + edges[:-1]) / 2,
            y=share,
            opacity=0.6,
            hovertemplate="%{y:.2f} %",
        )
        quantiles = [cosine_P.mean(), *np.quantile(cosine_P, [0.05, 0.5, 0.95])]
        rows.append([name, f"{len(cosine_P):,}", *(f"{value:.2f}" for value in quantiles)])
    heads = ("", "pairs", "mean", "5 %", "median", "95 %")
    return Chart(identity, "Share of pairs (%) by similarity", figure, heads, rows)


def maps(found: EmbeddingMap) -> list[Chart]:
    """A map for each measure; a point's ``customdata`` is its image's place on the sheet."""
    samples = found.samples
    labels = np.unique(samples.labels_N)
    charts = []
    for number, (title, points_N2) in enumerate(found.points.items()):
        figure = _figure(height=480, hovermode="closest", dragmode="pan")
        figure.update_layout(showlegend=1 < len(labels) <= _MOST_NAMED)
        figure.update_xaxes(visible=False)
        figure.update_yaxes(visible=False)
        for place, label in enumerate(labels):
            mine_N = np.flatnonzero(samples.labels_N == label)
            figure.add_scatter(
                x=points_N2[mine_N, 0],
                y=points_N2[mine_N, 1],
                name=_name(samples.class_name(int(label))),
                mode="markers",
                marker={"symbol": place % _SYMBOLS, "size": 8},
                customdata=mine_N.tolist(),
                text=[f"sample {samples.ids_N[n]}" for n in mine_N],
                hovertemplate="%{text}",
            )
        rows = [[f"{len(points_N2)} images", "alike ones lie together"]]
        charts.append(Chart(f"map-{number}", title, figure, (), rows))
    return charts
