"""Run a function on several ranks, each a fresh process with a gloo process group.

    def _sum(rank: int, world_size: int, x: float) -> float:      # at module level
        t = torch.tensor(x * rank)
        dist.all_reduce(t)
        return t.item()

    def test_sum() -> None:
        assert run_ranks(_sum, 3, 2.0) == [6.0, 6.0, 6.0]

Ranks are forked from a server process that has imported torch once, so that only a session's first
call pays for the import. The server never touches CUDA, starts no threads and runs no test code:
each rank begins as if torch had just been imported.

A run fails (:class:`RankFailure`) when a rank raises, exits with an unexpected code, ends without a
result, or does not end in time. The message shows the traceback of the rank that failed first; for
a hang it shows the stacks of the ranks that are still running.
"""

import contextlib
import datetime
import faulthandler
import gc
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# What most ranks import, DistributedDataParallel (torch._dynamo) included.
PRELOAD = ["pytest", "torch.distributed", "torch.nn.parallel", "torch._dynamo", "tests.dist"]
GRACE_SECONDS = 5.0  # for the other ranks to end after the first failure
LOG_TAIL = 4000  # characters of a failing rank's output to show

# A real-time signal: USR1 and TERM belong to the code under test (preemption).
_STACK_SIGNAL = signal.SIGRTMIN + 7

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


class RankFailure(AssertionError):  # noqa: N818 (a failed test, as pytest understands it)
    """A rank raised, hung, died or reported nothing. The message names it and shows why."""


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
    init_process_group: bool = True,
    collective_timeout: float | None = None,
    expected_exits: Mapping[int, int] | None = None,
) -> list[Any]:
    """Call ``fn(rank, world_size, *args)`` on ``world_size`` processes; return their results.

    Args:
        fn: a function at module level. It may return anything made of tensors, numbers, strings,
            ``None``, tuples, lists and dicts (it comes back by ``torch.load(weights_only=True)``).
        world_size: number of processes.
        args: further arguments, picklable.
        timeout: seconds from when all processes have started.
        env: variables to set on top of this process's present environment. ``RANK``,
            ``LOCAL_RANK``, ``WORLD_SIZE``, ``LOCAL_WORLD_SIZE``, ``MASTER_ADDR`` and
            ``MASTER_PORT`` are set for each rank; a value may hold ``{rank}``.
        init_process_group: whether a gloo group is there when ``fn`` starts. Its store is a file,
            not a port.
        collective_timeout: seconds until a collective gives up; by default never before
            ``timeout``, so that a hang is reported by this harness with the ranks' stacks.
        expected_exits: exit codes of ranks that are meant to die, such as ``{1: -9}``; they report
            nothing and their result is ``None``.

    Raises:
        RankFailure: see the module's docstring.
    """
    expected = dict(expected_exits or {})
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    setup = {
        "world_size": world_size,
        "init": init_process_group,
        "farewell": not expected,
        "collective_timeout": collective_timeout or 2 * timeout,
        "env": {**os.environ, **_rendezvous_env(world_size), **(env or {})},
    }
    ranks: list[ForkServerProcess] = []
    try:
        for rank in range(world_size):
            process = _context.Process(
                target=_rank_main, args=(rank, folder, setup, fn, args), name=f"rank{rank}"
            )
            process.start()
            ranks.append(process)  # started: the server's own start takes no one's time
        deadline = time.monotonic() + timeout
        _wait_for_all(ranks, deadline, expected)
        problem = _describe_failure(ranks, folder, expected, timeout)
        if problem:
            raise RankFailure(f"{fn.__module__}.{fn.__qualname__} on {world_size} ranks: {problem}")
        return [_load_result(folder, rank) for rank in range(world_size)]
    finally:
        for process in ranks:
            _kill(process)
        shutil.rmtree(folder, ignore_errors=True)


def _rendezvous_env(world_size: int) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "RANK": "{rank}",
        "LOCAL_RANK": "{rank}",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",  # a host name that does not resolve must not matter
    }


# --- in the parent ------------------------------------------------------------------------------


def _wait_for_all(
    ranks: list[ForkServerProcess], deadline: float, expected: Mapping[int, int]
) -> None:
    """Return when all have ended, at the deadline, or a grace time after the first failure."""
    while True:
        running = [process for process in ranks if process.exitcode is None]
        if not running:
            return
        left = deadline - time.monotonic()
        if left <= 0:
            return
        wait([process.sentinel for process in running], timeout=left)
        codes = {rank: process.exitcode for rank, process in enumerate(ranks)}
        if any(code is not None and code != expected.get(r, 0) for r, code in codes.items()):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)


def _describe_failure(
    ranks: list[ForkServerProcess], folder: Path, expected: Mapping[int, int], timeout: float
) -> str:
    """What went wrong, the first cause first; empty when nothing did."""
    raised = sorted(
        (file.stat().st_mtime_ns, int(file.stem), file.read_text())
        for file in folder.glob("*.error")
    )
    parts = [f"rank {rank} raised\n{text}" for _, rank, text in raised]
    with_traceback = {rank for _, rank, _ in raised}
    running = [rank for rank, process in enumerate(ranks) if process.exitcode is None]
    for rank, process in enumerate(ranks):
        code, wanted = process.exitcode, expected.get(rank, 0)
        reported = (folder / f"{rank}.pt").exists()
        if code is None or rank in with_traceback:
            continue
        if code != wanted:
            parts.append(f"rank {rank} exited with code {code}, not {wanted}{_log(folder, rank)}")
        elif not reported and rank not in expected:
            parts.append(f"rank {rank} ended without reporting a result{_log(folder, rank)}")
    if running:
        silent = [r for r in running if not (folder / f"{r}.pt").exists()]
        _dump_stacks([ranks[r] for r in silent])
        parts.append(
            f"ranks {running} still ran when the time was up ({timeout:g} s, or {GRACE_SECONDS:g} s"
            f" after the first failure); silent: {silent}"
        )
        parts += [f"rank {r}, where it hung:{_log(folder, r)}" for r in silent]
    return "\n".join(parts)


def _dump_stacks(ranks: list[ForkServerProcess]) -> None:
    for process in ranks:
        if process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, _STACK_SIGNAL)
    time.sleep(0.3)  # faulthandler writes at once, even inside a collective


def _log(folder: Path, rank: int) -> str:
    file = folder / f"{rank}.log"
    text = file.read_text(errors="replace").strip() if file.exists() else ""
    return f"\n{text[-LOG_TAIL:]}" if text else " (it printed nothing)"


def _load_result(folder: Path, rank: int) -> Any:
    file = folder / f"{rank}.pt"
    return torch.load(file, weights_only=True) if file.exists() else None


def _kill(process: ForkServerProcess) -> None:
    """End a rank and whatever it started: it leads its own process group."""
    if process.pid is None:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


# --- in each rank -------------------------------------------------------------------------------


def _rank_main(
    rank: int,
    folder: Path,
    setup: dict[str, Any],
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.setsid()
    threading.Thread(target=_die_with_session, daemon=True).start()
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable(file=2)
    faulthandler.register(_STACK_SIGNAL, file=2, all_threads=True)
    os.environ.clear()
    os.environ.update({k: v.replace("{rank}", str(rank)) for k, v in setup["env"].items()})
    torch.set_num_threads(1)
    try:
        if setup["init"]:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=setup["world_size"],
                timeout=datetime.timedelta(seconds=math.ceil(setup["collective_timeout"])),
            )
        _write_result(folder, rank, fn(rank, setup["world_size"], *args))
        gc.collect()  # DDP's reducer must go before its process group
        if dist.is_initialized():
            if setup["farewell"]:  # a collective that one rank skipped shows here at the latest
                dist.barrier()
            dist.destroy_process_group()
    except Exception:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        sys.exit(1)


def _write_result(folder: Path, rank: int, result: Any) -> None:
    unfinished = folder / f"{rank}.unfinished"
    torch.save(result, unfinished)
    torch.load(unfinished, weights_only=True)  # refuse here, in the rank that is at fault
    unfinished.replace(folder / f"{rank}.pt")


def _die_with_session() -> None:
    """No rank outlives a test session that was killed and could not clean up."""
    session = multiprocessing.parent_process()
    assert session is not None
    session.join()
    os.killpg(0, signal.SIGKILL)
