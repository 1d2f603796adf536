"""Round numbers for axes, and how numbers read."""

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Scale = Literal["linear", "log"]


@dataclass(frozen=True)
class Axis:
    """Values from ``low`` to ``high`` on a line from 0 to 1."""

    low: float
    high: float
    ticks: tuple[float, ...]
    scale: Scale = "linear"

    def place(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Where values lie; NaN for what has no logarithm."""
        low, high = self.low, self.high
        if self.scale == "log":
            with np.errstate(divide="ignore", invalid="ignore"):
                values = np.where(values > 0, np.log10(values), np.nan)
            low, high = math.log10(low), math.log10(high)
        return (values - low) / (high - low)


def linear_axis(low: float, high: float, about: int = 5, *, tight: bool = False) -> Axis:
    """An axis with about so many round ticks; it ends at ticks unless it is to be ``tight``."""
    if not high > low:
        spread = abs(low) or 1.0
        low, high = low - spread / 2, high + spread / 2
    step = _round_step((high - low) / max(about - 1, 1))
    first = math.ceil(low / step - 1e-9) if tight else math.floor(low / step + 1e-9)
    last = math.floor(high / step + 1e-9) if tight else math.ceil(high / step - 1e-9)
    ticks = tuple(_rounded(n * step) for n in range(first, last + 1))
    return Axis(low, high, ticks) if tight else Axis(ticks[0], ticks[-1], ticks)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def _rounded(tick: float) -> float:
    return float(f"{tick:.12g}")  # without the dust of the multiplication


def log_axis(values: npt.NDArray[np.float64]) -> Axis | None:
    """A logarithmic axis for what is positive of values; ``None`` where that is nothing."""
    positive = values[np.isfinite(values) & (values > 0)]
    if not len(positive):
        return None
    low, high = float(positive.min()), float(positive.max())
    # What is a millionth of the rest, such as the last rate of a cosine, would flatten all else.
    low = max(low, high * 1e-6)
    decades = math.log10(high / low)
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    fine = [_rounded(f * 10.0**e) for e in exponents for f in (1, 2, 5)]
    if decades < 0.4:
        fine = [tick for tick in linear_axis(low, high).ticks if tick > 0]
    low = max((tick for tick in fine if tick <= low * 1.0001), default=low)
    high = min((tick for tick in fine if tick >= high * 0.9999), default=high)
    if not high > low:
        low, high = low / 2, high * 2
    shown = fine if decades < 2.5 else [_rounded(10.0**e) for e in exponents]
    inside = [tick for tick in shown if low * 0.9999 <= tick <= high * 1.0001]
    return Axis(low, high, tuple(inside[:: max(1, -(-len(inside) // 7))]), "log")


def labels(axis: Axis) -> list[str]:
    """Ticks as text; those of a linear axis with the decimals that tell them apart."""
    ticks = axis.ticks
    largest = max((abs(tick) for tick in ticks), default=0.0)
    if axis.scale == "log" or not 0.001 <= largest < 10_000:
        return [short(tick) for tick in ticks]
    gaps = [b - a for a, b in itertools.pairwise(ticks)] or [largest or 1.0]
    decimals = max(0, -math.floor(math.log10(min(gaps)) + 1e-9))
    return [f"{tick:.{decimals}f}" if decimals <= 4 else short(tick) for tick in ticks]


def short(value: float) -> str:
    """A number in few characters: 4.372, 12.5k, 3M, 2e-5."""
    if not math.isfinite(value):
        return "-"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            value, size = value / (1e3 if unit == "k" else size), 1.0
            return f"{value:.3g}{unit}"
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
