"""``--devices N``: a command as N processes of this machine, which are started here and waited for.

torchrun does that too, but ends by Ctrl-C in a traceback of its own, and with 1 whatever the
processes ended with. What starts them here has no thread and imports no torch. It holds signals
back for as long as it lives and takes them one by one, so that nothing interrupts it; the processes
inherit that, and let them through once they know what to do (:class:`launch.preemption.EndAtOnce`).
"""

import argparse
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from common.errors import ConfigError
from launch import cluster
from launch.arguments import Parser
from launch.exit_codes import ExitCode
from launch.preemption import HANDLED_SIGNALS, say

COMMANDS = ("pretrain", "evaluate", "embed", "doctor")
HELP = "start N processes of this command on this machine, one for each GPU (default 1)"

# -P: nothing of the working folder is taken for a module.
_PROGRAM = (sys.executable, "-P", "-m", "launch")
_VOICE = "WIDEBATCH_VOICE"  # the descriptor of a pipe with a single byte in it
_GRACE = 20.0  # seconds that the others have to end by themselves when one has failed
_LOOK = 0.1  # seconds between two looks
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_BY_SIGNAL = tuple(-number for number in HANDLED_SIGNALS)
_WELL = (ExitCode.DONE, ExitCode.PREEMPTED, ExitCode.INTERRUPTED)


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--devices`` to a command; its words come there without it (:func:`taken_out`)."""
    parser.add_argument("--devices", type=_number, default=1, metavar="N", help=HELP)


def taken_out(words: Sequence[str]) -> tuple[list[str], int]:
    """The words of a command line without ``--devices N``, and N.

    Returns:
        The words, and the processes to start; 1 for this one alone, which answers ``--help`` too.

    Raises:
        ConfigError: N is no number from 1.
    """
    if not words or words[0] not in COMMANDS:
        return list(words), 1
    prog = f"widebatch {words[0]}"
    parser = Parser(prog=prog, passes_on=True, add_help=False, allow_abbrev=False)
    add_option(parser)
    args, rest = parser.parse_known_args(words)
    return rest, 1 if {"-h", "--help"} & set(rest) else args.devices


def start(words: Sequence[str], processes: int) -> int:
    """Run ``widebatch WORDS`` as so many processes; call it before there are threads.

    Returns:
        The exit status of the first that failed, 74 if it was killed; else 75 or 130 if they were
        told to stop, and 0 if they are done.

    Raises:
        ConfigError: torchrun or srun has started several already.
    """
    place = cluster.discover(os.environ)
    if place.launcher == "torchrun" or place.world_size > 1:
        raise ConfigError(
            "--devices starts the processes itself: leave it out under torchrun and srun, and if"
            " this is neither, first `unset RANK WORLD_SIZE SLURM_STEP_ID`"
        )
    say(f"starting {processes} processes")  # which say nothing for seconds
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_SIGNALS)
    voice, port = _one_voice(), _free_port()
    children: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(processes):
            place = cluster.Cluster("torchrun", rank, processes, rank, processes, master_port=port)
            children.append(_child(words, place, voice))
        for number in signal.sigpending():  # to those that were started after it came
            _tell(children, number)
        return _wait(children)
    finally:
        for child in children:
            child.kill()  # nothing happens to one that has ended


def speaks() -> bool:
    """Whether this process tells the user's error: all find the same one, and the first says it."""
    voice = os.environ.get(_VOICE)
    return voice is None or bool(os.read(int(voice), 1))


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of processes, from 1")
    return int(text)


def _one_voice() -> int:
    reading, writing = os.pipe()
    os.write(writing, b"1")
    os.close(writing)
    return reading


def _free_port() -> int:
    """One that stays free until rank 0 has imported torch: the system hands out others itself."""
    for port in random.sample(cluster.PORTS, len(cluster.PORTS)):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise ConfigError(f"no port of {cluster.PORTS} is free")


def _child(words: Sequence[str], place: cluster.Cluster, voice: int) -> "subprocess.Popen[bytes]":
    libc, parent = ctypes.CDLL(None), os.getpid()

    def end_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died in between
            os._exit(ExitCode.RETRYABLE)

    return subprocess.Popen(
        [*_PROGRAM, *words],
        env={**os.environ, **place.variables(), _VOICE: str(voice)},
        stdin=subprocess.DEVNULL,
        pass_fds=(voice,),
        preexec_fn=end_with_parent,
    )


def _wait(children: "Sequence[subprocess.Popen[bytes]]") -> int:
    failed: int | None = None
    stopping = False
    deadline = float("inf")
    codes = [child.poll() for child in children]
    while None in codes:
        told = signal.sigtimedwait(HANDLED_SIGNALS, _LOOK)
        if told is not None and told.si_code <= 0:  # else the terminal's, which all have had
            _tell(children, told.si_signo)
        if time.monotonic() > deadline:
            _tell(children, signal.SIGKILL)
        codes = [child.poll() for child in children]
        stopping = stopping or told is not None or bool(signal.sigpending())
        if stopping:  # those that it killed had not begun to listen, or were ending
            codes = [ExitCode.INTERRUPTED if code in _BY_SIGNAL else code for code in codes]
        if failed is None:
            failed = _first_failed(codes)
            deadline = deadline if failed is None else time.monotonic() + _GRACE
    return max(code or 0 for code in codes) if failed is None else failed


def _tell(children: "Sequence[subprocess.Popen[bytes]]", number: int) -> None:
    for child in children:
        child.send_signal(number)


def _first_failed(codes: Sequence[int | None]) -> int | None:
    """The status that one of those who failed gives the whole; one that was killed comes first."""
    ended = [(code, rank) for rank, code in enumerate(codes) if code is not None]
    bad = [each for each in ended if each[0] not in _WELL]
    if not bad:
        return None
    code, rank = min(bad)
    if code >= 0:  # it has said why
        return code
    say(
        f"widebatch: error: rank {rank} of {len(codes)} was killed by"
        f" {signal.Signals(-code).name}; the same command starts them again"
    )
    return ExitCode.RETRYABLE
