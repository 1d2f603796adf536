"""Which rank is slow, and in what: ranks compare the time of their own work every few steps.

Waiting does not count as work (:mod:`trainer.health.phases`): in a synchronous run one slow rank
makes all of them wait, and only its own work shows who it is.

Shapes: W ranks, P phases.
"""

import logging
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

import torch

from common.bounds import check_bounds
from common.collectives import gather_rows, waiting
from trainer.health.phases import PHASES, WAITS, Phases
from trainer.telemetry import Reader, Record

log = logging.getLogger(__name__)

_FEWEST_STEPS = 3  # of a reading; a save may come right after another reading
_WORTH_A_WORD = 0.1  # of a step: what a phase must lose before anybody is blamed


@dataclass(frozen=True, kw_only=True)
class StragglerConfig:
    """When a rank counts as slow."""

    factor: float = 1.5
    """Its own work, in all or in one phase, takes so many times the median of the ranks; 0: no
    comparison."""
    readings: int = 3
    """In so many readings of the telemetry in a row."""

    def __post_init__(self) -> None:
        if self.factor:
            check_bounds(self, "--straggler.", factor="(1, inf)")
        check_bounds(self, "--straggler.", readings="[1, 1e9]")


class Stragglers(Reader):
    """Compares the ranks' phases and remembers who was slow; the rank that ``speaks`` warns."""

    show: Callable[[Mapping[str, Sequence[float]], Container[int]], None] | None = None
    """Is told of every reading: seconds since the last one by phase and rank, and who is slow."""

    def __init__(
        self, config: StragglerConfig, phases: Phases, device: torch.device, speaks: bool
    ) -> None:
        self._config, self._phases, self._device, self._speaks = config, phases, device, speaks
        self._slow_for: dict[int, int] = {}
        self._named: dict[int, str] = {}

    def complete(self, records: list[Record]) -> None:
        """Compare the seconds since the last time, and add them to the newest record.

        ``phase_seconds`` (see :func:`summary`) and ``stragglers``, a number of ranks. A collective,
        one all-gather of a few numbers; not where there is nothing to compare yet: ranks take the
        same steps, so on all of them.
        """
        steps = self._phases.steps
        if not self._config.factor or steps < _FEWEST_STEPS:
            return
        row = torch.tensor([self._phases.harvest()], dtype=torch.float64, device=self._device)
        with waiting("seconds of all ranks: all-gather"):
            rows_WP = gather_rows(row).tolist()
        seconds = {name: [row[i] for row in rows_WP] for i, name in enumerate((*PHASES, WAITS))}
        slow = self.judge(seconds)
        records[-1]["phase_seconds"] = summary(seconds)
        records[-1]["stragglers"] = len(slow)
        if self.show is not None:
            self.show({name: [steps * s for s in values] for name, values in seconds.items()}, slow)

    def judge(self, seconds: dict[str, list[float]]) -> dict[int, str]:
        """Ranks that have been slow for long enough, with a reason.

        Args:
            seconds: mean seconds of a step by phase and rank; waits are not judged.
        """
        work = {name: values for name, values in seconds.items() if name != WAITS}
        work["its own work"] = [sum(values) for values in zip(*work.values())]
        # All ranks take the same step: the longest sum of work and waits is its time.
        step = max(sum(values) for values in zip(*seconds.values()))
        world_size = len(work["its own work"])
        for rank in range(world_size):
            reason = self._slow(rank, work, step)
            self._slow_for[rank] = self._slow_for.get(rank, 0) + 1 if reason else 0
            if self._slow_for[rank] >= self._config.readings:
                if rank not in self._named and self._speaks:
                    log.warning("rank %d is slow: %s; look at its node", rank, reason)
                self._named[rank] = reason
            elif not reason and rank in self._named:
                del self._named[rank]
                if self._speaks:
                    log.info("rank %d is as fast as the others again", rank)
        return dict(self._named)

    def _slow(self, rank: int, work: dict[str, list[float]], step: float) -> str:
        """In what the rank lags most; empty where it does not."""
        worst, reason = 0.0, ""
        for name, values in work.items():
            usual, mine = median_low(values), values[rank]
            excess = mine - usual
            if mine > self._config.factor * usual and excess > max(worst, _WORTH_A_WORD * step):
                worst = excess
                reason = f"{name} takes {_ms(mine)} a step, {_ms(usual)} on the median rank"
        return reason


def summary(seconds: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """By phase: the median of the ranks, the most, and the rank that has it."""
    return {
        phase: {
            "median": round(median_low(values), 6),
            "max": round(max(values), 6),
            "rank": values.index(max(values)),
        }
        for phase, values in seconds.items()
    }


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"
