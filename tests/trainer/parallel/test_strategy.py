"""Joining the other processes of a run: said, ended in time, and open to signals."""

import logging
import os
import signal
import socket
import threading

import pytest
import torch.distributed as dist

from common import rendezvous
from common.errors import RankLostError
from common.rendezvous import JOIN_TIMEOUT, join, shutdown
from launch.doctor_command import add_parser
from launch.exit_codes import ExitCode, exit_code_for
from tests.dist import run_ranks
from trainer.parallel.strategy import launch_fabric


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> str:
    """Rank 0 of two, the other of which does not exist: variables left behind by another run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rendezvous, "_SILENT", 0.0)
    monkeypatch.setattr(rendezvous, "_SILENT_OTHERS", 0.0)
    return f"127.0.0.1:{port}"


def test_who_waits_says_for_whom_and_ends_in_time(
    alone: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that a scheduler starts again must not count as broken because a peer was late."""
    caplog.set_level(logging.INFO)
    with pytest.raises(RankLostError) as error:
        launch_fabric("cpu", "fp32", join_timeout=2)
    assert exit_code_for(error.value) is ExitCode.RETRYABLE
    assert f"none of the other 1 processes came to {alone} within 2 s" in str(error.value)
    assert "`unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE`" in str(error.value)
    assert f"waiting for 1 of 2 processes at {alone}" in caplog.text


def test_a_rank_without_rank_0_says_so(
    alone: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("SLURM_STEP_ID", "0")  # an interactive shell of srun's
    with pytest.raises(RankLostError, match="SLURM_STEP_ID SLURM_PROCID`"):
        join("gloo", timeout=2)
    assert f"waiting for rank 0 of 2 processes at {alone}" in caplog.text


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ctrl_c_ends_the_wait(alone: str, rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        join("gloo", timeout=60)


def test_what_listens_there_and_never_answers_is_not_waited_for_either(
    alone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    host, port = alone.split(":")
    nobody_came = pytest.raises(RankLostError, match="none of the other 1 processes came")
    with socket.create_server((host, int(port))), nobody_came:
        join("gloo", timeout=2)


def test_one_process_needs_no_port(alone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    host, port = alone.split(":")
    with socket.create_server((host, int(port))):
        join("gloo", timeout=20)
    assert dist.get_world_size() == 1
    shutdown()


def test_processes_that_cannot_be_connected_may_be_started_again(
    alone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("Gloo connectFullMesh failed: Connection refused")

    monkeypatch.setattr(dist, "init_process_group", refused)
    monkeypatch.setattr(rendezvous._Meeting, "_all_come", lambda *_: True)
    with pytest.raises(RankLostError, match="2 processes of the run did not find each") as error:
        launch_fabric("cpu", "fp32")
    assert exit_code_for(error.value) is ExitCode.RETRYABLE


def test_of_many_those_that_came_count_the_others(
    alone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    meeting = rendezvous._Meeting("gloo", None)
    meeting.come = 2
    assert meeting.state() == f"waiting for 1 of 3 processes at {alone}"
    assert f"1 of 3 processes did not come to {alone} within 5 s" in meeting.failure(5)
    assert "--watchdog.join-timeout" in meeting.failure(5)
    meeting.come = 3
    assert meeting.state() == "connecting 3 processes"
    assert "came to" in meeting.failure(5) and "`widebatch doctor`" in meeting.failure(5)


def _join_twice(rank: int, world_size: int) -> list[int]:
    sizes = []
    for _ in range(2):
        join("gloo")
        dist.barrier()
        sizes.append(dist.get_world_size())
        shutdown()
    return sizes


def test_the_same_processes_can_meet_again_at_the_same_port() -> None:
    assert run_ranks(_join_twice, 3, init_process_group=False, timeout=240) == [[3, 3]] * 3


def test_the_command_line_states_the_trainers_own_patience() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["doctor"])
    assert args.join_timeout == JOIN_TIMEOUT
