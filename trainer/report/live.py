"""A page that follows a run: made anew when the run's files change, the costly parts seldom.

What the encoder sees is looked at in a thread of its own, once for each checkpoint, while the
curves go on.
"""

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import ConfigError, DataError
from trainer.report.contents import read_contents
from trainer.report.page import page
from trainer.report.pictures import COMPARED, Pictures, make_pictures
from trainer.state.run_data import read_settings
from trainer.state.run_list import read_run

log = logging.getLogger(__name__)

_WAITING = Pictures(missing=(("pictures", "being made; they appear here when they are ready"),))
_FILES = ("config.json", "metrics.jsonl", "checkpoints/latest.json", "evaluation", "tensorboard")


class LiveReport:
    """The newest page of one or more runs, from any thread.

    It and the page look at the folders every so many ``seconds``; ``max_images`` and ``device`` are
    as of :func:`trainer.report.pictures.make_pictures`.

    Raises:
        ConfigError: one of them is no run's folder.
    """

    def __init__(
        self, runs: Sequence[Path], seconds: float, *, max_images: int, device: str
    ) -> None:
        self._runs, self._seconds = list(runs), seconds
        self._max_images, self._device = max_images, device
        self._lock = threading.Lock()
        self._pictures = _WAITING if len(self._runs) == 1 else COMPARED
        self._turns = 0  # pictures that have come
        self._pictured = -1
        self._thread: threading.Thread | None = None
        self._checked = 0.0
        self._seen = self._stamps()
        self._page = self._make()

    def page(self) -> str:
        """The page as of now; folders are looked at once in so many seconds."""
        with self._lock:
            if time.monotonic() - self._checked >= self._seconds:
                self._check()
            return self._page

    def _check(self) -> None:
        self._picture_if_new()
        seen = self._stamps()
        if seen != self._seen:
            try:
                self._page = self._make()
                self._seen = seen
            except (ConfigError, DataError, OSError) as error:
                # A file was being written or the folder is gone: the last page stands.
                log.debug("not refreshed: %s", error)
        self._checked = time.monotonic()

    def _stamps(self) -> tuple[int, list[list[Any]]]:
        """Of what a page is made of; taken before it is read, so that no change is missed."""
        return self._turns, [_stamp(run) for run in self._runs]

    def _make(self) -> str:
        return page(read_contents(self._runs, self._pictures), live_seconds=self._seconds)

    def _picture_if_new(self) -> None:
        if len(self._runs) > 1:
            return
        (run,) = self._runs
        newest = _changed_at(run / "checkpoints" / "latest.json")
        if newest != self._pictured and not (self._thread and self._thread.is_alive()):
            self._pictured = newest
            self._thread = threading.Thread(target=self._picture, args=(run,), daemon=True)
            self._thread.start()

    def _picture(self, run: Path) -> None:
        try:
            found = make_pictures(
                run, read_settings(run), max_images=self._max_images, device=self._device
            )
        except Exception as error:  # whatever it is, the curves go on, and the page says it
            log.exception("no pictures")
            found = Pictures(missing=(("pictures", str(error) or type(error).__name__),))
        with self._lock:
            self._pictures, self._turns = found, self._turns + 1
            self._checked = 0.0


def _stamp(run: Path) -> list[Any]:
    facts = read_run(run)
    # The reason why nothing is known counts seconds of silence; it would never be the same.
    why = "" if facts.state == "unknown" else facts.why
    return [facts.state, why, *(_changed_at(run / name) for name in _FILES)]


def _changed_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
