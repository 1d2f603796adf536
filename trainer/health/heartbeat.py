"""A small file for each rank in the run's folder that says where the rank is, for all to read.

Files, because the run's folder is what all nodes share; a store would die with the process that
keeps it. No clocks are compared: a rank is silent when its count of beats does not move between two
looks of the same reader.
"""

import dataclasses
import os
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from common.errors import DataError
from common.files.strict_json import dump_json, read_json_file

_NAME = re.compile(r"rank-([0-9]{5,9})\.json")
_REQUIRED = {"rank", "host", "pid", "started"}
_MOST_BYTES = 1 << 16  # of a file: a hundred times what one has


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

    def where(self) -> str:
        """For a person."""
        return place(self.step, self.phase, self.waiting)


def place(step: int, phase: str, waiting: str) -> str:
    """Where a rank is, for a person."""
    inside = f" in '{waiting}'" if waiting else ""
    return f"step {step}, {phase}{inside}"


def own(rank: int) -> Heartbeat:
    """The first heartbeat of this process."""
    pid = os.getpid()
    return Heartbeat(rank=rank, host=socket.gethostname(), pid=pid, started=_started(pid) or 0)


def path_of(folder: Path, rank: int) -> Path:
    """Where a rank's heartbeat stands."""
    return folder / f"rank-{rank:05d}.json"


def write(folder: Path, heartbeat: Heartbeat) -> None:
    """Replace the rank's file.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = path_of(folder, heartbeat.rank)
    temporary = path.with_name(f".writing-{path.name}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(dump_json(dataclasses.asdict(heartbeat)))
    temporary.replace(path)


def read_all(folder: Path, world_size: int) -> dict[int, Heartbeat]:
    """The newest heartbeats by rank; a rank whose file is not there or not whole is left out."""
    return _read_these(folder, range(world_size))


def read_present(folder: Path, world_size: int) -> dict[int, Heartbeat]:
    """The same by the folder's list of files, which ``world_size`` cannot make long.

    For a look from outside, where the number is a file's word. A shared file system may be late
    with such a list: ranks that wait for each other ask for the files by name.
    """
    return _read_these(folder, (rank for rank in ranks_in(folder) if rank < world_size))


def ranks_in(folder: Path) -> list[int]:
    """Ranks that have a file there, in order; none where there is no folder."""
    try:
        names = [_NAME.fullmatch(entry.name) for entry in os.scandir(folder)]
    except FileNotFoundError:
        return []
    return sorted(int(name[1]) for name in names if name)


def _read_these(folder: Path, ranks: Iterable[int]) -> dict[int, Heartbeat]:
    found = {}
    for rank in ranks:
        heartbeat = _read(path_of(folder, rank))
        if heartbeat is not None and heartbeat.rank == rank:
            found[rank] = heartbeat
    return found


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
