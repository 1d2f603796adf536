"""Talks to a Slurm cluster as a user does: sbatch, scontrol, scancel."""

import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
LOCAL_CLUSTER = CHECKOUT / "slurm" / "local_cluster.sh"


class Cluster:
    """A local cluster in ``folder``; see slurm/local_cluster.sh."""

    def __init__(self, folder: Path) -> None:
        self.environ = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        self.environ["WIDEBATCH_CLUSTER"] = str(folder)

    def control(self, *arguments: str) -> str:
        """Run ``local_cluster.sh``; its standard output."""
        return self.run(str(LOCAL_CLUSTER), *arguments, timeout=120)

    def up(self, *arguments: str) -> None:
        """Start the cluster, and from now on talk to it."""
        exported = re.findall(r"export (\w+)=(.*)", self.control("up", *arguments))
        self.environ.update(exported)

    def run(
        self,
        *command: str,
        environ: Mapping[str, str] | None = None,
        cwd: Path = CHECKOUT,
        timeout: float = 30,
        check: bool = True,
    ) -> str:
        """Standard output of a command, which must succeed unless ``check`` says otherwise."""
        result = subprocess.run(
            command,
            env=self.environ | dict(environ or {}),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert result.returncode == 0 or not check, f"{command}: {result.stderr}{result.stdout}"
        return result.stdout

    def submit(
        self,
        options: list[str],
        script: Path,
        *arguments: str,
        environ: Mapping[str, str] | None = None,
        cwd: Path,
    ) -> str:
        """``sbatch OPTIONS SCRIPT ARGUMENTS`` in ``cwd``; the job's number."""
        command = ["sbatch", "--parsable", *options, str(script), *arguments]
        return self.run(*command, environ=environ, cwd=cwd).strip()

    def job(self, number: str) -> dict[str, str]:
        """What ``scontrol show job`` knows."""
        text = self.run("scontrol", "-o", "show", "job", number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def signal(self, number: str, name: str = "USR1") -> None:
        """Signal the batch script only, as ``--signal=B:`` does before the time limit."""
        self.run("scancel", "--batch", f"--signal={name}", number)

    def wait(self, number: str, timeout: float = 60) -> dict[str, str]:
        """Until the job has ended for good."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")

        def has_ended() -> bool:
            return self.job(number)["JobState"] in ended

        eventually(has_ended, timeout, lambda: str(self.job(number)))
        return self.job(number)


def eventually(
    condition: Callable[[], bool], timeout: float, describe: Callable[[], str] = lambda: ""
) -> None:
    """Wait until ``condition`` holds; fail with ``describe()`` when it does not."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {describe()}"
        time.sleep(0.2)


def processes_with(variable: str, value: str) -> list[str]:
    """Command lines of live processes that have ``variable=value`` in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environ = (process / "environ").read_bytes().split(b"\0")
            if f"{variable}={value}".encode() in environ:
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended meanwhile, or is another user's
    return found
