"""A run serves its metrics, and a file says where, for as long as it is true."""

import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.errors import ConfigError
from tests.dist import run_ranks
from tests.monitoring.scrapes import NODES, RUN_FACTS, free_port, get
from trainer.telemetry import TelemetryConfig
from trainer.telemetry.prometheus import Prometheus
from trainer.telemetry.scrape_targets import FILE, address, scraped, targets_path


def fabric(rank: int = 0) -> Any:
    """What :func:`scraped` asks of one."""
    return SimpleNamespace(is_global_zero=rank == 0)


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
            "labels": {"run": "run"},
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
    assert warning.endswith(f"name 127.0.0.1:{config.prometheus_port} to Prometheus by hand")


def test_addresses_are_what_others_connect_to() -> None:
    assert address("127.0.0.1", 9100) == "127.0.0.1:9100"
    assert address("0.0.0.0", 9100) == f"{socket.gethostname()}:9100"  # noqa: S104
    assert address("::", 9100) == f"{socket.gethostname()}:9100"
    assert address("fe80::1", 9100) == "[fe80::1]:9100"
    assert address("gpu-17.cluster", 9100) == "gpu-17.cluster:9100"


# --- several ------------------------------------------------------------------------------------


def _two_ranks(rank: int, world_size: int, out: str, port: int) -> list[str]:
    config = TelemetryConfig(prometheus_port=port)
    with scraped(config, RUN_FACTS, Path(out), fabric(rank)) as endpoint:
        if endpoint is None:
            return []
        endpoint.show_ranks({"forward": [1.0, 2.0]}, {1})
        lines = get(f"http://127.0.0.1:{port}/metrics").splitlines()
    return [line for line in lines if line.startswith("widebatch_phase_seconds_total{")]


def test_rank_0_serves_the_numbers_of_all_ranks_with_their_nodes(tmp_path: Path) -> None:
    node = socket.gethostname()
    assert run_ranks(_two_ranks, 2, str(tmp_path), free_port(), timeout=120) == [
        [
            f'widebatch_phase_seconds_total{{node="{node}",phase="forward",rank="0"}} 1.0',
            f'widebatch_phase_seconds_total{{node="{node}",phase="forward",rank="1"}} 2.0',
        ],
        [],
    ]


def _taken_port(rank: int, world_size: int, out: str, port: int) -> str:
    config = TelemetryConfig(prometheus_port=port)
    taken = Prometheus("127.0.0.1", port, RUN_FACTS, NODES) if rank == 1 else None
    torch.distributed.barrier()
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
    assert f"cannot listen on 127.0.0.1:{port}" in said[0]
    assert not any(tmp_path.iterdir())
