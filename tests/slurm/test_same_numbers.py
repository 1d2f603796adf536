"""The real program under Slurm: a requeued run has the numbers of one that was left alone."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import CHECKOUT, Cluster, eventually
from tests.trainer.runs import checkpoint_bytes, metrics, pack_images, samples

pytestmark = pytest.mark.slurm

STEPS = 12

Disturbance = Callable[[Cluster, str], None]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_images(tmp_path_factory.mktemp("data"))


def _signal(cluster: Cluster, job: str) -> None:
    """As ``--signal`` does before the time limit."""
    cluster.signal(job)


def _requeue(cluster: Cluster, job: str) -> None:
    """As an operator does."""
    cluster.run("scontrol", "requeue", job)


def _power_cut(cluster: Cluster, job: str) -> None:
    """Until Slurm has noticed, it starts other jobs on that node too."""
    node = _last_node(cluster, job)
    cluster.control("node-off", node.removeprefix("node"))
    eventually(lambda: node in _nodes_in("down", cluster), 120)


def _drain(cluster: Cluster, job: str) -> None:
    """The node keeps the job until it is requeued, and takes no other."""
    node = f"NodeName={_last_node(cluster, job)}"
    cluster.run("scontrol", "update", node, "State=DRAIN", "Reason=test")
    cluster.signal(job)


def _last_node(cluster: Cluster, job: str) -> str:
    names = cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"])
    return names.split()[-1]


@pytest.fixture
def whole_cluster(cluster: Cluster) -> Iterator[Cluster]:
    """All nodes are back afterwards."""
    yield cluster
    for number in range(1, 4):
        if f"node{number}" in _nodes_in("down", cluster):
            cluster.control("node-on", str(number))
    eventually(lambda: _all_usable(cluster), 60)


def _all_usable(cluster: Cluster) -> bool:
    """Whether jobs can have every node; drained ones are asked back, which may take several."""
    for node in _nodes_in("drain,draining,drained", cluster):
        cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
    return len(_nodes_in("idle,mix,alloc,comp", cluster)) == 3


def _nodes_in(states: str, cluster: Cluster) -> set[str]:
    return set(cluster.run("sinfo", "-h", "-N", "-t", states, "-o", "%N").split())


def _disturbed(disturbance: Disturbance, row: int, tasks: int = 1, slow: bool = True) -> object:
    marks = [pytest.mark.reliability(row), *([pytest.mark.slow] if slow else [])]
    name = f"{disturbance.__name__.strip('_')}-{tasks}"
    return pytest.param(disturbance, tasks, marks=marks, id=name)


@pytest.mark.timeout(700)
@pytest.mark.parametrize(
    ("disturb", "tasks_per_node"),
    [
        _disturbed(_signal, 24, slow=False),
        _disturbed(_signal, 24, tasks=2),
        _disturbed(_requeue, 25),
        _disturbed(_power_cut, 26),
        _disturbed(_drain, 26),
    ],
)
def test_a_disturbed_job_comes_back_and_has_the_numbers_of_an_undisturbed_one(
    whole_cluster: Cluster, data: Path, tmp_path: Path, disturb: Disturbance, tasks_per_node: int
) -> None:
    cluster = whole_cluster

    def submit(name: str) -> str:
        return cluster.submit(
            [
                *["--nodes=2", f"--ntasks-per-node={tasks_per_node}", "--cpus-per-task=1"],
                *["--time=15", f"--job-name={name}"],
            ],
            CHECKOUT / "slurm" / "simclr_cifar10.sh",
            *["--data.train", str(data), "--batch", "24", "--steps", str(STEPS), "--seed", "3"],
            *["--out", str(tmp_path / name), "--log-samples", "--checkpoint.every-steps", "2"],
            *["--precision", "fp32", "--device", "cpu", "--encoder.stem", "imagenet"],
            *["--loader.backend", "torchvision", "--telemetry.log-every", "1"],
            environ={"WIDEBATCH_PYTHON": sys.executable},
            cwd=tmp_path,
        )

    def logs() -> str:
        return "\n".join(f"{path}:\n{path.read_text()}" for path in tmp_path.glob("*.out"))

    def steps_done(name: str) -> int:
        path = tmp_path / name / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    interrupted = submit("interrupted")
    eventually(lambda: steps_done("interrupted") >= 3, 150, logs)
    disturb(cluster, interrupted)
    undisturbed = submit("undisturbed")  # only now: it must not take the node that is spare
    for job, restarts in ((interrupted, "1"), (undisturbed, "0")):
        ended = cluster.wait(job, timeout=500)
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", restarts), logs()

    expected, found = tmp_path / "undisturbed", tmp_path / "interrupted"
    assert len(metrics(expected)) == STEPS
    assert metrics(found) == metrics(expected)
    assert samples(found) == samples(expected)
    assert checkpoint_bytes(found) == checkpoint_bytes(expected)
