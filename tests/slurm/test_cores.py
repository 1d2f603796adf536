"""Where Slurm binds tasks to CPUs, a process decodes with all of its own, and with its part of
those that it shares: on a real cluster with task/affinity, over pretended CPUs."""

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import CHECKOUT, Cluster
from tests.trainer.runs import pack_images

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

CPUS = 12  # of the node


@pytest.fixture(scope="module")
def binding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("binding"))
    try:
        cluster.up("--nodes", "1", "--cpus", str(CPUS), "--gpus", "0", "--bind")
        yield cluster
    finally:
        cluster.control("down")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_images(tmp_path_factory.mktemp("data"), count=160)


TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2"
OWN_FOUR = 'taskset -c "$((4 * LOCAL_RANK))-$((4 * LOCAL_RANK + 3))"'
CASES = {
    "bound": (2, 5, "srun $PYTHON $PROGRAM", ["5 of 5"] * 2),
    "not bound": (2, 6, "srun --cpu-bind=none $PYTHON $PROGRAM", ["6 of 12"] * 2),
    "one process": (1, 7, "srun $PYTHON $PROGRAM", ["7 of 7"]),
    "torchrun, processes that share": (1, 8, f"srun $PYTHON {TORCHRUN} $PROGRAM", ["4 of 8"] * 2),
    "torchrun, processes that it binds": (
        *(1, 8, f"srun $PYTHON {TORCHRUN} --no-python sh -c '{OWN_FOUR} $PYTHON $PROGRAM'"),
        ["4 of 4"] * 2,
    ),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("tasks", "cpus", "command", "threads"), CASES.values(), ids=CASES.keys())
def test_a_process_decodes_with_the_cores_that_are_its_share(
    binding: Cluster,
    data: Path,
    tmp_path: Path,
    tasks: int,
    cpus: int,
    command: str,
    threads: list[str],
) -> None:
    (tmp_path / "threads").mkdir()
    words = [CHECKOUT / "tests/slurm/decoding_threads.py", data, tmp_path / "threads"]
    script = tmp_path / "job.sh"
    script.write_text(
        f"""#!/bin/sh
export PYTHON={sys.executable} PROGRAM={shlex.quote(shlex.join(map(str, words)))}
export PYTHONPATH={CHECKOUT} SRUN_CPUS_PER_TASK={cpus}
{command}
"""
    )
    options = [f"--ntasks-per-node={tasks}", f"--cpus-per-task={cpus}", "--exclusive", "--time=20"]
    job = binding.submit(options, script, cwd=tmp_path)
    ended = binding.wait(job, timeout=500)
    log = "\n".join(path.read_text() for path in tmp_path.glob("slurm-*.out"))
    assert ended["ExitCode"] == "0:0", log
    found = [path.read_text() for path in sorted((tmp_path / "threads").iterdir())]
    assert found == threads, log
