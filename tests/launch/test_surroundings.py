"""Other libraries' variables change no run, and no terminal is too poor to be written to."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tqdm import tqdm

from launch.exit_codes import ExitCode
from launch.surroundings import Harmless, leave_out

ROOT = Path(__file__).resolve().parents[2]


def python(
    code: str, *arguments: str | Path, **environment: str
) -> subprocess.CompletedProcess[bytes]:
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
        "from tests.monitoring.scrapes import NODES, RUN_FACTS;"
        "from trainer.telemetry.prometheus import Prometheus;"
        " Prometheus('127.0.0.1', 0, RUN_FACTS, NODES).close()"
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


NASTY = "a\x1b[2J\x1b]0;title\x07\x9b31m\r\nb"
SHOWN = r"a\x1b[2J\x1b]0;title\x07\x9b31m\x0d\x0ab"
WITHOUT_ENDS = r"a\x1b[2J\x1b]0;title\x07\x9b31m b"  # an error is one line of words


@pytest.fixture
def nasty(tmp_path: Path) -> Path:
    """A folder of classes whose names, and those of their files, would steer a terminal."""
    folder = tmp_path / "set"
    for number in range(3):
        (folder / f"{number}{NASTY}").mkdir(parents=True)
        Image.effect_noise((40, 40), 90).save(folder / f"{number}{NASTY}" / f"{NASTY}.png")
    (folder / f"0{NASTY}" / f"{NASTY}.jpg").write_bytes(b"no image")
    (folder / f"0{NASTY}" / f"x.{NASTY}").write_bytes(b"no image")
    (folder / f"3{NASTY}").mkdir()
    return folder


def controls(said: bytes) -> set[str]:
    return {letter for letter in said.decode() if ord(letter) < 32 or 128 <= ord(letter) < 160}


def test_no_name_steers_the_terminal(nasty: Path, tmp_path: Path) -> None:
    code = "import sys; from launch.__main__ import main; sys.exit(main(sys.argv[1:]))"
    packed = tmp_path / f"{NASTY}.beton"
    done = python(code, "pack", nasty, packed)
    assert done.returncode == 0, done.stderr
    assert f"{SHOWN}.beton: 3 images, 4 classes" in done.stdout.decode()
    assert f"  0{SHOWN}/{SHOWN}.jpg: not an image\n" in done.stdout.decode()
    assert f"without a usable image: 3{SHOWN}\n" in done.stdout.decode()
    assert f"packing {SHOWN}.beton: 4 of 4 images" in done.stderr.decode()
    refused = python(code, "pack", "--strict", nasty, packed)
    assert (refused.returncode, refused.stderr.count(b"\n")) == (2, 1)
    assert f"such as 0{WITHOUT_ENDS}/x.{WITHOUT_ENDS} (not" in refused.stderr.decode()
    words = ("evaluate", "duplicates", "pixels:8", "--data.train", packed, "--threshold", "0.01")
    listed = python(code, *words)
    assert listed.returncode == 0, listed.stderr
    assert f"#0 0{SHOWN}/{SHOWN}.png and #" in listed.stdout.decode()
    for each in (done, refused, listed):
        assert controls(each.stdout + each.stderr) <= {"\n"}


def test_help_has_its_colours_on_a_terminal() -> None:
    code = (
        "import pty, sys;"
        "words = ['-m', 'launch', 'pretrain', 'simclr-r50', '--help'];"
        "sys.exit(pty.spawn([sys.executable, *words]))"
    )
    done = python(code, TERM="xterm")
    assert done.returncode == 0, done.stdout
    assert b"\x1b[1m" in done.stdout and rb"\x1b" not in done.stdout


def test_help_fills_its_lines() -> None:
    """A docstring's line ends are the source's, not the terminal's."""
    code = "import sys; from launch.command_line import run; run(sys.argv[1:])"
    done = python(code, "evaluate", "knn", "-h", COLUMNS="100")
    reduced = done.stdout.decode().partition("--max-reduction")[2]
    inside = [line.strip(" │") for line in reduced.splitlines()[1:-1] if line.startswith("│")]
    assert len(inside) > 3
    assert min(map(len, inside[:-1])) > max(map(len, inside)) - 15  # a long word may not fit


def test_a_reader_that_has_enough_is_no_error() -> None:
    words = [sys.executable, "-m", "launch", "evaluate", "knn", "--help"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == ExitCode.UNREAD


def test_a_bar_with_a_name_stays_on_its_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", Harmless(stream))
    with tqdm(total=2, desc=NASTY, file=sys.stderr) as bar:
        bar.update()
        with tqdm(total=2, desc="second", file=sys.stderr, position=1) as second:
            second.update()
    said = stream.getvalue()
    assert said.replace("\x1b[A", "").count("\x1b") == 0
    assert "\x1b[A" in said  # from the second bar back to the first
    assert f"\r{SHOWN}: " in said and "\x07" not in said


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
