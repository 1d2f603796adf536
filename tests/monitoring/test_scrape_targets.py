"""Every node of a run serves, and a file says where, for as long as it is true."""

import json
import logging
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.errors import ConfigError
from tests.dist import run_ranks
from tests.monitoring.scrapes import RUN_FACTS, free_port, get
from trainer.telemetry import TelemetryConfig
from trainer.telemetry.prometheus import Prometheus
from trainer.telemetry.scrape_targets import FILE, address, scraped, target_groups, targets_path


def fabric(rank: int = 0, ranks_per_node: int = 1) -> Any:
    """What :func:`scraped` asks of one."""
    return SimpleNamespace(
        global_rank=rank,
        local_rank=rank % ranks_per_node,
        node_rank=rank // ranks_per_node,
        is_global_zero=rank == 0,
        device=torch.device("cpu"),
    )


def read(path: Path) -> Any:
    return json.loads(path.read_text())


# --- one process --------------------------------------------------------------------------------


def test_a_run_that_ends_as_planned_takes_its_targets_away(tmp_path: Path) -> None:
    config = TelemetryConfig(prometheus_port=free_port())
    with scraped(config, RUN_FACTS, tmp_path, fabric()) as endpoint:
        assert endpoint is not None
        (group,) = read(tmp_path / FILE)
        assert group == {
            "targets": [f"127.0.0.1:{config.prometheus_port}"],
            "labels": {"run": "run", "node": socket.gethostname()},
        }
        text = get(f"http://{group['targets'][0]}/metrics")
        assert 'widebatch_run_info{name="run",recipe="simclr-r50"} 1.0' in text
    assert not any(tmp_path.iterdir())
    with scraped(config, RUN_FACTS, tmp_path, fabric()):  # the port is free again
        pass


def test_a_run_that_fails_leaves_its_targets_for_the_alert_until_the_next_attempt(
    tmp_path: Path,
) -> None:
    config = TelemetryConfig(prometheus_port=free_port())
    with pytest.raises(OSError, match="disk"), scraped(config, RUN_FACTS, tmp_path, fabric()):
        raise OSError("disk")
    assert len(read(tmp_path / FILE)) == 1
    with scraped(TelemetryConfig(), RUN_FACTS, tmp_path, fabric()) as endpoint:
        assert endpoint is None
        assert not (tmp_path / FILE).exists()


def test_runs_share_a_folder_of_targets_without_sharing_a_file(tmp_path: Path) -> None:
    config = TelemetryConfig(prometheus_targets=tmp_path / "shared", prometheus_port=free_port())
    paths = {targets_path(config, tmp_path / user / "run: 1") for user in ("a", "b")}
    assert len(paths) == 2
    assert all(path.name.startswith("widebatch-run__1-") for path in paths)
    with scraped(config, RUN_FACTS, tmp_path / "a", fabric()):
        (path,) = (tmp_path / "shared").iterdir()
        assert path.suffix == ".json"
        assert path.stat().st_mode & 0o444, "Prometheus is another user"


def test_a_folder_that_cannot_be_written_stops_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    config = TelemetryConfig(prometheus_targets=tmp_path / "file", prometheus_port=free_port())
    with scraped(config, RUN_FACTS, tmp_path, fabric()) as endpoint:
        assert endpoint is not None
    (warning,) = caplog.messages
    assert warning.endswith("name the run's targets to Prometheus by hand")


def test_addresses_are_what_others_connect_to() -> None:
    assert address("127.0.0.1", 9100) == "127.0.0.1:9100"
    assert address("0.0.0.0", 9100) == f"{socket.gethostname()}:9100"  # noqa: S104
    assert address("::", 9100) == f"{socket.gethostname()}:9100"
    assert address("fe80::1", 9100) == "[fe80::1]:9100"
    assert address("gpu-17.cluster", 9100) == "gpu-17.cluster:9100"


def test_nodes_that_only_answer_themselves_are_not_mixed_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    row = {"node": 0, "host": "n0", "target": "127.0.0.1:9100"}
    groups = target_groups([row, {"node": 0}, {**row, "node": 1, "host": "n1"}], "a")
    assert [group["labels"]["node"] for group in groups] == ["n0"]
    assert "--telemetry.prometheus-host 0.0.0.0" in caplog.text


# --- several ------------------------------------------------------------------------------------


def _two_nodes(rank: int, world_size: int, out: str, port: int) -> list[str]:
    """Four ranks on two nodes, which are two addresses of this machine."""
    config = TelemetryConfig(prometheus_port=port, prometheus_host=f"127.0.0.{1 + rank // 2}")
    shown = []
    with scraped(config, RUN_FACTS, Path(out), fabric(rank, ranks_per_node=2)) as endpoint:
        if endpoint is not None:
            endpoint.show_ranks({"forward": [1.0, 2.0, 3.0, 4.0]}, {3})
            lines = get(f"http://{config.prometheus_host}:{port}/metrics").splitlines()
            names = ("widebatch_phase_seconds_total{", "widebatch_step ")
            shown = [line for line in lines if line.startswith(names)]
        torch.distributed.barrier()
        assert len(read(Path(out) / FILE)) == 2
        torch.distributed.barrier()
    return shown


def test_each_node_serves_its_own_ranks_and_the_first_one_the_run(tmp_path: Path) -> None:
    shown = run_ranks(_two_nodes, 4, str(tmp_path), free_port(), timeout=120)
    seconds = 'widebatch_phase_seconds_total{{phase="forward",rank="{0}"}} {1}'
    assert sorted(shown[0]) == sorted(
        [seconds.format(0, 1.0), seconds.format(1, 2.0), "widebatch_step 0.0"]
    )
    assert shown[2] == [seconds.format(2, 3.0), seconds.format(3, 4.0)]
    assert shown[1] == shown[3] == []


def _taken_port(rank: int, world_size: int, out: str, port: int) -> str:
    config = TelemetryConfig(prometheus_port=port, prometheus_host=f"127.0.0.{1 + rank}")
    taken = Prometheus("127.0.0.2", port, None) if rank == 1 else None
    try:
        with scraped(config, RUN_FACTS, Path(out), fabric(rank)):
            return "went on"
    except ConfigError as error:
        return str(error)
    finally:
        if taken is not None:
            taken.close()


def test_a_taken_port_is_told_by_all_ranks(tmp_path: Path) -> None:
    port = free_port()
    said = run_ranks(_taken_port, 2, str(tmp_path), port, timeout=120)
    assert said[0] == said[1]
    assert f"cannot listen on 127.0.0.2:{port}" in said[0]
    assert not any(tmp_path.iterdir())
