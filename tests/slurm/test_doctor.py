"""``widebatch doctor`` as a Slurm job, over nodes that each have an address of their own."""

import json
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import CHECKOUT, Cluster
from tests.trainer.runs import pack_images

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.mark.timeout(400)
def test_all_processes_of_a_job_examine_their_nodes_and_prove_equal_results(
    cluster: Cluster, tmp_path: Path
) -> None:
    data = pack_images(tmp_path)
    found = tmp_path / "findings.json"
    script = tmp_path / "doctor.sh"
    script.write_text(
        f"""#!/bin/sh
export OMP_NUM_THREADS=1
cd "{CHECKOUT}"
exec srun "{sys.executable}" -m launch doctor --data "{data}" --out "{tmp_path}" --json "{found}"
"""
    )
    options = ["--nodes=3", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=5"]
    job = cluster.submit(options, script, cwd=tmp_path)
    ended = cluster.wait(job, timeout=360)
    log = "\n".join(path.read_text() for path in tmp_path.glob("slurm-*.out"))
    assert ended["ExitCode"] == "0:0", log

    findings = json.loads(found.read_text())
    assert all(finding["verdict"] != "bad" for finding in findings), log
    by_check = {finding["check"]: finding for finding in findings}
    for check in ("bandwidth", "clocks", "folder", "loss", "batch norm", "lars", "queue"):
        assert by_check[check]["verdict"] == "good", log
    assert by_check["packages"]["ranks"] == [0, 1, 2]
    assert "3 pair(s)" in by_check["bandwidth"]["said"]  # of nodes
