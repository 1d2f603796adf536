"""A real Prometheus server finds a real run by its targets file and tells what goes wrong."""

import dataclasses
import functools
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.dist import run_ranks
from tests.faults import armed
from tests.monitoring.dashboard import expressions
from tests.monitoring.scrapes import (
    Server,
    eventually,
    free_port,
    needs_prometheus,
    prometheus_server,
)
from tests.trainer.faulty import small_config
from tests.trainer.runs import pack_images
from trainer.config import RunConfig, from_json, to_json
from trainer.health.collapse import CollapseConfig
from trainer.health.stragglers import StragglerConfig
from trainer.telemetry import TelemetryConfig

pytestmark = [needs_prometheus, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_images(tmp_path_factory.mktemp("data"))


def config_of(data: Path, tmp_path: Path) -> RunConfig:
    return small_config(
        data,
        tmp_path / "run-17",
        steps=100_000,
        log_samples=False,
        straggler=StragglerConfig(readings=2),
        telemetry=TelemetryConfig(
            tensorboard=False,
            log_every=5,
            prometheus_port=free_port(),
            prometheus_targets=tmp_path / "targets",
        ),
    )


def _train(rank: int, world_size: int, values: dict[str, Any], stop: str) -> str:
    """On two nodes, until the file ``stop`` is there."""
    from trainer.loop import fit

    try:
        return fit(from_json(RunConfig, values), Path(stop).exists).value
    except OSError as error:
        return str(error.strerror)


class _Training(threading.Thread):
    """The run, beside the test; it is asked to stop when the block ends."""

    def __init__(self, config: RunConfig, stop: Path, faults: str) -> None:
        super().__init__(daemon=True)
        self._config, self._stop_file, self._faults = config, stop, faults
        self.endings: list[str] = []

    def __enter__(self) -> "_Training":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop_file.touch()
        self.join(timeout=300)

    def run(self) -> None:
        self.endings = run_ranks(
            _train,
            2,
            to_json(self._config),
            str(self._stop_file),
            timeout=600,
            init_process_group=False,
            env={
                "WIDEBATCH_FAULTS": armed(self._faults),
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "1",
                "GROUP_RANK": "{rank}",
            },
        )


def alert(server: Server, name: str) -> dict[str, str]:
    labels: dict[str, str] = eventually(f"{name} fires", lambda: server.firing().get(name))
    return labels


def test_a_slow_rank_and_a_lost_step_raise_their_alerts_and_a_stopped_run_none(
    data: Path, tmp_path: Path
) -> None:
    config, stop = config_of(data, tmp_path), tmp_path / "stop"
    port = config.telemetry.prometheus_port
    training = _Training(
        config, stop, "step.start rank=1 sleep:0.3 pass=1+; step.backward rank=0 nan pass=20"
    )
    targets = str(tmp_path / "targets" / "*.json")
    with prometheus_server(tmp_path / "server", targets) as server, training:
        up = {f"127.0.0.1:{port}": "up"}
        eventually("the run is scraped", lambda: server.targets() == up)
        slow = alert(server, "WidebatchStraggler")
        assert (slow["rank"], slow["run"]) == ("1", "run-17")
        assert (slow["node"], slow["instance"]) == (socket.gethostname(), f"127.0.0.1:{port}")
        assert alert(server, "WidebatchStepsSkipped")["severity"] == "warning"
        (steps,) = server.query("widebatch_step")
        assert (steps["instance"], steps["value"] > 20) == (f"127.0.0.1:{port}", True)
        (share,) = eventually(
            "the recorded share of waiting",
            lambda: server.query('rank:widebatch_phase_seconds:ratio_rate5m{phase="loader"} > 0.3'),
        )
        assert share["rank"] == "1"
        (step,) = server.query("run:widebatch_step_seconds:mean5m")
        assert step["value"] > 0.25
        for query in expressions(run="run-17"):
            assert eventually(f"the dashboard's {query}", functools.partial(server.query, query))
        stop.touch()
        eventually("both ranks have ended", lambda: training.endings)
        assert training.endings == ["stopped", "stopped"]
        eventually("its target is gone", lambda: server.targets() == {})
        # One may have been down for longer than it takes here, before all were gone.
        eventually("nothing is missed", lambda: "WidebatchRunGone" not in server.firing())


def test_a_run_that_collapses_stands_still_and_then_fails_raises_an_alert_for_each(
    data: Path, tmp_path: Path
) -> None:
    # Any spread is below the limit: what counts here is the way of the alarm to the server.
    collapse = CollapseConfig(every_steps=5, feature_std=2.0)
    config = dataclasses.replace(config_of(data, tmp_path), collapse=collapse)
    faults = "step.start rank=0 sleep:45 pass=30; step.start raise:EIO pass=32"
    training = _Training(config, tmp_path / "stop", faults)
    targets = str(tmp_path / "targets" / "*.json")
    with prometheus_server(tmp_path / "server", targets) as server, training:
        assert alert(server, "WidebatchNoProgress")["severity"] == "critical"
        assert alert(server, "WidebatchCollapse")["run"] == "run-17"
        gone = alert(server, "WidebatchRunGone")
        assert gone["run"] == "run-17"
        eventually("both ranks have ended", lambda: training.endings)
        assert all("Input/output error" in ending for ending in training.endings)
