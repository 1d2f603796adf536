"""A progress bar on a terminal, a line per interval in a log."""

import logging
import sys
import time

from tqdm import tqdm

_INTERVAL = 10.0  # seconds between lines
_log = logging.getLogger(__name__)


class Progress:
    """Counts towards ``total``; shows itself on standard error while in its ``with`` block.

    Args:
        title: what is being done.
        total: in units.
        unit: a plural ("images"), or "B" for bytes, which are shown scaled.
        enabled: False shows nothing.
    """

    def __init__(self, title: str, total: int, unit: str, enabled: bool = True) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._done = 0
        self._start = self._last_line = time.monotonic()
        self._lines = enabled and not sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            desc=title,
            unit=unit if unit == "B" else f" {unit}",
            unit_scale=unit == "B",
            disable=not enabled or self._lines,
            dynamic_ncols=True,
        )

    def advance(self, count: int = 1) -> None:
        """So much more is done."""
        self._done += count
        self._bar.update(count)
        if self._lines and time.monotonic() - self._last_line >= _INTERVAL:
            self._last_line = time.monotonic()
            self._line()

    def _line(self) -> None:
        rate = self._done / max(time.monotonic() - self._start, 1e-9)
        left = (self._total - self._done) / rate if rate else 0.0
        scale, unit = (1e6, "MB") if self._unit == "B" else (1, self._unit)
        _log.info(
            f"{self._title}: {self._done / scale:.0f} of {self._total / scale:.0f} {unit}, "
            f"{rate / scale:.0f} {unit}/s, {left:.0f} s left"
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        if self._lines and kind is None:
            self._line()
