"""The harness fails a test on a hang, an exit, a silent rank or an exception, and names it."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.dist import RankFailure, run_ranks


def _describe(rank: int, world_size: int, offset: int) -> dict[str, object]:
    total = torch.tensor([rank + offset])
    dist.all_reduce(total)
    return {
        "total": total,
        "rank": os.environ["RANK"],
        "extra": os.environ.get("EXTRA"),
        "threads": torch.get_num_threads(),
        "pid": os.getpid(),
    }


def _raise_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("the sky is falling")
    dist.barrier()


def _exit_on_one(rank: int, world_size: int, code: int) -> int:
    if rank == 1:
        os._exit(code)
    return rank


def _hang_on_one(rank: int, world_size: int) -> int:
    if rank == 1:
        _sleep_for_ever()
    return rank


def _sleep_for_ever() -> None:
    while True:
        time.sleep(3600)


def _write_pid_and_hang(rank: int, world_size: int, folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    _sleep_for_ever()


def _skip_a_collective_on_one(rank: int, world_size: int) -> int:
    if rank != 1:
        dist.all_reduce(torch.ones(1))
    return rank


def _kill_one(rank: int, world_size: int) -> int:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return rank


def _return_an_object(rank: int, world_size: int) -> object:
    return multiprocessing


def _start_a_child(rank: int, world_size: int) -> int:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"]).pid


def _without_group(rank: int, world_size: int) -> bool:
    return dist.is_initialized()


def test_results_come_back_in_rank_order_from_separate_processes() -> None:
    results = run_ranks(_describe, 3, 10, env={"EXTRA": "of {rank}"})
    assert [r["total"].item() for r in results] == [33, 33, 33]
    assert [r["rank"] for r in results] == ["0", "1", "2"]
    assert [r["extra"] for r in results] == ["of 0", "of 1", "of 2"]
    assert [r["threads"] for r in results] == [1, 1, 1]
    assert len({r["pid"] for r in results} | {os.getpid()}) == 4


def test_an_exception_fails_with_the_traceback_of_the_rank_that_raised_first() -> None:
    with pytest.raises(RankFailure, match="rank 1 raised") as failure:
        run_ranks(_raise_on_one, 2)
    text = str(failure.value)
    assert "the sky is falling" in text
    assert "_raise_on_one" in text
    assert text.split(": ", 1)[1].startswith("rank 1 raised")


def test_an_unexpected_exit_code_fails() -> None:
    with pytest.raises(RankFailure, match="rank 1 exited with code 7, not 0"):
        run_ranks(_exit_on_one, 2, 7)


def test_a_rank_that_ends_without_reporting_fails() -> None:
    with pytest.raises(RankFailure, match="rank 1 ended without reporting a result"):
        run_ranks(_exit_on_one, 2, 0)


def test_a_hang_fails_in_time_and_shows_where_the_silent_rank_stood() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure, match=r"silent: \[1\]") as failure:
        run_ranks(_hang_on_one, 2, timeout=4)
    assert time.monotonic() - start < 15
    assert "_sleep_for_ever" in str(failure.value)


def test_a_skipped_collective_fails() -> None:
    # The barrier that ends every run does not match the collective that the others are in.
    with pytest.raises(RankFailure):
        run_ranks(_skip_a_collective_on_one, 3, timeout=4)


def test_a_rank_that_is_meant_to_die_reports_nothing() -> None:
    assert run_ranks(_kill_one, 2, expected_exits={1: -9}) == [0, None]
    with pytest.raises(RankFailure, match="rank 1 exited with code 7, not -9"):
        run_ranks(_exit_on_one, 2, 7, expected_exits={1: -9})


def test_a_result_that_only_pickle_could_carry_is_refused() -> None:
    with pytest.raises(RankFailure, match="rank 0 raised"):
        run_ranks(_return_an_object, 1)


def test_what_a_rank_started_ends_with_it() -> None:
    _wait_until_gone(run_ranks(_start_a_child, 1))


def _wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(map(_is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(_is_running, pids))


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # a zombie is gone, only not yet collected


def test_a_process_group_is_there_only_on_request() -> None:
    assert run_ranks(_without_group, 1, init_process_group=False) == [False]


def test_after_the_first_call_nobody_waits_for_the_import_of_torch() -> None:
    def seconds() -> float:
        start = time.monotonic()
        run_ranks(_without_group, 2, init_process_group=False)
        return time.monotonic() - start

    seconds()
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    one_import = time.monotonic() - start
    assert min(seconds() for _ in range(3)) < one_import


def test_no_rank_outlives_a_killed_session(tmp_path: Path) -> None:
    # A session of its own, killed while its ranks hang; they write their ids first.
    code = (
        "from pathlib import Path\n"
        "from tests.dist import run_ranks\n"
        "from tests.test_dist_harness import _write_pid_and_hang\n"
        f"run_ranks(_write_pid_and_hang, 2, Path({str(tmp_path / 'pids')!r}))\n"
    )
    scratch, pids_at = tmp_path / "scratch", tmp_path / "pids"
    scratch.mkdir()  # a killed session leaves its files; here they go with the test's
    pids_at.mkdir()
    session = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(scratch)}
    )
    pids: list[int] = []
    try:
        deadline = time.monotonic() + 60
        while len(pids) < 2 and time.monotonic() < deadline:
            pids = [int(file.name) for file in pids_at.iterdir()]
            time.sleep(0.05)
    finally:
        session.kill()
        session.wait()
    assert len(pids) == 2
    _wait_until_gone(pids)
