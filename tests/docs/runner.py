"""Runs a page's commands as a reader would: one shell after another in one folder."""

import contextlib
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.docs.forms import PREPARED, form_of, reason_not_to_run
from tests.docs.pages import CHECKOUT, Command, commands_of
from tests.docs.stand_ins import checkout

_LONGEST = 600  # seconds that a command may take
_PATIENCE = 60  # seconds that one has to end its own processes when it is told to
_LOG_TIME = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")
# A number, with its unit of time where it has one; or a checksum.
_NUMBER = re.compile(r"\b[0-9a-f]{12,}\b|\d[\d.,]*(?:e[-+]?\d+)?(?: (?:s|min|h|d)\b)?")


def follow(page: str, folder: Path) -> None:
    """Run all commands of ``page`` in ``folder``; each must end with 0 and print what is shown."""
    checkout(folder)
    with _slurm_ends(folder):
        for prepare in PREPARED.get(page, ()):
            prepare(folder)
        for command in commands_of(page):
            if not reason_not_to_run(command.text):
                _run(command, folder)


def _run(command: Command, folder: Path) -> None:
    text = form_of(command.text, command.page, checkout=CHECKOUT, port=_free_port())
    status, output = shell(text, folder)
    if status and "sbatch" in text:
        output += "\n".join(path.read_text()[-4000:] for path in folder.glob("*-*.out"))
    said = f"{command.page}: {command.text}\nran as: {text}\n{output[-8000:]}"
    assert status == 0, f"exit code {status}\n{said}"
    missing = first_missing(command.shown, output.splitlines())
    assert missing is None, f"not printed: {missing}\n{said}"


def shell(text: str, folder: Path) -> tuple[int, str]:
    """Run a line of bash; what earlier lines exported, and where they went, is as they left it."""
    state = folder / ".shell"
    script = (
        f'[ ! -e "$STATE" ] || . "$STATE"\nset -eo pipefail\n{text}\n'
        '{ export -p; printf "cd %q\\n" "$PWD"; } >"$STATE"\n'
    )
    with subprocess.Popen(
        ["bash", "-c", script],
        cwd=folder,
        env=_environment(folder) | {"STATE": str(state)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=_LONGEST)
        except subprocess.TimeoutExpired:
            output = f"{_end(process)}\n(not done within {_LONGEST} s)"
    return process.returncode, output


def _end(process: subprocess.Popen[str]) -> str:
    """Tell first, then kill: launchers have processes elsewhere, which they end themselves."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        return process.communicate(timeout=_PATIENCE)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0]


def _environment(folder: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "WIDEBATCH_"))}
    return kept | {
        "PATH": f"{folder / '.venv' / 'bin'}:{os.environ['PATH']}",  # as install.md activates it
        "HOME": str(folder),  # what a page writes there is not the tester's
        "WIDEBATCH_CLUSTER": str(folder / "cluster"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def first_missing(shown: list[str], printed: list[str]) -> str | None:
    """The first of the shown lines that was not printed after the ones before it, if any.

    Numbers and checksums may be others, blanks as many as columns need; "..." stands for any lines.
    """
    rest = iter([_plain(line) for line in printed])
    for line in shown:
        if line.strip() not in ("...", "") and _plain(line) not in rest:
            return line
    return None


def _plain(line: str) -> str:
    without_numbers = _NUMBER.sub("#", _LOG_TIME.sub("", line))
    return " ".join(without_numbers.split())


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def _slurm_ends(folder: Path) -> Iterator[None]:
    """No cluster that a page has started is left behind."""
    try:
        yield
    finally:
        if (folder / "cluster").exists():
            shell("slurm/local_cluster.sh down", folder)
