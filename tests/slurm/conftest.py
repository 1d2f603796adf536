"""One cluster of three nodes for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, processes_with


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    cluster = Cluster(folder)
    try:
        cluster.up("--nodes", "3")
        yield cluster
    finally:
        cluster.control("down")
    left = processes_with("SLURM_CONF", str(folder / "slurm.conf"))
    assert not left, f"processes left behind by jobs: {left}"
