"""A scrape endpoint on every node of a run, and the file by which a Prometheus server finds them.

The file is of Prometheus' ``file_sd`` format: one entry for each node, labelled with run and node.
It is there while the run goes on and gone when it ends as planned. Of a run that fails it stays:
its targets are down then, which is what the alert on lost runs looks at. The next attempt at the
run replaces it.
"""

import contextlib
import hashlib
import ipaddress
import logging
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric

from common.collectives import all_gather_json, waiting
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
    """Serve metrics on the first rank of each node, and name all endpoints in a file. A collective.

    Args:
        config: the same port on all ranks.
        run: what rank 0's endpoint says of the run.
        out: the run's folder, there on rank 0.
        fabric: knows ranks and nodes.

    Yields:
        This process's endpoint; ``None`` where it has none.

    Raises:
        ConfigError: on all ranks: an endpoint cannot listen.
    """
    path = targets_path(config, out)
    if not config.prometheus_port:
        if fabric.is_global_zero:
            _withdraw(path)  # an earlier attempt's, which failed
        yield None
        return
    with contextlib.ExitStack() as stack:
        endpoint = None
        mine: dict[str, Any] = {"node": fabric.node_rank}
        if not fabric.local_rank:
            host, port = config.prometheus_host, config.prometheus_port
            try:
                endpoint = Prometheus(host, port, run if fabric.is_global_zero else None)
                stack.callback(endpoint.close)
                mine |= {"target": address(host, port), "host": socket.gethostname()}
            except ConfigError as error:  # which all ranks are to raise
                mine["error"] = str(error)
        with waiting("scrape targets: all-gather"):
            rows = all_gather_json(mine)
        errors = [row["error"] for row in rows if "error" in row]
        if errors:
            raise ConfigError(errors[0])
        if endpoint is not None:
            endpoint.ranks = {r for r, row in enumerate(rows) if row["node"] == mine["node"]}
        if fabric.is_global_zero:
            _publish(path, target_groups(rows, run.name))
        yield endpoint
        if fabric.is_global_zero:  # not in a `finally`: see the module's docstring
            _withdraw(path)


def targets_path(config: TelemetryConfig, out: Path) -> Path:
    """Where the run's targets stand: in its folder, or under a name of its own in a shared one."""
    if config.prometheus_targets is None:
        return out / FILE
    place = out.resolve()
    name = re.sub(r"[^\w.-]", "_", place.name, flags=re.ASCII)
    digest = hashlib.sha256(str(place).encode()).hexdigest()[:8]
    return config.prometheus_targets / f"widebatch-{name}-{digest}.json"


def target_groups(rows: list[dict[str, Any]], run: str) -> list[dict[str, Any]]:
    """Entries for ``file_sd``, one for each endpoint that can be told apart by its address.

    Args:
        rows: of all ranks: ``node``, and where a rank serves ``target`` and ``host``.
        run: its name.
    """
    groups: dict[str, dict[str, Any]] = {}
    served = [row for row in rows if "target" in row]
    for row in served:
        labels = {"run": run, "node": row["host"]}
        groups.setdefault(row["target"], {"targets": [row["target"]], "labels": labels})
    if len(groups) < len(served):
        log.warning(
            "metrics of %d nodes can be read on these nodes only, and the targets file names rank"
            " 0's: set --telemetry.prometheus-host 0.0.0.0 on a network that you trust",
            len(served),
        )
    return list(groups.values())


def address(host: str, port: int) -> str:
    """What others connect to where ``host`` was bound: this machine's name for any address."""
    try:
        bound = ipaddress.ip_address(host)
    except ValueError:
        return f"{host}:{port}"
    if bound.is_unspecified:
        return f"{socket.gethostname()}:{port}"
    return f"[{bound}]:{port}" if bound.version == 6 else f"{bound}:{port}"


def _publish(path: Path, groups: list[dict[str, Any]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (dump_json(groups, indent=1) + "\n").encode())
    except OSError as error:  # nobody stops a run of days for this
        log.warning("%s: %s; name the run's targets to Prometheus by hand", path, error.strerror)


def _withdraw(path: Path) -> None:
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # never written
            path.unlink()
    except OSError as error:
        log.warning("%s: %s; delete it, its targets are gone", path, error.strerror)
