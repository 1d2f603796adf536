"""A process that stands in for a rank: it lives, is suspended and dies, and does nothing else."""

import contextlib
import dataclasses
import signal
import subprocess
import time
from collections.abc import Iterator

from trainer.health import heartbeat
from trainer.health.heartbeat import Heartbeat


@contextlib.contextmanager
def sleeping_rank() -> Iterator[tuple["subprocess.Popen[bytes]", Heartbeat]]:
    """The process, and the heartbeat of rank 0 that it would write."""
    with subprocess.Popen(["sleep", "60"]) as process:
        started = heartbeat._started(process.pid) or 0
        try:
            yield process, dataclasses.replace(heartbeat.own(0), pid=process.pid, started=started)
        finally:
            process.kill()


def suspend(process: "subprocess.Popen[bytes]", beat: Heartbeat) -> None:
    """Stop it, and wait until the kernel says so."""
    process.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 20
    while heartbeat.process_state(beat) != "stopped" and time.monotonic() < deadline:
        time.sleep(0.01)
