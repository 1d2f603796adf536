"""What can happen to a run, drawn from a seed."""

import random
import signal
from dataclasses import dataclass

FAULT_POINT = "fault point"
SIGNAL = "signal"
PAUSE = "pause"

# Deaths in the middle of a save, at every point where that could leave something half done.
_SAVE_POINTS = (
    *("checkpoint.copy", "checkpoint.folder", "checkpoint.write", "checkpoint.sync"),
    *("checkpoint.manifest", "checkpoint.rename", "checkpoint.renamed", "checkpoint.point"),
)


@dataclass(frozen=True)
class Disturbance:
    """One thing that happens to one start of a run."""

    kind: str
    """A fault point of the program's own, a signal from outside, or a pause (SIGSTOP, SIGCONT)."""
    steps: int
    """Steps that the start has done when a signal or a pause comes."""
    ranks: tuple[int, ...]
    """Who gets the signal."""
    number: int = 0
    """Of the signal."""
    fault: str = ""
    """What ``WIDEBATCH_FAULTS`` is set to."""

    def __str__(self) -> str:
        if self.kind == FAULT_POINT:
            return self.fault
        ranks = "all ranks" if len(self.ranks) > 1 else f"rank {self.ranks[0]}"
        name = "SIGSTOP for 3 s" if self.kind == PAUSE else signal.Signals(self.number).name
        return f"{name} to {ranks} after {self.steps} steps"


def draw(random_: random.Random, world_size: int) -> Disturbance:
    """The next disturbance; the same sequence for the same generator.

    Args:
        random_: a seeded generator, which advances.
        world_size: processes of the run.
    """
    # Late enough for a checkpoint of this start, which saves every second step.
    steps, rank = random_.randint(3, 5), random_.randrange(world_size)
    everyone = tuple(range(world_size))
    kind = random_.choice((FAULT_POINT, FAULT_POINT, SIGNAL, SIGNAL, PAUSE))
    if kind == FAULT_POINT:
        return Disturbance(kind, steps, (rank,), fault=_draw_fault(random_, rank))
    if kind == PAUSE:
        return Disturbance(kind, steps, (rank,))
    number = random_.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
    alone = number == signal.SIGKILL or random_.random() < 0.5
    return Disturbance(kind, steps, (rank,) if alone else everyone, number=number)


def _draw_fault(random_: random.Random, rank: int) -> str:
    what = random_.choice(("kill in a save", "disk", "kill in a step", "slow"))
    if what == "kill in a save":
        return f"{random_.choice(_SAVE_POINTS)} rank=0 pass={random_.randint(2, 3)} kill"
    if what == "disk":
        point = random_.choice(("checkpoint.write", "checkpoint.sync", "checkpoint.rename"))
        return f"{point} rank=0 pass={random_.randint(1, 3)} raise:ENOSPC"
    if what == "kill in a step":
        return f"step.start rank={rank} pass={random_.randint(3, 6)} kill"
    return f"step.start rank={rank} pass={random_.randint(1, 6)} sleep:1"
