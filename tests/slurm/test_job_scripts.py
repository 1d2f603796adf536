"""slurm/simclr_*.sh on a real cluster, around a program that only counts."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import CHECKOUT, Cluster, eventually

pytestmark = pytest.mark.slurm

SMALL = ["--cpus-per-task=1", "--time=5"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout's job scripts under a path with spaces."""
    home = tmp_path / "my check out"
    shutil.copytree(CHECKOUT / "slurm", home / "slurm")
    python = home / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    program = Path(__file__).with_name("fake_program.py")
    python.write_text(
        f"""#!/bin/sh
case $3 in
  launch.restarts) PYTHONPATH="{CHECKOUT}" exec "{sys.executable}" "$@" ;;
  *) exec "{sys.executable}" "{program}" "$@" ;;
esac
"""
    )
    python.chmod(0o755)
    return home


@pytest.fixture
def submitted_from(tmp_path: Path) -> Path:
    folder = tmp_path / "any folder"
    folder.mkdir()
    return folder


def starts(out: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in out.glob("start*.json")}


def log_of(folder: Path) -> str:
    return "\n".join(path.read_text() for path in folder.glob("*.out"))


def test_settings_places_and_rendezvous_reach_every_task(
    cluster: Cluster, checkout: Path, submitted_from: Path
) -> None:
    job = cluster.submit(
        [*SMALL, "--nodes=2", "--job-name=first try"],
        checkout / "slurm" / "simclr_cifar10.sh",
        "--seed",
        "7",
        "--note",
        "two  words and a 'quote'",
        environ={"DATA": "my data/train.beton", "OMP_NUM_THREADS": ""},
        cwd=submitted_from,
    )
    assert cluster.wait(job)["ExitCode"] == "0:0", log_of(submitted_from)
    records = starts(submitted_from / "runs" / "first try")
    assert sorted(records) == [f"start0.rank{rank}" for rank in range(4)]
    for record in records.values():
        assert record["cwd"] == str(submitted_from)
        assert record["arguments"] == [
            *["-P", "-m", "launch", "pretrain", "simclr-cifar10-r18"],
            *["--out", "runs/first try", "--data.train", "my data/train.beton"],
            *["--seed", "7", "--note", "two  words and a 'quote'"],
        ]
        environ = record["environ"]
        assert environ["SLURM_NTASKS"] == "4"
        assert environ["SLURM_STEP_TASKS_PER_NODE"] == "2(x2)"
        assert environ["SLURM_CPUS_PER_TASK"] == environ["OMP_NUM_THREADS"] == "1"
        assert environ["CUDA_VISIBLE_DEVICES"] == "0,1"  # a task sees all GPUs of its node


def test_a_header_without_cpus_per_task_pins_no_task_to_one_cpu(
    cluster: Cluster, checkout: Path, submitted_from: Path
) -> None:
    script = checkout / "slurm" / "simclr_cifar10.sh"
    lines = script.read_text().splitlines(keepends=True)
    script.write_text("".join(line for line in lines if "--cpus-per-task" not in line))
    environ = {"OMP_NUM_THREADS": ""}
    job = cluster.submit(["--time=5", "--nodes=1"], script, environ=environ, cwd=submitted_from)
    assert cluster.wait(job)["ExitCode"] == "0:0", log_of(submitted_from)
    for record in starts(submitted_from / "runs" / "simclr-cifar10").values():
        assert "SRUN_CPUS_PER_TASK" not in record["environ"]
        assert record["environ"]["OMP_NUM_THREADS"] == ""


def test_interrupted_job_requeues_and_goes_on_where_it_stopped(
    cluster: Cluster, checkout: Path, submitted_from: Path
) -> None:
    out = submitted_from / "runs" / "counting"
    job = cluster.submit(
        [*SMALL, "--nodes=2", "--ntasks-per-node=1", "--job-name=counting"],
        checkout / "slurm" / "simclr_r50.sh",
        environ={"STEPS": "60"},
        cwd=submitted_from,
    )
    eventually(lambda: (out / "listening.1").exists(), 30, lambda: log_of(submitted_from))
    cluster.signal(job)
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    assert sorted(starts(out)) == [f"start{n}.rank{rank}" for n in range(2) for rank in range(2)]
    for rank in range(2):
        assert 0 < int((out / f"step.{rank}").read_text()) < 60
        assert (out / f"done.{rank}").read_text() == "60"
    assert [path.name for path in out.parent.iterdir()] == ["counting"]  # the marker is gone
    assert "start 1:" in log_of(submitted_from)
    assert "start 2:" in log_of(submitted_from)


def test_job_interrupted_before_the_program_listens_is_requeued(
    cluster: Cluster, checkout: Path, submitted_from: Path
) -> None:
    out = submitted_from / "run"
    job = cluster.submit(
        [*SMALL, "--ntasks-per-node=1"],
        checkout / "slurm" / "simclr_cifar10.sh",
        "--out",
        str(out),
        environ={"DEAF": "60"},
        cwd=submitted_from,
    )
    eventually(lambda: "start0.rank0" in starts(out), 30, lambda: log_of(submitted_from))
    cluster.signal(job)
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log_of(submitted_from)


@pytest.mark.reliability(28)
def test_one_failed_task_ends_the_job_and_it_is_not_requeued(
    cluster: Cluster, checkout: Path, submitted_from: Path
) -> None:
    """Not even though the end of rank 1 has rank 0 save and leave word that it was preempted."""
    job = cluster.submit(
        [*SMALL, "--nodes=2", "--ntasks-per-node=1"],
        checkout / "slurm" / "simclr_cifar10.sh",
        environ={"FAIL_RANK": "1", "FAIL_CODE": "1", "STEPS": "100000"},
        cwd=submitted_from,
    )
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), log_of(submitted_from)
    assert (submitted_from / "runs" / "simclr-cifar10" / "step.0").exists()
    assert "starting again will not help" in log_of(submitted_from)


@pytest.mark.reliability(28)
@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_crash_loop_ends_when_its_restarts_are_spent(
    cluster: Cluster, checkout: Path, submitted_from: Path
) -> None:
    job = cluster.submit(
        [*SMALL, "--nodes=2", "--ntasks-per-node=1"],
        checkout / "slurm" / "simclr_cifar10.sh",
        environ={"FAIL_RANK": "1", "STEPS": "100000", "WIDEBATCH_RESTARTS": "2"},
        cwd=submitted_from,
    )
    ended = cluster.wait(job, timeout=180)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "2"), log_of(submitted_from)
    assert "it failed 3 times without a newer checkpoint" in log_of(submitted_from)
    left = {path.name for path in (submitted_from / "runs").iterdir()}
    assert left == {"simclr-cifar10"}  # no folder of endings


@pytest.mark.reliability(25)
def test_cancelled_job_stays_cancelled(
    cluster: Cluster, checkout: Path, submitted_from: Path
) -> None:
    out = submitted_from / "run"
    job = cluster.submit(
        [*SMALL, "--ntasks-per-node=1"],
        checkout / "slurm" / "simclr_cifar10.sh",
        "--out",
        str(out),
        environ={"STEPS": "100000"},
        cwd=submitted_from,
    )
    eventually(lambda: (out / "listening.0").exists(), 30, lambda: log_of(submitted_from))
    cluster.run("scancel", job)
    eventually(lambda: job not in cluster.run("squeue", "-h", "-o", "%i").split(), 30)
    assert (out / "step.0").exists()  # its tasks were told, and saved
    ended = cluster.job(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")


@pytest.mark.slow
@pytest.mark.reliability(24)
def test_job_that_nears_its_time_limit_is_requeued_until_it_is_done(
    cluster: Cluster, checkout: Path, submitted_from: Path
) -> None:
    """By the header's own --signal, 120 s before the limit: here within 30 s of the start."""
    job = cluster.submit(
        ["--cpus-per-task=1", "--ntasks-per-node=1", "--time=2"],
        checkout / "slurm" / "simclr_cifar10.sh",
        environ={"STEPS": "900"},  # 45 s
        cwd=submitted_from,
    )
    ended = cluster.wait(job, timeout=200)
    assert ended["JobState"] == "COMPLETED", log_of(submitted_from)
    assert int(ended["Restarts"]) >= 1


@pytest.mark.slow
@pytest.mark.reliability(27)
def test_preempted_job_makes_way_and_comes_back(
    cluster: Cluster, checkout: Path, submitted_from: Path
) -> None:
    out = submitted_from / "run"
    job = cluster.submit(
        [*SMALL, "--nodes=3", "--exclusive", "--ntasks-per-node=1"],
        checkout / "slurm" / "simclr_cifar10.sh",
        "--out",
        str(out),
        environ={"STEPS": "300"},
        cwd=submitted_from,
    )
    eventually(lambda: (out / "listening.2").exists(), 30, lambda: log_of(submitted_from))
    urgent = cluster.run(
        *["sbatch", "--parsable", "--partition=urgent", "--nodes=3", "--exclusive"],
        *["--output=/dev/null", "--wrap=sleep 1"],
    ).strip()
    assert cluster.wait(urgent)["JobState"] == "COMPLETED"
    ended = cluster.wait(job, timeout=90)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log_of(submitted_from)
    assert 0 < int((out / "step.0").read_text()) < 300  # it saved, and was not only killed


def test_missing_environment_is_explained(
    cluster: Cluster, checkout: Path, submitted_from: Path
) -> None:
    job = cluster.submit(
        SMALL,
        checkout / "slurm" / "simclr_cifar10.sh",
        environ={"WIDEBATCH_PYTHON": "/no/such/python"},
        cwd=submitted_from,
    )
    assert cluster.wait(job)["ExitCode"] == "2:0"
    assert "no /no/such/python: run 'make setup'" in log_of(submitted_from)
