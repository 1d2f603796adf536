"""What a Prometheus server sees of a run, and Debian's server itself."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer.health.phases import PHASES, WAITS
from trainer.telemetry.prometheus import Prometheus, RunFacts

MONITORING = Path(__file__).resolve().parents[2] / "launch" / "monitoring"
RUN_FACTS = RunFacts(
    name="run", recipe="simclr-r50", total_steps=30, global_batch=16, world_size=2, steps_done=0
)
NODES = ["n0", "n1"]

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="no Prometheus server here: apt-get install --no-install-recommends prometheus"
    " (`make test` does)",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as reply:  # noqa: S310 (our own servers)
        return str(reply.read().decode())


def metrics_text() -> str:
    """The text of an endpoint that has something to say of everything."""
    endpoint = Prometheus("127.0.0.1", 0, RUN_FACTS, NODES)
    try:
        endpoint.show_ranks({phase: [0.5, 0.25] for phase in (*PHASES, WAITS)}, {1})
        for _ in range(3):
            endpoint.count()
        endpoint.read([{"step": 1, "loss": 2.0, "skipped": 1.0, "loader_wait_seconds": 0.01}])
        return get(f"http://127.0.0.1:{endpoint.port}/metrics")
    finally:
        endpoint.close()


def metric_names(text: str) -> set[str]:
    """Every name of ours in a text, suffixes of histograms included."""
    return set(re.findall(r"(?<![\w:])widebatch_\w+", text))


def promtool(*arguments: str, stdin: str | None = None) -> str:
    """Run it; its output. Fails with that where it complains."""
    done = subprocess.run(
        ["promtool", *arguments], input=stdin, capture_output=True, text=True, timeout=120
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


class Server:
    """A Prometheus server that answers on loopback."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1/"

    def api(self, path: str, **arguments: str) -> Any:
        query = f"?{urllib.parse.urlencode(arguments)}" if arguments else ""
        return json.loads(get(f"{self._url}{path}{query}"))["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Labels and value of every series that it finds now."""
        found = self.api("query", query=expression)["result"]
        return [{**series["metric"], "value": float(series["value"][1])} for series in found]

    def targets(self) -> dict[str, str]:
        """Health of every target by its address."""
        active = self.api("targets")["activeTargets"]
        return {target["labels"]["instance"]: target["health"] for target in active}

    def firing(self) -> dict[str, dict[str, str]]:
        """Labels of the alerts that fire, by name; one of each."""
        alerts = self.api("alerts")["alerts"]
        return {a["labels"]["alertname"]: a["labels"] for a in alerts if a["state"] == "firing"}


def eventually(what: str, check: Callable[[], Any], seconds: float = 180) -> Any:
    """The first result of ``check`` that is true; fails after ``seconds`` without one."""
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.5)
    return found


def hurried(rules: str) -> str:
    """The real rules, with 2 seconds in place of a minute."""
    faster = re.sub(r"(for: |\[)(\d+)m\b", lambda m: f"{m[1]}{2 * int(m[2])}s", rules)
    return faster.replace("> 900", "> 30")


@contextlib.contextmanager
def prometheus_server(folder: Path, targets: str) -> Iterator[Server]:
    """Debian's server with our rules in a hurry, which scrapes what the files ``targets`` name."""
    folder.mkdir()
    for path in MONITORING.glob("*.yml"):
        (folder / path.name).write_text(hurried(path.read_text()))
    discovery = {"files": [targets], "refresh_interval": "1s"}
    jobs = [{"job_name": "widebatch", "file_sd_configs": [discovery]}]
    config = {
        "global": {
            "scrape_interval": "1s",
            "scrape_timeout": "1s",
            "evaluation_interval": "1s",
        },
        "rule_files": ["*.yml"],
        "scrape_configs": jobs,
    }
    (folder / "prometheus.json").write_text(json.dumps(config))  # JSON is YAML
    promtool("check", "config", str(folder / "prometheus.json"))
    port = free_port()
    arguments = [
        "prometheus",
        f"--config.file={folder / 'prometheus.json'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=log)
    try:
        server = Server(port)
        eventually(f"it is ready; see {folder}/log", lambda: _is_ready(port, process))
        yield server
    finally:
        process.kill()
        process.wait()


def _is_ready(port: int, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "the server ended"
    try:
        return "ready" in get(f"http://127.0.0.1:{port}/-/ready").lower()
    except OSError:
        return False
