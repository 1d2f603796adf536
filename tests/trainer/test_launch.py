"""Joining the other processes of a run."""

import socket

import pytest
import torch.distributed as dist

from launch.exit_codes import ExitCode, exit_code_for
from trainer.errors import RankLostError
from trainer.strategy import launch_fabric


def test_processes_that_do_not_find_each_other_may_be_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that a scheduler starts again must not count as broken because a peer was late."""

    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("Gloo connectFullMesh failed: Connection refused")

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", refused)
    with pytest.raises(RankLostError, match="2 processes of the run did not find each") as error:
        launch_fabric("cpu", "fp32")
    assert exit_code_for(error.value) is ExitCode.RETRYABLE
