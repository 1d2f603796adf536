"""The processes of one start of a run: started, disturbed, waited for, and looked for later."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.exit_codes import ExitCode
from tests.chaos.disturbances import PAUSE, Disturbance
from tests.faults import armed

MARK = "WIDEBATCH_CHAOS"
"""In the environment of every process that chaos starts: by it they are found again."""

_PAUSE_SECONDS = 3.0


@dataclass(frozen=True)
class Ended:
    """How the processes of one start ended."""

    codes: tuple[int, ...]
    """By rank; negative: the signal that ended it."""
    hung: bool
    """Whether some had to be killed when the time was over."""
    errors: str
    """The last lines that they wrote."""

    @property
    def done(self) -> bool:
        """Whether the run has had its last step."""
        return set(self.codes) == {int(ExitCode.DONE)}

    def unexpected(self) -> str | None:
        """What about this end breaks the promises, if anything does.

        A process may end well, say that the same command is worth another try, or have been killed;
        it may not fail, and it may not hang.
        """
        if self.hung:
            return "processes were left hanging"
        fair = (ExitCode.DONE, ExitCode.RETRYABLE, ExitCode.PREEMPTED, -signal.SIGKILL)
        wrong = [code for code in self.codes if code not in fair]
        return f"unexpected exit code {wrong[0]}" if wrong else None


def run_start(
    command: Sequence[str],
    world_size: int,
    log: Path,
    mark: str,
    disturbance: Disturbance | None,
    metrics: Path,
    timeout: float,
) -> Ended:
    """Start all ranks, disturb them as drawn, and wait for their ends.

    Args:
        command: arguments of ``python -m launch``.
        world_size: number of processes.
        log: file for what they write.
        mark: value of the environment variable :data:`MARK`.
        disturbance: what happens to them; none: nothing.
        metrics: the run's ``metrics.jsonl``, which tells how far it is.
        timeout: seconds until all must have ended.
    """
    deadline = time.monotonic() + timeout
    before = _lines(metrics)
    with log.open("ab") as output:
        ranks: list[subprocess.Popen[bytes]] = []
        port = _port()
        for rank in range(world_size):
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-P", "-m", "launch", *command],
                    env=_environment(rank, world_size, port, mark, disturbance),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
            )
        try:
            if disturbance is not None and not disturbance.fault:
                _disturb(ranks, disturbance, metrics, before, deadline)
            hung = _wait(ranks, deadline)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
    text = log.read_text(errors="replace")
    return Ended(tuple(process.returncode for process in ranks), hung, text[-2000:])


def _environment(
    rank: int, world_size: int, port: int, mark: str, disturbance: Disturbance | None
) -> Mapping[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC_"))}
    return {
        **clean,
        "OMP_NUM_THREADS": "1",
        "WIDEBATCH_FAULTS": armed(disturbance.fault if disturbance is not None else ""),
        MARK: mark,
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _disturb(
    ranks: Sequence["subprocess.Popen[bytes]"],
    disturbance: Disturbance,
    metrics: Path,
    before: int,
    deadline: float,
) -> None:
    while _lines(metrics) < before + disturbance.steps:
        if time.monotonic() > deadline or any(process.poll() is not None for process in ranks):
            return
        time.sleep(0.05)
    for rank in disturbance.ranks:
        pause = disturbance.kind == PAUSE
        ranks[rank].send_signal(signal.SIGSTOP if pause else disturbance.number)
        if pause:
            time.sleep(_PAUSE_SECONDS)
            ranks[rank].send_signal(signal.SIGCONT)


def _wait(ranks: Sequence["subprocess.Popen[bytes]"], deadline: float) -> bool:
    for process in ranks:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return True
    return False


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def left_behind(mark: str) -> list[str]:
    """Command lines of live processes of this session of chaos."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        # It may end meanwhile, or be another user's.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if wanted in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_text().replace("\0", " ").strip())
    return found
