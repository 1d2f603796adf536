"""Who is missing from which collective, worked out from the ranks' heartbeats."""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from common.errors import RankLostError
from trainer.health.heartbeat import Heartbeat, process_state

_MOST_NAMED = 8  # ranks in a line


class Looks(NamedTuple):
    """Two looks at the heartbeats by one reader, some beats apart."""

    reader: int
    """The rank that looks."""
    first: Mapping[int, int]
    """Beats by rank; empty where there was one look only, which tells nobody silent."""
    now: Mapping[int, Heartbeat]

    def lives(self, rank: int) -> bool:
        """Whether the rank can still come, or speak for itself."""
        found = self.now.get(rank)
        return found is not None and not found.ended and not self.lost(rank)

    def lost(self, rank: int) -> str:
        """Why the rank can come no more; empty if it can."""
        found = self.now.get(rank)
        if found is None:
            return "has never reported (do all nodes share the run's folder?)"
        if rank == self.reader:
            return ""
        last = f"(pid {found.pid} on {found.host}, last at {found.where()})"
        if found.ended:
            return f"has ended ({found.ended}) {last}"
        state = process_state(found)
        if state:
            return f"is {state} {last}"
        return f"is silent {last}" if self.first.get(rank) == found.beat else ""


def verdict(looks: Looks, world_size: int) -> str:
    """In one line: the collective that most ranks are in, and those that are elsewhere, or lost.

    All ranks enter the collectives of a group in one order, so the rank with the smaller count has
    not come to the one that the others are in; with the same count and another name, it has left
    one out.

    Args:
        looks: at the heartbeats.
        world_size: number of ranks.
    """
    # Those that ended for the loss of a rank are its victims, like those that wait.
    victims = {r for r, found in looks.now.items() if found.ended == RankLostError.__name__}
    lost = {rank: looks.lost(rank) for rank in range(world_size) if rank not in victims}
    present = [looks.now[rank] for rank, why in lost.items() if not why]
    furthest = max((found.collectives for found in present), default=0)
    arrived = [found for found in present if found.collectives == furthest]
    places = Counter(found.waiting or found.phase for found in arrived)
    place, count = places.most_common(1)[0] if places else ("nothing known", 0)
    reasons = [f"rank {rank} {why}" for rank, why in lost.items() if why]
    for found in present:
        if found.collectives < furthest:
            reasons.append(f"rank {found.rank} did not join: it is at {found.where()}")
        elif (found.waiting or found.phase) != place:
            reasons.append(f"rank {found.rank} is in another: {found.where()}")
    reasons = reasons or ["all ranks have joined: the network or a device is at fault"]
    return f"{count} of {world_size} ranks are in '{place}'; {_listed(reasons)}"


def _listed(parts: list[str]) -> str:
    more = len(parts) - _MOST_NAMED
    return "; ".join(parts[:_MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
