"""Ends a run that hangs, and says which rank did not come to which collective.

A thread of every rank looks at what the main thread did last
(:class:`trainer.health.phases.Phases`) and writes it to the rank's heartbeat file. When the main
thread has stayed in one place for too long, every rank writes the stacks of all its threads to
RUN/stacks, one of them says in a line who is missing where, and all end with the status of a run
that may be tried again. They end by ``os._exit``: the main thread may be inside a collective that
never returns.

A rank that is stopped or gone cannot end itself. Its launcher does it, as soon as the others ended:
torchrun's agent and ``srun -K`` kill what is left of a run.
"""

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TextIO

from common.bounds import check_bounds
from common.collectives import collectives_entered
from common.errors import RankLostError, first_sentence
from common.files.atomic_file import as_utf8, open_to_append
from common.rendezvous import JOIN_TIMEOUT
from trainer.health import heartbeat
from trainer.health.heartbeat import Heartbeat, Looks, verdict, where
from trainer.health.phases import Phases, Place

log = logging.getLogger(__name__)

RETRYABLE_STATUS = 74
"""``launch.exit_codes.ExitCode.RETRYABLE``, which nothing here may import."""

_STANDSTILL = 3.0  # seconds of lateness of the thread that are worth a word
_SLOWEST = 5.0  # times a usual step that a place may take, whatever the timeout
_SLACK = 30.0  # seconds after the limit in which the thread must have had its turn
_BEATS = 3  # that a rank must miss to be silent
_MOST_READERS = 64  # ranks; on more, one of each node reads the others' files
_MOST_LETTERS = 2000  # of an error's message
_FAILED_COLLECTIVE = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """When a run counts as hanging."""

    timeout: float = 300.0
    """Seconds that a rank may stay in one part of a step or one collective before the run is ended
    to be started again, or 5 times a usual step where that is more; 0: for ever."""
    patience: float = 3600.0
    """The same for the first step, which compiles kernels, for evaluations and checkpoints."""
    warning: float = 60.0
    """Seconds after which a warning says where the run stands; 0: none."""
    join_timeout: float = JOIN_TIMEOUT
    """Seconds to wait at the start for the other processes; 0: for ever."""

    def __post_init__(self) -> None:
        seconds = ("timeout", "patience", "warning", "join_timeout")
        check_bounds(self, "--watchdog.", **dict.fromkeys(seconds, "[0, 1e9]"))


class Watchdog:
    """Watches this rank's main thread, and the heartbeats of the others.

    Args:
        config: its settings.
        phases: what the main thread does.
        run: the run's folder, the same for all ranks.
        speaks: whether this rank reports on a run of very many processes: one of each node.
    """

    def __init__(
        self,
        config: WatchdogConfig,
        phases: Phases,
        run: Path,
        *,
        rank: int,
        world_size: int,
        speaks: bool = True,
    ) -> None:
        self._config, self._phases = config, phases
        self._folder, self._stacks = run / "heartbeats", run / "stacks"
        self._rank, self._world_size = rank, world_size
        self._reads = speaks or world_size <= _MOST_READERS
        self._mine = heartbeat.own(rank)
        self._beating = threading.Lock()  # the main thread has the last word, and a last but one
        self._warned: Place | None = None
        self._told: tuple[Place, int] | None = None
        self._write_failed = False
        self._closing, self._ending = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._interval = min(5.0, (config.timeout or 60.0) / 4, (config.warning or 60.0) / 4)
        """Seconds between two beats."""

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the context lasts, and leave word of how it ended. Not a collective.

        Raises:
            RankLostError: a collective failed because another rank is gone or went elsewhere.
        """
        self._beat()
        if self._config.timeout:
            self._thread.start()
        try:
            yield
        except RuntimeError as error:
            if self._world_size == 1 or not any(w in str(error) for w in _FAILED_COLLECTIVE):
                raise
            if self._ending.is_set():
                self._thread.join()  # it has the report already, and ends the process
            raise self._explained(error) from error
        finally:
            self._closing.set()
            if self._thread.is_alive():
                self._thread.join()
            kind, raised, _ = sys.exc_info()
            why = " ".join(str(raised or "").split())[:_MOST_LETTERS]
            self._mine = replace(self._mine, ended=kind.__name__ if kind else "done", why=why)
            self._beat()

    def _explained(self, error: RuntimeError) -> RankLostError:
        found = self._verdict(self._look_at_others(most=_BEATS))
        return RankLostError(
            f"{where(self._phases.place)}: {found} ({first_sentence(error)}); the same"
            " command starts the run again, unless another rank says what to mend"
        )

    def _watch(self) -> None:
        try:
            self._stacks.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open_to_append(self._stack_path) as stacks:
                try:
                    self._watch_until_closed(stacks)
                finally:
                    faulthandler.cancel_dump_traceback_later()  # before the file is closed
        except OSError as error:
            log.warning("%s: the watchdog cannot write there and ends (%s)", self._stacks, error)
            return
        with contextlib.suppress(FileNotFoundError):
            if not self._stack_path.stat().st_size:
                self._stack_path.unlink()

    def _watch_until_closed(self, stacks: TextIO) -> None:
        tick = min(1.0, self._interval)
        last_beat = before = time.monotonic()
        while not self._closing.wait(tick):
            now = time.monotonic()
            # Of the first step, which compiles for seconds at a time, it is expected and was said.
            if now - before > tick + _STANDSTILL and not self._phases.place.patient:
                log.warning(
                    "[rank %d] this process stood still for %.1f s: stopped, swapped out, or held"
                    " by one long call; the other ranks waited",
                    self._rank,
                    now - before - tick,
                )
            before = now
            if now - last_beat >= self._interval:
                last_beat = now
                # Its own thread needs no interpreter lock: it ends a process in which this one
                # cannot run, because native code holds the lock for ever.
                faulthandler.dump_traceback_later(self._limit() + _SLACK, exit=True, file=stacks)
                self._beat()
            self._look(stacks)

    def _limit(self) -> float:
        if self._phases.place.patient:
            return max(self._config.patience, self._config.timeout)
        return max(self._config.timeout, _SLOWEST * self._phases.typical_step)

    def _look(self, stacks: TextIO) -> None:
        place = self._phases.place
        still, limit = time.monotonic() - place.since, self._limit()
        if still > limit:
            self._end(place, limit, stacks)
        words = int(still / self._config.warning) if self._config.warning else 0
        if place.patient and words and self._rank == 0 and self._told != (place, words):
            self._told = (place, words)
            log.info("%s for %.0f s: this may take long", where(place), still)
        warn = self._config.warning * (limit / self._config.timeout if place.patient else 1)
        if 0 < warn < still and self._warned != place and self._reads:
            self._warned = place
            looks = Looks(self._rank, {}, self._read())
            if self._speaks_first(looks):
                log.warning(
                    "[rank %d] no progress for %.0f s at %s: %s",
                    self._rank,
                    still,
                    _where(place),
                    self._verdict(looks),
                )

    def _beat(self) -> None:
        if self._mine.beat and not self._folder.is_dir():
            return  # rank 0 has cleared away a run that did not begin
        place = self._phases.place
        with self._beating:
            self._mine = replace(
                self._mine,
                beat=self._mine.beat + 1,
                step=place.step,
                phase=place.phase,
                waiting=place.waiting,
                still_seconds=round(time.monotonic() - place.since, 3),
                collectives=collectives_entered(),
            )
            try:
                heartbeat.write(self._folder, self._mine)
                self._write_failed = False
            except OSError as error:
                if not self._write_failed:
                    log.warning("%s: cannot be written (%s)", self._folder, error)
                self._write_failed = True

    @property
    def _stack_path(self) -> Path:
        return self._stacks / f"rank-{self._rank:05d}-pid-{os.getpid()}.txt"

    def _end(self, place: Place, limit: float, stacks: TextIO) -> None:
        """Write stacks and the report, and end this process. Does not return."""
        self._ending.set()
        self._mine = replace(self._mine, hung=True)
        stuck = f"{_where(place)}, for more than {limit:g} s"
        with contextlib.suppress(OSError):  # a full disk must not keep a hung process alive
            stacks.write(f"rank {self._rank}, {stuck}\n")
            stacks.flush()
            faulthandler.dump_traceback(file=stacks, all_threads=True)
        looks = self._look_at_others(most=4 * _BEATS)
        line = f"{stuck}: {self._verdict(looks)}"
        if self._speaks_first(looks):
            said = f"hung at {line}; stacks of all ranks are in {self._stacks}"
            said += "; start the run again and it goes on from its checkpoint"
            os.write(2, as_utf8(f"[rank {self._rank}] widebatch: error: {said}\n"))
        self._beat_on()  # what ends too early would be taken for the rank that is missing
        with contextlib.suppress(OSError):
            stacks.write(f"\n{line}\n")
            stacks.flush()
        for handler in logging.getLogger().handlers:
            handler.flush()
        os._exit(RETRYABLE_STATUS)

    def _look_at_others(self, most: int) -> Looks:
        """Two looks, with time for another word of all between them.

        Args:
            most: beats to wait, at least 3, until all that live have found that the run hangs.
        """
        beats = self._read() if self._reads else {}
        first = {rank: found.beat for rank, found in beats.items()}
        for passed in range(1, most + 1):
            self._beat_on()
            looks = Looks(self._rank, first, self._read() if self._reads else {})
            waits_for = [rank for rank, found in looks.now.items() if not found.hung]
            if passed >= _BEATS and not any(looks.lives(rank) for rank in waits_for):
                break
        return looks

    def _read(self) -> dict[int, Heartbeat]:
        return heartbeat.read(self._folder, range(self._world_size))

    def _beat_on(self) -> None:
        self._beat()
        time.sleep(self._interval)

    def _verdict(self, looks: Looks) -> str:
        return verdict(looks, self._world_size) if self._reads else "another rank reports"

    def _speaks_first(self, looks: Looks) -> bool:
        """Whether no rank before this one can report."""
        return self._reads and not any(looks.lives(rank) for rank in range(self._rank))


def _where(place: Place) -> str:
    """With the innermost line of ours that the main thread is in, while it is still there."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    root = Path(__file__).resolve().parents[2]
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        ours = path.is_relative_to(root) and ".venv" not in path.parts
        if ours and path.name != "watchdog.py":
            return f"{where(place)} ({path.relative_to(root)}:{frame.f_lineno})"
        frame = frame.f_back
    return where(place)
