"""Other libraries' variables change no run, and no terminal is too poor to be written to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from launch.surroundings import leave_out

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, *arguments: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run ``code`` in a process of its own with variables in its environment."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        timeout=240,
    )


def test_what_a_run_does_not_obey_is_left_out_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    others = {"NCCL_SOCKET_IFNAME": "ib0", "OMP_NUM_THREADS": "4", "WANDB_MODE": "offline"}
    for rank in ("0", "1"):
        environ = {**others, "RANK": rank, "LT_PRECISION": "bf16-true", "OMP_PROC_BIND": "true"}
        leave_out(environ)
        assert environ == {**others, "RANK": rank}
    of_openmp, of_lightning = caplog.messages
    assert of_lightning.startswith("LT_PRECISION=bf16-true in the environment is not obeyed: ")
    assert of_openmp.startswith("OMP_PROC_BIND=true in the environment is not obeyed: ")


def test_the_endpoint_serves_its_own_process_alone(tmp_path: Path) -> None:
    code = (
        "from launch.surroundings import leave_out; leave_out();"
        "from trainer.telemetry.prometheus import Prometheus;"
        " Prometheus('127.0.0.1', 0, None).close()"
    )
    done = python(code, PROMETHEUS_MULTIPROC_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_names_that_the_terminal_cannot_show_are_written_escaped(
    encoding: str, tmp_path: Path
) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    for name in (os.fsdecode(b"\xe9"), "π"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(folder / name / "1.png")
    code = "import sys; from launch.__main__ import main; sys.exit(main(['pack', *sys.argv[1:]]))"
    packed = tmp_path / os.fsdecode(b"\xff.beton")
    done = python(code, folder, packed, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert rb"\udcff.beton: 2 images, 2 classes" in done.stdout


@pytest.mark.slow
def test_files_of_the_working_folder_named_as_ours_are_not_taken_for_ours(tmp_path: Path) -> None:
    """Under torchrun in the documented form, and in the programs that we start ourselves."""
    for name in ("launch.py", "trainer.py", "data_pipeline.py", "numpy.py", "kernels/__init__.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("raise SystemExit('not ours')\n")
    Image.new("RGB", (40, 40)).save(tmp_path / "1.png")
    scripts = Path(sys.executable).parent
    command = [scripts / "torchrun", "--standalone", "--nproc-per-node", "1", "--no-python"]
    command += [scripts / "widebatch", "pack", ".", "x.beton", "--workers", "2"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.beton").exists()
