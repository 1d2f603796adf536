"""slurm/local_cluster.sh itself."""

import re
import socket
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import LOCAL_CLUSTER, Cluster, eventually, processes_with

pytestmark = pytest.mark.slurm


def node_hosts(cluster: Cluster, nodes: int) -> list[str]:
    return sorted(cluster.run("srun", f"-N{nodes}", "hostname").split())


def test_up_is_repeatable_and_down_leaves_nothing(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "own")
    try:
        cluster.up("--nodes", "3", "--mode", "local")
        daemons = processes_with("WIDEBATCH_DAEMON", str(tmp_path / "own"))
        assert sum("slurmd" in name for name in daemons) == 3
        cluster.up("--nodes", "3", "--mode", "local")
        assert processes_with("WIDEBATCH_DAEMON", str(tmp_path / "own")) == daemons
        assert len(node_hosts(cluster, 3)) == 3
        cluster.run("sbatch", "--nodes=2", "--output=/dev/null", "--wrap=srun sleep 1000")
        eventually(lambda: cluster.run("squeue", "-h", "-o", "%T").strip() == "RUNNING", 10)
    finally:
        cluster.control("down")
    cluster.control("down")  # from any state, also from none
    assert processes_with("WIDEBATCH_DAEMON", str(tmp_path / "own")) == []
    assert processes_with("SLURM_CONF", cluster.environ["SLURM_CONF"]) == []


def test_a_port_that_is_taken_is_left_to_its_owner(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "own")
    try:
        ports = []
        with socket.socket() as other:
            for attempt in range(2):
                cluster.up("--nodes", "1", "--mode", "local")
                found = re.search(
                    r"^SlurmctldPort=(\d+)$", (tmp_path / "own/slurm.conf").read_text(), re.M
                )
                assert found
                ports.append(int(found[1]))
                assert len(node_hosts(cluster, 1)) == 1
                cluster.control("down")
                if attempt == 0:
                    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    other.bind(("", ports[0]))
                    other.listen()
        assert ports[0] != ports[1]
    finally:
        cluster.control("down")


def test_node_that_loses_its_power_comes_back(cluster: Cluster) -> None:
    before = node_hosts(cluster, 3)
    cluster.control("status")
    cluster.control("node-off", "2")
    with pytest.raises(AssertionError, match="not up, or not all of it"):
        cluster.control("status")
    cluster.control("node-on", "2")
    eventually(lambda: "node2" in cluster.run("sinfo", "-h", "-N", "-t", "idle"), 30)
    assert node_hosts(cluster, 3) == before
    cluster.control("status")


@pytest.mark.parametrize(
    "arguments", [["up", "--nodes", "many"], ["up", "--mode", "cloud"], ["node-off", "99"], []]
)
def test_wrong_arguments_are_refused(cluster: Cluster, arguments: list[str]) -> None:
    result = subprocess.run(
        [LOCAL_CLUSTER, *arguments], env=cluster.environ, capture_output=True, text=True, timeout=30
    )
    assert result.returncode != 0
    assert result.stdout + result.stderr
