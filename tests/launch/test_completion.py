"""Completion in the real shells, by the scripts that the command prints."""

import os
import pty
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launch.__main__ import main

CASES = [
    ("", {"pack", "pretrain", "evaluate", "runs", "completion"}),
    ("ev", {"evaluate"}),
    ("evaluate ", {"knn", "linear", "duplicates"}),
    ("evaluate knn --data.", {"--data.train", "--data.test"}),
    ("evaluate knn --which ", {"last", "best"}),
    ("pretrain simclr-", {"simclr-r50", "simclr-stl10-r18"}),
    ("pretrain simclr-r50 --precision ", {"auto", "bf16", "fp32", "fp64"}),
    ("pretrain simclr-r50 --optim.base", {"--optim.base-lr"}),
    ("pretrain simclr-r50 --objective.mom", set()),
    ("pretrain mocov3-r50 --objective.mom", {"--objective.momentum-schedule"}),
    ("pretrain simclr-r50 --sync", {"--sync-batch-norm"}),
    ("pretrain simclr-r50 --batch ", set()),
    ("pretrain simclr-r50 --data.train im", {"images.beton"}),
    ("plan simclr-r50 --gpu h", {"h100-80g", "h200-141g"}),
    ("plan simclr-r50 --nod", {"--nodes"}),
    ("export run --form", {"--format"}),
    ("export im", {"images.beton"}),
    ("completion ", {"bash", "zsh", "fish"}),
]

BASH = """
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _widebatch; printf '%s\\n' "${COMPREPLY[@]}"
"""
# zsh's own functions work inside its line editor only.
ZSH = """
compdef() { :; }; compadd() { print -rl -- "${@[2,-1]}"; }; _files() { print -rl -- *(N); }
source ./script; words=("$@"); CURRENT=$#; _widebatch
"""


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
            patch.setattr("builtins.print", lambda text, end="", said=said: said.append(text))
            assert main(["completion", shell]) == 0
        found[shell] = place / "script"
        found[shell].write_text("".join(said))
    return found


def installed(shell: str) -> str:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"completion in {shell} needs it: apt-get install {shell} (`make test` does)")
    return program


def complete(shell: str, script: Path, typed: str) -> set[str]:
    program = installed(shell)
    words = ["widebatch", *typed.split(" ")]
    command = {
        "bash": [program, "--norc", "-c", "source ./script\n" + BASH, "bash", *words],
        "zsh": [program, "-f", "-c", ZSH, "zsh", *words],
        "fish": [program, "-N", "-c", "source ./script; complete -C $argv[1]", " ".join(words)],
    }[shell]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(script.parent), "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        command, cwd=script.parent, capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found = {line for line in done.stdout.splitlines() if line}
    # zsh leaves it to its editor to drop what does not begin as typed.
    return {word for word in found if word.startswith(typed.split(" ")[-1])}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_settings_values_and_files_are_completed(
    shell: str, scripts: dict[str, Path]
) -> None:
    for typed, wanted in CASES:
        found = complete(shell, scripts[shell], typed)
        assert wanted <= found if wanted else not found, f"{typed!r}: {sorted(found)}"


def test_bash_is_told_to_ask_the_function(scripts: dict[str, Path]) -> None:
    said = subprocess.run(
        ["/bin/bash", "--norc", "-c", "source ./script; complete -p widebatch"],
        cwd=scripts["bash"].parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert said.stdout == "complete -F _widebatch widebatch\n", said.stderr


def test_zsh_completes_at_the_key(scripts: dict[str, Path]) -> None:
    zsh = installed("zsh")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(scripts["zsh"].parent)
        os.environ.update(TERM="dumb", HOME=str(scripts["zsh"].parent))
        os.execv(zsh, [zsh, "-f", "-i"])  # noqa: S606
    try:
        os.write(terminal, b"autoload -Uz compinit; compinit -u -D; . ./script; echo REA''DY\n")
        assert "READY" in read_until(terminal, "READY")
        os.write(terminal, b"widebatch evaluate knn --whi\tbe\t")
        assert "--which best" in read_until(terminal, "best").replace("\b", "").replace("  ", " ")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)


def read_until(terminal: int, text: str) -> str:
    seen, end = "", time.monotonic() + 60
    while text not in seen and time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            seen += os.read(terminal, 1 << 16).decode(errors="replace")
    return seen


def test_no_program_is_started_at_the_key(scripts: dict[str, Path]) -> None:
    """Not ours, and none of the system's but what the shell itself brings."""
    for shell in ("bash", "zsh"):
        text = scripts[shell].read_text()
        assert "python" not in text and "$(" not in text and "`" not in text
