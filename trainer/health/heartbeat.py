"""A small file for each rank in the run's folder that says where the rank is, for all to read.

Together they tell who is missing from which collective: :func:`verdict`.

Files, because the run's folder is what all nodes share; a store would die with the process that
keeps it. No clocks are compared: a rank is silent when its count of beats does not move between two
looks of the same reader.
"""

import dataclasses
import os
import re
import socket
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common.errors import DataError, RankLostError
from common.files.strict_json import dump_json, read_json_file

if TYPE_CHECKING:
    from trainer.health.phases import Place

_NAME = re.compile(r"rank-([0-9]{5,9})\.json")
_REQUIRED = {"rank", "host", "pid", "started"}
_MOST_BYTES = 1 << 16  # of a file: a hundred times what one has
_MOST_NAMED = 8  # ranks in a line


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """What a rank said last."""

    rank: int
    host: str
    pid: int
    started: int
    """When the process started, clock ticks since the host did: pids come again."""
    beat: int = 0
    """Counts up while the process runs, whatever its main thread does."""
    step: int = 0
    phase: str = ""
    waiting: str = ""
    """The collective that its main thread is in; empty outside of them."""
    still_seconds: float = 0.0
    """How long the main thread has been there."""
    collectives: int = 0
    """Collectives that it has entered in the default process group."""
    hung: bool = False
    """Whether its watchdog is about to end it."""
    ended: str = ""
    """How the rank ended on its own account: "done", or the name of an error."""
    why: str = ""
    """What the error said, on one line."""


def where(at: "Heartbeat | Place") -> str:
    """Where a rank is, for a person."""
    inside = f" in '{at.waiting}'" if at.waiting else ""
    return f"step {at.step}, {at.phase}{inside}"


def own(rank: int) -> Heartbeat:
    """The first heartbeat of this process."""
    pid = os.getpid()
    return Heartbeat(rank=rank, host=socket.gethostname(), pid=pid, started=_started(pid) or 0)


def path_of(folder: Path, rank: int) -> Path:
    """Where a rank's heartbeat stands."""
    return folder / f"rank-{rank:05d}.json"


def write(folder: Path, heartbeat: Heartbeat) -> None:
    """Replace the rank's file."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = path_of(folder, heartbeat.rank)
    temporary = path.with_name(f".writing-{path.name}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(dump_json(dataclasses.asdict(heartbeat)))
    temporary.replace(path)


def read(folder: Path, ranks: Iterable[int]) -> dict[int, Heartbeat]:
    """The newest heartbeats by rank; a rank whose file is not there or not whole is left out."""
    found = {rank: _read(path_of(folder, rank)) for rank in ranks}
    return {rank: beat for rank, beat in found.items() if beat is not None and beat.rank == rank}


def ranks_in(folder: Path) -> list[int]:
    """Ranks that have a file there, in order, for a look from outside.

    A shared file system may be late with it: ranks that wait for each other ask for files by name.
    """
    try:
        names = [_NAME.fullmatch(entry.name) for entry in os.scandir(folder)]
    except FileNotFoundError:
        return []
    return sorted(int(name[1]) for name in names if name)


def _read(path: Path) -> Heartbeat | None:
    try:
        values = read_json_file(path, _MOST_BYTES)
    except (FileNotFoundError, DataError):
        return None
    like = dataclasses.asdict(Heartbeat(rank=0, host="", pid=0, started=0))
    if not _REQUIRED <= values.keys() <= like.keys():
        return None
    if any(type(value) is not type(like[name]) for name, value in values.items()):
        return None
    return Heartbeat(**values)


def process_state(heartbeat: Heartbeat) -> str:
    """What became of the rank's process where that can be seen: "gone", "stopped" or nothing."""
    if heartbeat.host != socket.gethostname():
        return ""
    if _started(heartbeat.pid) != heartbeat.started:
        return "gone"
    return {"T": "stopped", "t": "stopped", "Z": "gone"}.get(_field(heartbeat.pid, 0), "")


def _started(pid: int) -> int | None:
    text = _field(pid, 19)
    return int(text) if text else None


def _field(pid: int, index: int) -> str:
    """Of ``/proc/PID/stat``, counted from the state, which follows the name in brackets."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""  # gone, or not Linux
    return stat.rpartition(")")[2].split()[index]


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
        last = f"(pid {found.pid} on {found.host}, last at {where(found)})"
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
            reasons.append(f"rank {found.rank} did not join: it is at {where(found)}")
        elif (found.waiting or found.phase) != place:
            reasons.append(f"rank {found.rank} is in another: {where(found)}")
    reasons = reasons or ["all ranks have joined: the network or a device is at fault"]
    return f"{count} of {world_size} ranks are in '{place}'; {_listed(reasons)}"


def _listed(parts: list[str]) -> str:
    more = len(parts) - _MOST_NAMED
    return "; ".join(parts[:_MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
