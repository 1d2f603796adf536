"""Readers for a person: a progress bar on a terminal, log lines elsewhere."""

import logging
import os
import sys
import time
from typing import Any

from trainer.telemetry.stream import Reader, Record

log = logging.getLogger(__name__)


class ProgressBar(Reader):
    """A bar on the terminal: loss, learning rate, images per second, time left."""

    def __init__(self, total: int, done: int) -> None:
        self._total, self._done = total, done
        self._bar: Any = None
        self._knn = ""

    def _open(self) -> Any:
        from tqdm import tqdm

        has_width = os.isatty(2) and os.get_terminal_size(2).columns > 0  # some terminals say 0
        return tqdm(
            total=self._total,
            initial=self._done,
            bar_format="{n_fmt}/{total_fmt} {bar} {remaining}{postfix}",  # all in 80 columns
            miniters=1,  # else the bar stands still when steps become slower than they were
            ncols=None if has_width else 100,
            dynamic_ncols=has_width,
            file=sys.stderr,
        )

    def count(self) -> None:
        """Advance the bar; it appears with the first step, below what the run says before."""
        self._done += 1
        if self._bar is None:
            self._bar = self._open()
        else:
            self._bar.update()

    def read(self, records: list[Record]) -> None:
        """Show the newest record beside the bar."""
        for record in records:
            if "knn_top1" in record:
                self._knn = f"{record['knn_top1']:.1%}"
        last = records[-1]
        facts = {
            "loss": f"{last['loss']:.3f}",
            "lr": f"{last['lr']:.3g}",
            "img/s": f"{last['images_per_second']:.0f}",
        }
        if self._knn:
            facts["knn"] = self._knn
        self._bar.set_postfix(facts)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


class LogLines(Reader):
    """A line every so many ``seconds`` where there is no terminal; ``done`` are earlier steps."""

    def __init__(self, total: int, seconds: float, done: int = 0) -> None:
        self._total, self._seconds, self._done = total, seconds, done
        self._said = self._started = time.monotonic()
        self._steps = 0

    def count(self) -> None:
        """Say where the run is until the first reading of the device, which may take long."""
        self._done += 1
        now = time.monotonic()
        if not self._steps and now - self._said >= self._seconds:
            log.info("step %d/%d", self._done, self._total)
            self._said = now

    def read(self, records: list[Record]) -> None:
        """Log the newest record if it is time, or it is the last, or it carries a kNN result."""
        self._steps += len(records)
        last, now = records[-1], time.monotonic()
        due = now - self._said >= self._seconds
        if due or last["step"] == self._total or "knn_top1" in last:
            left = (now - self._started) / self._steps * (self._total - last["step"])
            clock = time.strftime("%H:%M:%S", time.gmtime(left))
            parts = [f"step {last['step']}/{self._total}", f"epoch {last['epoch']}"]
            parts += [f"loss {last['loss']:.4f}", f"lr {last['lr']:.4g}"]
            parts += [f"{last['images_per_second']:.0f} img/s"]
            if "knn_top1" in last:
                parts += [f"kNN {last['knn_top1']:.1%} (best {last['knn_best_top1']:.1%})"]
            if "linear_top1" in last:
                parts += [f"linear {last['linear_top1']:.1%}"]
            parts += [f"ETA {clock if left < 86400 else f'{left / 3600:.0f} h'}"]
            log.info("%s", "  ".join(parts))
            self._said = now
