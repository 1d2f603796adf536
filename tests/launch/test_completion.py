"""Completion in the real shells, by the scripts that the command prints."""

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.__main__ import main

CASES = [
    ("", {"pack", "pretrain", "evaluate", "runs", "completion"}),
    ("ev", {"evaluate"}),
    ("evaluate ", {"knn", "linear", "duplicates"}),
    ("evaluate knn --data.", {"--data.train", "--data.test"}),
    ("evaluate knn im", {"images.beton"}),
    ("evaluate retrieve run --query im", {"images.beton"}),
    ("evaluate linear run --protocol ca", {"cached", "canonical"}),
    ("embed run --out", {"--out"}),
    ("evaluate knn --which ", {"last", "best"}),
    ("pretrain simclr-", {"simclr-r50", "simclr-stl10-r18"}),
    ("pretrain simclr-r50 --precision ", {"auto", "bf16", "fp32", "fp64"}),
    ("pretrain simclr-r50 --batch 64 --optim.base", {"--optim.base-lr"}),
    ("pretrain simclr-r50 --objective.mom", set()),
    ("pretrain mocov3-r50 --objective.mom", {"--objective.momentum-schedule"}),
    ("pretrain simclr-r50 --compile --sync", {"--sync-batch-norm"}),
    ("pretrain simclr-r50 --batch ", set()),
    ("pretrain simclr-r50 --data.train im", {"images.beton"}),
    ("pretrain simclr-r50 --devi", {"--devices", "--device"}),
    ("plan simclr-r50 --gpu h", {"h100-80g", "h200-141g"}),
    ("plan simclr-r50 --nod", {"--nodes"}),
    ("export run --form", {"--format"}),
    ("export im", {"images.beton"}),
    ("completion ", {"bash", "zsh", "fish"}),
]

BASH = """
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_widebatch; printf '%s\\n' "${COMPREPLY[@]}"
"""

EDITING = re.escape("[?2004h")  # what zsh's line editor begins with


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("completion")
    found = {}
    for shell in ("bash", "zsh", "fish"):
        place = folder / shell
        place.mkdir()
        (place / "images.beton").touch()
        with pytest.MonkeyPatch.context() as patch:
            said: list[str] = []
            patch.setattr("builtins.print", said.append)
            assert main(["completion", shell]) == 0
        found[shell] = place / ("_widebatch" if shell == "zsh" else "script")
        found[shell].write_text("".join(said))
    return found


def installed(shell: str) -> str:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"completion in {shell} needs it: apt-get install {shell} (`make test` does)")
    return program


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_commands_settings_values_and_files_are_completed(
    shell: str, scripts: dict[str, Path]
) -> None:
    program, script = installed(shell), scripts[shell]
    for typed, wanted in CASES:
        words = ["widebatch", *typed.split(" ")]
        command = {
            "bash": [program, "--norc", "-c", "source ./script\n" + BASH, "bash", *words],
            "fish": [program, "-N", "-c", "source ./script; complete -C $argv[1]", " ".join(words)],
        }[shell]
        # Nothing is started at the key but, by fish itself, what lists files.
        path = "/nowhere" if shell == "bash" else "/usr/bin:/bin"
        environment = {"PATH": path, "HOME": str(script.parent), "LC_ALL": "C.UTF-8"}
        done = subprocess.run(
            command, cwd=script.parent, capture_output=True, text=True, timeout=60, env=environment
        )
        assert done.returncode == 0 and done.stderr == "", done.stderr
        found = {line.partition("\t")[0] for line in done.stdout.splitlines() if line}
        assert wanted <= found if wanted else not found, f"{typed!r}: {sorted(found)}"


def test_zsh_lists_the_same_at_the_key(scripts: dict[str, Path]) -> None:
    with zsh(scripts["zsh"]) as terminal:
        for typed, wanted in CASES:
            os.write(terminal, f"widebatch {typed}".encode())
            read_until(terminal, re.escape(typed or "widebatch "))
            os.write(terminal, b"\x14")  # its key for a list
            os.write(terminal, b"\x15echo DO''NE\n")
            shown = read_until(terminal, f"\nDONE.*{EDITING}").partition("echo DO")[0]
            found = set(re.findall(r"[\w.-]+", shown))
            assert wanted <= found if wanted else not found, f"{typed!r}: {shown}"


def test_zsh_completes_at_the_key(scripts: dict[str, Path]) -> None:
    with zsh(scripts["zsh"]) as terminal:
        os.write(terminal, b"widebatch evaluate knn --whi\tbe\t")
        assert "--which best" in read_until(terminal, "best").replace("\b", "").replace("  ", " ")


@contextmanager
def zsh(script: Path) -> Iterator[int]:
    """Its terminal, where it waits for keys; the script lies in a folder of its functions."""
    program = installed("zsh")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(script.parent)
        os.environ.update(TERM="dumb", HOME=str(script.parent), LISTMAX="9999")
        os.execv(program, [program, "-f", "-i"])  # noqa: S606
    try:
        os.write(terminal, b"fpath+=$PWD; autoload -Uz compinit; compinit -u -D\n")
        os.write(terminal, b"bindkey ^T list-choices; echo REA''DY\n")
        assert "READY" in read_until(terminal, f"\nREADY.*{EDITING}")
        yield terminal
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)


def read_until(terminal: int, pattern: str) -> str:
    seen, end = "", time.monotonic() + 60
    while not re.search(pattern, seen, re.DOTALL) and time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            seen += os.read(terminal, 1 << 16).decode(errors="replace")
    return seen


def test_bash_is_told_to_ask_the_function(scripts: dict[str, Path]) -> None:
    said = subprocess.run(
        ["/bin/bash", "--norc", "-c", "source ./script; complete -p widebatch"],
        cwd=scripts["bash"].parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert said.stdout == "complete -o bashdefault -F _shtab_widebatch widebatch\n", said.stderr
