"""The scrape endpoint of a run, and the file by which a Prometheus server finds it.

The file is of Prometheus' ``file_sd`` format. It is there while the run goes on and gone when it
ends as planned. Of a run that fails it stays: its target is down then, which is what the alert on
lost runs looks at. The next attempt at the run replaces it.
"""

import contextlib
import hashlib
import logging
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from lightning_fabric import Fabric

from common.collectives import all_gather_json, broadcast_json, waiting
from common.errors import ConfigError
from common.files.atomic_file import write_atomically
from common.files.strict_json import dump_json
from trainer.telemetry import TelemetryConfig
from trainer.telemetry.prometheus import Prometheus, RunFacts

log = logging.getLogger(__name__)

FILE = "prometheus-targets.json"
"""In a run's folder, where no other is set."""


@contextlib.contextmanager
def scraped(
    config: TelemetryConfig, run: RunFacts, out: Path, fabric: Fabric
) -> Iterator[Prometheus | None]:
    """Serve metrics on rank 0, and name the endpoint in a file. A collective.

    Yields:
        The endpoint, on rank 0 alone, if the settings have one.

    Raises:
        ConfigError: on all ranks: it cannot listen.
    """
    path = targets_path(config, out)
    if not config.prometheus_port:
        if fabric.is_global_zero:
            _withdraw(path)  # an earlier attempt's, which failed
        yield None
        return
    host, port = config.prometheus_host, config.prometheus_port
    endpoint, refused = None, ""
    with contextlib.ExitStack() as stack:
        with waiting("names of nodes: all-gather"):
            nodes = all_gather_json(socket.gethostname())
        if fabric.is_global_zero:
            try:
                endpoint = Prometheus(host, port, run, nodes)
                stack.callback(endpoint.close)
            except ConfigError as error:  # which all ranks are to raise
                refused = str(error)
        with waiting("scrape endpoint: broadcast"):
            refused = broadcast_json(refused)
        if refused:
            raise ConfigError(refused)
        if endpoint is not None:
            _publish(path, address(host, port), run.name)
        yield endpoint
        if endpoint is not None:  # not in a `finally`: see the module's docstring
            _withdraw(path)


def targets_path(config: TelemetryConfig, out: Path) -> Path:
    """Where the run's targets stand: in its folder, or under a name of its own in a shared one."""
    if config.prometheus_targets is None:
        return out / FILE
    place = out.resolve()
    name = re.sub(r"[^\w.-]", "_", place.name, flags=re.ASCII)
    digest = hashlib.sha256(str(place).encode()).hexdigest()[:8]
    return config.prometheus_targets / f"widebatch-{name}-{digest}.json"


def address(host: str, port: int) -> str:
    """What others connect to where ``host`` was bound: this machine's name for any address."""
    if host in ("0.0.0.0", "::"):  # noqa: S104
        host = socket.gethostname()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _publish(path: Path, target: str, run: str) -> None:
    groups = [{"targets": [target], "labels": {"run": run}}]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (dump_json(groups, indent=1) + "\n").encode())
    except OSError as error:  # nobody stops a run of days for this
        log.warning("%s: %s; name %s to Prometheus by hand", path, error.strerror, target)


def _withdraw(path: Path) -> None:
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # never written
            path.unlink()
    except OSError as error:
        log.warning("%s: %s; delete it, its target is gone", path, error.strerror)
