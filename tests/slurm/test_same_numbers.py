"""The real program under Slurm: a requeued run has the numbers of one that was left alone."""

import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import CHECKOUT, Cluster, eventually
from tests.trainer.runs import checkpoint_bytes, metrics, pack_images, samples

pytestmark = pytest.mark.slurm

STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_images(tmp_path_factory.mktemp("data"))


@pytest.mark.timeout(700)
@pytest.mark.parametrize("tasks_per_node", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_interrupted_and_requeued_run_has_the_numbers_of_an_undisturbed_one(
    cluster: Cluster, data: Path, tmp_path: Path, tasks_per_node: int
) -> None:
    def submit(name: str) -> str:
        return cluster.submit(
            [
                *["--nodes=2", f"--ntasks-per-node={tasks_per_node}", "--cpus-per-task=1"],
                *["--time=15", f"--job-name={name}"],
            ],
            CHECKOUT / "slurm" / "simclr_cifar10.sh",
            *["--data.train", str(data), "--batch", "24", "--steps", str(STEPS), "--seed", "3"],
            *["--out", str(tmp_path / name), "--log-samples"],
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

    interrupted, undisturbed = submit("interrupted"), submit("undisturbed")
    eventually(lambda: steps_done("interrupted") >= 2, 150, logs)
    cluster.signal(interrupted)
    for job, restarts in ((interrupted, "1"), (undisturbed, "0")):
        ended = cluster.wait(job, timeout=500)
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", restarts), logs()

    assert "stopped after step" in (tmp_path / f"interrupted-{interrupted}.out").read_text()
    expected, found = tmp_path / "undisturbed", tmp_path / "interrupted"
    assert len(metrics(expected)) == STEPS
    assert metrics(found) == metrics(expected)
    assert samples(found) == samples(expected)
    assert checkpoint_bytes(found) == checkpoint_bytes(expected)
