"""``--devices N``: processes that one command starts, tells to stop, and answers for."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from launch import devices
from launch.__main__ import main
from launch.exit_codes import ExitCode
from tests.docs.pages import CHECKOUT
from tests.faults import armed
from tests.said import error_line
from tests.trainer.runs import SMALL_ENCODER, assert_equal_runs, pack_images

SCRIPTS = Path(sys.executable).parent
WIDEBATCH = SCRIPTS / "widebatch"
LIMIT = 120  # seconds until a process that should have ended is taken to hang

# What a rank does: ends with a number, is killed, runs until it is told to stop (and needs two
# seconds for its checkpoint), or hears nothing.
RANK = """
import os, signal, sys, time
from launch.preemption import StopSignal
what = sys.argv[1 + int(os.environ["RANK"])]
if what.isdecimal():
    sys.exit(int(what))
if what == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
try:
    with StopSignal() as stop:
        stop()
        os.write(1, b"ready\\n")
        while not stop() or what == "deaf":
            time.sleep(0.02)
        time.sleep(2 if what == "slow" else 0)
except KeyboardInterrupt:
    pass
sys.exit(75)
"""
START = """
import sys
from launch import devices
devices._PROGRAM, devices._GRACE = (sys.executable, "-c", sys.argv[1]), 1.0
sys.exit(devices.start(sys.argv[2:], len(sys.argv[2:])))
"""


@pytest.fixture
def started() -> Iterator[list["subprocess.Popen[str]"]]:
    """Processes in groups of their own, of which nothing is left."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=LIMIT)


def start(
    started: "list[subprocess.Popen[str]]",
    *words: str | Path,
    folder: Path | None = None,
    **more: str,
) -> None:
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), **more},
    )
    started.append(process)


def of_ranks(*what: str) -> tuple[str, ...]:
    return (sys.executable, "-c", START, RANK, *what)


def wait_until_ready(process: "subprocess.Popen[str]") -> None:
    assert process.stdout
    lines = [process.stdout.readline() for _ in range(3)]
    assert lines == ["starting 2 processes\n", "ready\n", "ready\n"]


@pytest.mark.parametrize(
    ("ranks", "code"),
    [
        (("0", "0", "0"), 0),
        (("75", "0"), 75),
        (("130", "130"), 130),
        (("deaf", "1"), 1),
        (("2", "deaf"), 2),
        (("74", "killed"), 74),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_the_status_is_that_of_the_first_that_failed(
    ranks: Sequence[str], code: int, started: "list[subprocess.Popen[str]]"
) -> None:
    start(started, *of_ranks(*ranks))
    said, _ = started[0].communicate(timeout=LIMIT)
    assert started[0].returncode == code, said
    assert "Traceback" not in said


def test_of_those_who_failed_at_once_the_cause_counts_before_what_followed_from_it() -> None:
    assert devices._first_failed([None, 75, 74, 1]) == ExitCode.FATAL
    assert devices._first_failed([None, 75, 0, 130]) is None


def test_a_rank_that_is_killed_is_named(started: "list[subprocess.Popen[str]]") -> None:
    start(started, *of_ranks("deaf", "killed"))
    said, _ = started[0].communicate(timeout=LIMIT)
    assert started[0].returncode == ExitCode.RETRYABLE
    assert "rank 1 of 2 was killed by SIGKILL" in error_line(said)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_to_the_one_that_started_them_reaches_all(
    name: str, started: "list[subprocess.Popen[str]]"
) -> None:
    start(started, *of_ranks("wait", "wait"))
    wait_until_ready(started[0])
    started[0].send_signal(signal.Signals[name])
    said, _ = started[0].communicate(timeout=LIMIT)
    assert started[0].returncode == ExitCode.PREEMPTED
    assert said == f"{name}: a checkpoint follows at this step's end\n"


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_reaches_all_by_the_terminal_and_a_second_loses_nothing(times: int) -> None:
    terminal, theirs = pty.openpty()
    with subprocess.Popen(
        of_ranks("slow", "slow"),
        preexec_fn=lambda: os.login_tty(theirs),
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
    ) as process:
        try:
            os.close(theirs)
            read(terminal, "ready", 2)
            said = ""
            for word in ("a checkpoint follows", "SIGINT again")[:times]:
                os.write(terminal, b"\x03")
                said += read(terminal, word)
            said += read(terminal, "(to the end)")
            assert process.wait(LIMIT) == ExitCode.PREEMPTED, said
        finally:
            process.kill()
            os.close(terminal)
    assert said.count("a checkpoint follows") == 1 and said.count("again") == times - 1
    assert "Traceback" not in said


def read(terminal: int, text: str, times: int = 1) -> str:
    """What a terminal shows until ``text`` has come so often, or nobody writes there any more."""
    seen, end = "", time.monotonic() + LIMIT
    while seen.count(text) < times and time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                seen += os.read(terminal, 1 << 16).decode(errors="replace")
            except OSError:  # Linux's end of a terminal
                return seen
    return seen


def test_signals_wait_until_a_rank_knows_what_to_do(
    started: "list[subprocess.Popen[str]]",
) -> None:
    """They come while it imports, where Python's own answer is a traceback."""
    late = f"import os, time; os.write(1, b'ready\\n'); time.sleep(1)\n{RANK}"
    start(started, sys.executable, "-c", START, late, "wait", "wait")
    wait_until_ready(started[0])
    os.killpg(started[0].pid, signal.SIGINT)
    said, _ = started[0].communicate(timeout=LIMIT)
    assert started[0].returncode == ExitCode.PREEMPTED and "Traceback" not in said, said


def test_ctrl_c_reaches_those_that_are_started_after_it() -> None:
    late = "def port(): print('ready', flush=True); time.sleep(1); return 29500\n"
    late = f"import time\n{late}{START.replace('sys.exit', 'devices._free_port = port; sys.exit')}"
    terminal, theirs = pty.openpty()
    with subprocess.Popen(
        (sys.executable, "-c", late, RANK, "wait", "wait"),
        preexec_fn=lambda: os.login_tty(theirs),
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
    ) as process:
        try:
            os.close(theirs)
            read(terminal, "ready")
            os.write(terminal, b"\x03")
            assert process.wait(LIMIT) == ExitCode.PREEMPTED
        finally:
            process.kill()
            os.close(terminal)


def test_ranks_that_end_by_the_signal_itself_were_stopped(
    started: "list[subprocess.Popen[str]]",
) -> None:
    """As one is, whose interpreter has put its handlers away."""
    mortal = """
import os, signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
os.write(1, b"ready\\n")
signal.pause()
"""
    start(started, sys.executable, "-c", START, mortal, "", "")
    wait_until_ready(started[0])
    os.killpg(started[0].pid, signal.SIGINT)
    said, _ = started[0].communicate(timeout=LIMIT)
    assert (started[0].returncode, said) == (ExitCode.INTERRUPTED, "")


def test_none_outlives_the_one_that_started_them(
    started: "list[subprocess.Popen[str]]",
) -> None:
    start(started, *of_ranks("wait", "wait"))
    wait_until_ready(started[0])
    started[0].kill()
    said, _ = started[0].communicate(timeout=LIMIT)  # to the end of what all of them write to
    assert "SIGTERM: a checkpoint follows" in said


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
    ],
    ids=["torchrun", "srun"],
)
def test_a_process_that_a_launcher_started_starts_none(
    variables: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["doctor", "--devices", "2"]) == ExitCode.USAGE
    assert "leave it out under torchrun and srun" in error_line(capsys.readouterr().err)


def test_the_number_is_taken_out_of_three_commands_words() -> None:
    assert devices.taken_out(["pretrain", "r", "--devices", "3", "--batch", "8"]) == (
        ["pretrain", "r", "--batch", "8"],
        3,
    )
    assert devices.taken_out(["evaluate", "knn", "--devices=2", "x"]) == (
        ["evaluate", "knn", "x"],
        2,
    )
    assert devices.taken_out(["doctor"]) == (["doctor"], 1)
    assert devices.taken_out(["pretrain", "r", "--devices", "2", "--help"])[1] == 1
    assert devices.taken_out(["pack", "--devices", "2"]) == (["pack", "--devices", "2"], 1)


def test_a_wrong_setting_is_told_once(
    tmp_path: Path, started: "list[subprocess.Popen[str]]"
) -> None:
    """All find it, when they have torch; files of the working folder named as ours are not ours."""
    data = pack_images(tmp_path, count=12)
    for name in ("launch.py", "trainer.py", "torch.py"):
        (tmp_path / name).write_text("raise SystemExit('not ours')\n")
    words = ["pretrain", "simclr-cifar10-r18", "--data.train", str(data), "--devices", "2"]
    words += ["--batch", "11", "--out", str(tmp_path / "run"), "--device", "cpu"]
    start(started, WIDEBATCH, *words, folder=tmp_path)
    said, _ = started[0].communicate(timeout=LIMIT)
    assert started[0].returncode == ExitCode.USAGE, said
    assert "--batch 11 does not divide by 2 processes" in error_line(said)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_they_train_as_torchruns_do_and_go_on_after_ctrl_c(
    tmp_path: Path, started: "list[subprocess.Popen[str]]"
) -> None:
    data = pack_images(tmp_path)
    torchrun = (SCRIPTS / "torchrun", "--standalone", "--nproc-per-node", "2", "--no-python")
    words = [
        *("pretrain", "simclr-cifar10-r18", "--data.train", str(data), "--batch", "24"),
        *("--steps", "8", "--precision", "fp32", "--device", "cpu", "--crop.size", "32"),
        *("--encoder.name", SMALL_ENCODER.name, "--encoder.image-size", "32"),
        *("--loader.backend", "torchvision", "--loader.workers", "1", "--log-samples"),
        *("--telemetry.log-every", "1", "--telemetry.no-tensorboard"),
    ]
    ours = (WIDEBATCH, *words, "--devices", "2", "--out", str(tmp_path / "ours"))
    start(started, *torchrun, WIDEBATCH, *words, "--out", str(tmp_path / "torchruns"))
    said, _ = started[0].communicate(timeout=280)
    assert started[0].returncode == 0, said
    start(started, *ours, WIDEBATCH_FAULTS=armed("step.start rank=1 pass=4 sleep:10"))
    metrics, end = tmp_path / "ours" / "metrics.jsonl", time.monotonic() + 280
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < end:
        time.sleep(0.1)
    os.killpg(started[1].pid, signal.SIGINT)
    os.killpg(started[1].pid, signal.SIGINT)
    said, _ = started[1].communicate(timeout=280)
    assert started[1].returncode == ExitCode.PREEMPTED, said
    assert "Traceback" not in said and "a checkpoint follows" in said
    assert (tmp_path / "ours" / "checkpoints" / "latest.json").exists()
    start(started, *ours)
    said, _ = started[2].communicate(timeout=280)
    assert started[2].returncode == 0, said
    assert_equal_runs(tmp_path / "ours", tmp_path / "torchruns")
